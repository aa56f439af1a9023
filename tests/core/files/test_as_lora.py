"""Plain LoRA of every method: exact against the composed ΔW, and truncated as well as can be."""

import copy

import pytest
import torch
from torch import nn

import lowrank_core
from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files import AdapterFile, ModuleAdapter, as_lora

LAYERS = {
    "linear": nn.Linear(30, 20),
    "narrow": nn.Linear(30, 5),
    "pointwise": nn.Conv2d(30, 20, 1),
    "conv": nn.Conv2d(6, 20, 3),
    "line": nn.Conv1d(6, 20, 3),
    "grouped": nn.Conv2d(12, 20, 3, groups=2),
}
CONFIGS = {
    "lora": LoRA(rank=3, alpha=2, target_modules=[]),
    "lora-tucker": LoRA(rank=3, alpha=2, target_modules=[], tucker=True),
    "loha": LoHa(rank=3, alpha=2, target_modules=[]),
    "loha-tucker": LoHa(rank=3, alpha=2, target_modules=[], tucker=True),
    "lokr": LoKr(rank=2, alpha=3, target_modules=[], factor=2),
    "lokr-tucker": LoKr(rank=2, alpha=3, target_modules=[], factor=2, tucker=True),
    "lokr-both": LoKr(rank=1, alpha=3, target_modules=[], decompose_both=True),
    "adalora": AdaLoRA(rank=4, target_rank=2, alpha=3, target_modules=[]),
}


def bundle(kind, layer, dtype=torch.float64):
    """A file with one module for this layer, and its geometry."""
    config, geometry = CONFIGS[kind], Geometry.of(LAYERS[layer])
    factors = {name: torch.randn(s, dtype=dtype) for name, s in config.form.shapes(geometry, config.rank).items()}
    if "lora_E" in factors:
        factors["lora_E"][1] = 0
    return AdapterFile(config, {"x": ModuleAdapter(factors, config.rank, config.alpha)}), geometry


def change(file, geometry):
    factors = {name: factor.double() for name, factor in file.modules["x"].factors.items()}
    return file.scaling("x") * file.config.form.compose(factors, geometry)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_form_is_exactly_a_lora(kind, layer):
    file, geometry = bundle(kind, layer)
    done = as_lora(file, {"x": geometry})
    assert isinstance(done.file.config, LoRA)
    assert done.exact
    assert done.lost_energy == 0
    torch.testing.assert_close(change(done.file, geometry), change(file, geometry), rtol=1e-11, atol=1e-11)
    limit = min(geometry.matrix_shape)
    expected = {"lora": 3, "loha": min(9, limit), "adalora": 3}.get(kind.partition("-")[0])
    assert expected is None or done.rank == expected
    assert done.rank <= max(limit, 3)


def test_a_lora_is_given_back_as_it_is():
    file, geometry = bundle("lora", "conv", torch.float16)
    assert as_lora(file, {"x": geometry}).file is file
    assert as_lora(file, {"x": geometry}, rank=3).file is file


@pytest.mark.parametrize("kind", ["loha", "lokr", "lora", "adalora"])
def test_truncation_is_the_best_of_its_rank_and_says_what_it_lost(kind):
    file, geometry = bundle(kind, "conv")
    done = as_lora(file, {"x": geometry}, rank=2)
    assert (done.rank, done.exact) == (2, False)
    whole = change(file, geometry).flatten(1)
    values = torch.linalg.svdvals(whole)
    off = (change(done.file, geometry).flatten(1) - whole).square().sum()
    torch.testing.assert_close(off, values[2:].square().sum())
    assert done.lost_energy == pytest.approx(float(values[2:].square().sum() / values.square().sum()))


def test_products_of_half_precision_are_stored_in_single():
    file, geometry = bundle("loha", "linear", torch.bfloat16)
    (module,) = as_lora(file, {"x": geometry}).file.modules.values()
    assert {factor.dtype for factor in module.factors.values()} == {torch.float32}


def test_without_the_model_a_flat_convolution_is_refused_by_name(net, adapted):
    file = lowrank_core.files.adapter_file_of(adapted(LoHa(rank=2, target_modules=["conv_in", "head"])))
    with pytest.raises(LowrankError, match=r"kernels of conv_in are not in a loha file.*--base"):
        as_lora(file)
    tucker = adapted(LoHa(rank=2, target_modules=["conv_in", "head"], tucker=True))
    done = as_lora(lowrank_core.files.adapter_file_of(tucker))
    assert done.file.modules["conv_in"].factors["lora_A"].shape == (4, 4, 3, 3)


def test_what_is_no_plain_lora_is_refused(adapted):
    file, geometry = bundle("loha", "linear")
    with pytest.raises(UsageError, match="rank must be at least 1, got 0"):
        as_lora(file, {"x": geometry}, rank=0)
    with pytest.raises(LowrankError, match=r"factors for a weight of 20 x 30, but the model's is 20 x 6 x 3"):
        as_lora(file, {"x": Geometry.of(LAYERS["line"])})
    file.modules["x"].factors["hada_w1_a"][0] = torch.inf
    with pytest.raises(LowrankError, match="x has numbers that are not finite"):
        as_lora(file, {"x": geometry})
    decomposed = adapted(LoHa(rank=2, target_modules=["head"], weight_decompose="out"))
    with pytest.raises(
        LowrankError, match=r"write the equal LoRA with DoRA \(form lora or diffusers, without a rank\), or merge"
    ):
        as_lora(lowrank_core.files.adapter_file_of(decomposed))


def test_an_embedding_is_truncated_too():
    model = nn.Sequential(nn.Embedding(7, 4))
    model = lowrank_core.inject(model, LoRA(rank=3, target_modules=["0"], init_weights="random"))
    file = lowrank_core.files.adapter_file_of(model)
    layers = {"0": Geometry.of(nn.Embedding(7, 4))}
    (module,) = as_lora(file, layers, rank=2).file.modules.values()
    assert {name: tuple(factor.shape) for name, factor in module.factors.items()} == {
        "lora_embedding_A": (2, 7),
        "lora_embedding_B": (4, 2),
    }


@pytest.mark.parametrize("kind", ["loha", "lokr", "adalora", "lora-tucker"])
def test_saved_as_lora_a_model_gives_the_same(net, adapted, images, tmp_path, kind):
    from dataclasses import replace

    targets = ["conv_in", "pointwise", "to_q", "to_out.0", "head"]
    model = adapted(replace(CONFIGS[kind], target_modules=targets)).eval()
    lowrank_core.save(model, tmp_path / "lora", "lora")
    again = lowrank_core.load(copy.deepcopy(net), tmp_path / "lora").eval()
    assert isinstance(lowrank_core.configs_of(again)["default"], LoRA)
    torch.testing.assert_close(again(images), model(images), rtol=1e-5, atol=1e-5)


def test_an_adalora_without_a_direction_is_a_lora_that_adds_nothing():
    file, geometry = bundle("adalora", "linear")
    file.modules["x"].factors["lora_E"].zero_()
    lora = as_lora(file, {"x": geometry}).file.modules["x"].factors
    assert lora["lora_B"].shape == (20, 1)
    assert not (lora["lora_B"] @ lora["lora_A"]).any()


def test_a_rank_that_cuts_nothing_off_loses_nothing():
    file, geometry = bundle("loha", "linear")
    whole, export = as_lora(file, {"x": geometry}), as_lora(file, {"x": geometry}, rank=50)
    assert export.lost_energy == 0
    for name, factor in whole.file.modules["x"].factors.items():
        torch.testing.assert_close(export.file.modules["x"].factors[name], factor, rtol=0, atol=0)
