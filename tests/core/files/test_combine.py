"""Weighted sums of adapters as one: the float64 sum of their ΔW, whatever the methods and the forms of their files."""

import copy

import pytest
import torch
from safetensors.torch import save_file

import lowrank_core
from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA
from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files import combine, read, write
from lowrank_core.files.bundle import ModuleAdapter
from lowrank_core.files.factored import as_file

TARGETS = ["conv_in", "pointwise", "to_q", "to_out.0", "head"]
CONFIGS = {
    "lora": LoRA(rank=2, alpha=3, target_modules=TARGETS),
    "rslora": LoRA(rank=2, alpha=3, target_modules=["to_q", "conv_in"], rank_stabilized=True),
    "tucker": LoRA(rank=2, alpha=3, target_modules=TARGETS, tucker=True),
    "loha": LoHa(rank=2, alpha=5, target_modules=TARGETS, alpha_pattern={"head": 7}),
    "loha-tucker": LoHa(rank=2, alpha=5, target_modules=TARGETS, tucker=True),
    "lokr": LoKr(rank=2, alpha=3, target_modules=TARGETS, factor=2),
    "adalora": AdaLoRA(rank=4, target_rank=2, alpha=3, target_modules=["head", "conv_in"]),
}
PAIRS = [("lora", "lora"), ("lora", "loha"), ("rslora", "lokr"), ("loha-tucker", "adalora"), ("tucker", "lora")]


@pytest.fixture
def base(net, tmp_path):
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


@pytest.fixture
def saved(adapted, tmp_path):
    """`saved("loha")`: the adapter's file, and ΔW by layer, in float64, as the layers compute it."""

    def saved(kind, number=0):
        model = adapted(CONFIGS[kind])
        form = "kohya" if kind in ("tucker", "lora", "lokr") else "peft"
        path = tmp_path / (f"{kind}-{number}" + (".safetensors" if form == "kohya" else ""))
        lowrank_core.save(model, path, form)
        return path, changes(model)

    return saved


@torch.no_grad()
def changes(model):
    found = {}
    for name, adapter in lowrank_core.adapters_of(copy.deepcopy(model).double()).items():
        found[name] = adapter.change(torch.zeros(adapter.geometry.weight_shape).double(), torch.float64)
    return found


def loaded(net, path):
    return changes(lowrank_core.load(copy.deepcopy(net), path))


def total(weights, parts):
    names = {name for part in parts for name in part}
    return {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True) if name in part) for name in names}


def assert_same(found, wanted, tolerance=1e-5):
    assert set(found) == set(wanted)
    for name, change in wanted.items():
        assert float((found[name] - change).norm()) <= tolerance * float(change.norm()), name


@pytest.mark.parametrize("form", ["kohya", "peft"])
@pytest.mark.parametrize("kinds", PAIRS)
def test_a_sum_of_any_two_is_exact(net, base, saved, tmp_path, kinds, form):
    (one, first), (two, second) = (saved(kind, number) for number, kind in enumerate(kinds))
    out = tmp_path / ("sum.safetensors" if form == "kohya" else "sum")
    done = combine([one, two], [0.7, -0.4], out, form=form, base=base)
    assert done.kept_energy == 1
    assert_same(loaded(net, out), total([0.7, -0.4], [first, second]))


def test_ranks_add_up_to_at_most_the_layers_own(net, base, saved, tmp_path):
    adapters = [saved("loha", number) for number in range(3)]
    done = combine([path for path, _ in adapters], [1, 1, 1], tmp_path / "sum", form="peft", base=base)
    ranks = {layer.name: layer.rank for layer in done.layers}
    assert ranks["head"] == 6
    assert ranks["conv_in"] == 8
    assert ranks["pointwise"] == 8
    assert ranks["mid_blocks.0.to_q"] == 12
    assert done.rank == 12
    assert_same(loaded(net, tmp_path / "sum"), total([1, 1, 1], [change for _, change in adapters]))


def test_without_a_base_where_files_say_enough(net, saved, tmp_path):
    (one, first), (two, second) = saved("lora", 0), saved("lora", 1)
    done = combine([one, two], [2, 1], tmp_path / "sum.safetensors")
    assert done.rank == 4
    assert_same(loaded(net, tmp_path / "sum.safetensors"), total([2, 1], [first, second]))


def test_the_ways_of_naming_a_text_encoders_layer_and_a_unet_that_is_not_named(tmp_path):
    def made(component, name, place, form):
        factors = {"lora_A": torch.randn(1, 6), "lora_B": torch.randn(4, 1)}
        file = as_file("lora", component, {name: ModuleAdapter(factors, 1, 1)})
        write([file], tmp_path / place, form)
        return tmp_path / place, (factors["lora_B"] @ factors["lora_A"]).double()

    layer = "encoder.layers.0.mlp.fc1"
    one, first = made("te1", "text_model." + layer, "one.safetensors", "kohya")
    two, second = made("te1", layer, "text_encoder", "peft")
    three, third = made("", "time_embedding.linear_1", "anything", "peft")
    combine([one, two, three], [1, 2, 3], tmp_path / "sum.safetensors")
    files = {file.component: file for file in read(tmp_path / "sum.safetensors")}
    wanted = {"te1": ("text_model." + layer, first + 2 * second), "unet": ("time_embedding.linear_1", 3 * third)}
    assert set(files) == set(wanted)
    for component, (name, change) in wanted.items():
        module = files[component].modules[name]
        torch.testing.assert_close((module.factors["lora_B"] @ module.factors["lora_A"]).double(), change)


@pytest.mark.slow
def test_a_rank_cuts_off_as_the_singular_values_say(net, base, saved, tmp_path):
    (one, first), (two, second) = saved("lora"), saved("loha")
    done = combine([one, two], [1, 0.5], tmp_path / "sum", rank=3, form="peft", base=base)
    wanted, found = total([1, 0.5], [first, second]), loaded(net, tmp_path / "sum")
    energy = lost = 0.0
    for layer in done.layers:
        values = torch.linalg.svdvals(wanted[layer.name].flatten(1)).square()
        assert layer.rank == 3
        assert layer.energy == pytest.approx(float(values.sum()))
        assert layer.lost == pytest.approx(float(values[3:].sum()))
        off = float((found[layer.name] - wanted[layer.name]).square().sum())
        assert off == pytest.approx(layer.lost, rel=1e-4)
        assert layer.kept_energy == pytest.approx(1 - layer.lost / layer.energy)
        energy, lost = energy + layer.energy, lost + layer.lost
    assert 0.3 < done.kept_energy < 1
    assert done.kept_energy == pytest.approx(1 - lost / energy)


@pytest.mark.slow
def test_a_loha_of_a_sum_that_is_one(net, base, saved, tmp_path):
    (one, first), (two, _) = saved("loha", 0), saved("loha", 1)
    done = combine([one, two], [0.5, 0], tmp_path / "sum", method="loha", rank=2, form="peft", base=base)
    assert done.kept_energy > 1 - 1e-10
    assert_same(loaded(net, tmp_path / "sum"), total([0.5], [first]), 1e-4)
    assert isinstance(read(tmp_path / "sum")[0].config, LoHa)


def test_the_order_and_the_way_of_bracketing_do_not_matter(net, base, saved, tmp_path):
    (one, first), (two, second), (three, third) = (saved(kind) for kind in ("lora", "lokr", "loha"))
    combine([one, two], [1, 2], tmp_path / "part", form="peft", base=base)
    combine([three, tmp_path / "part"], [3, 0.5], tmp_path / "sum", form="peft", base=base)
    assert_same(loaded(net, tmp_path / "sum"), total([0.5, 1, 3], [first, second, third]))


def test_whoever_listens_is_told_of_every_layer(base, saved, tmp_path):
    heard = []
    path, change = saved("lora")
    combine([path], [1], tmp_path / "sum", form="peft", base=base, told=lambda *news: heard.append(news))
    assert {name for name, _, _ in heard} == set(change)
    assert [news[1:] for news in heard] == [(number, 7) for number in range(7)]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"weights": [1]}, UsageError, "--weights has 1 numbers for 2 adapters; give one for each"),
        ({"weights": [0, 0]}, UsageError, "--weights are all 0, so there is nothing to merge"),
        ({"method": "lokr"}, UsageError, "--method is one of lora, loha, got 'lokr'"),
        ({"method": "loha"}, UsageError, "a LoHa is fitted at a rank; give it with --rank"),
        ({"rank": 0}, UsageError, "--rank must be at least 1, got 0"),
        ({"rank": 13}, UsageError, "--rank 13 is more than any layer has, at most 12"),
    ],
)
def test_what_cannot_be_meant(base, saved, tmp_path, given, error, message):
    paths = [saved(kind)[0] for kind in ("lora", "loha")]
    with pytest.raises(error, match=message):
        combine(paths, given.pop("weights", [1, 1]), tmp_path / "sum", base=base, **given)
    assert not (tmp_path / "sum").exists()


def test_adapters_of_different_models(net, saved, tmp_path):
    path, _ = saved("lora")
    net.head = torch.nn.Linear(12, 5)
    other = lowrank_core.inject(net, LoRA(rank=2, target_modules=["head"], init_weights="random"))
    lowrank_core.save(other, tmp_path / "other")
    message = "head is 6 x 12 for .*lora-0.safetensors and 5 x 12 for .*other; adapters of different models have no sum"
    with pytest.raises(LowrankError, match=message):
        combine([path, tmp_path / "other"], [1, 1], tmp_path / "sum")


def test_what_has_no_weighted_sum(adapted, base, tmp_path):
    lowrank_core.save(adapted(LoRA(rank=2, target_modules=["to_q"], weight_decompose="out")), tmp_path / "dora")
    lowrank_core.save(adapted(LoRA(rank=2, target_modules=["to_q"], modules_to_save=["head"])), tmp_path / "whole")
    for name, message in (("dora", "has weight decomposition"), ("whole", "has modules trained whole")):
        with pytest.raises(LowrankError, match=message + ".*lowrank convert --to merged"):
            combine([tmp_path / name], [1], tmp_path / "sum", base=base)


def test_flat_kernels_need_the_model(saved, tmp_path):
    path, _ = saved("loha")
    with pytest.raises(LowrankError, match="the kernels of conv_in are not in a loha file; give the model"):
        combine([path], [1], tmp_path / "sum")


def test_what_is_there_is_not_written_over(base, saved, tmp_path):
    path, _ = saved("lora")
    (tmp_path / "sum").write_text("mine")
    with pytest.raises(LowrankError, match="is there already; choose another name, or overwrite it"):
        combine([path], [1], tmp_path / "sum", base=base)
    combine([path], [1], tmp_path / "sum.safetensors", base=base)
    combine([path], [2], tmp_path / "sum.safetensors", base=base, overwrite=True)
