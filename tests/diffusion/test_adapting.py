"""What settings put on a network by layer, rates by layer, and norms that are held down."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowrank_core import LoHa, LoRA, UsageError, inject, save, trainable_parameters
from lowrank_core.adapters.control import adapters_of
from lowrank_core.errors import LowrankError
from lowrank_diffusion.adapting import check_targets, put_adapters
from lowrank_diffusion.config import TrainConfig
from lowrank_diffusion.load import load_config
from lowrank_diffusion.optimizers import build_optimizer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(8, 6), nn.Linear(6, 4)


def adapted(*overrides: str, target: str = "[to_q, to_v]"):
    """Two blocks under an adapter, which is drawn at random so that no change is zero."""
    network = nn.ModuleDict({"down": Block(), "up": Block()})
    config = load_config(None, [f"adapter.target={target}", *overrides])
    adapters = put_adapters(SimpleNamespace(unet=network), config, print)
    torch.manual_seed(0)
    for adapter in adapters_of(network).values():
        adapter.form.init(adapter.factors, "random")
    return adapters, adapters_of(network)


def test_ranks_alphas_and_dropouts_by_layer():
    patterns = ["adapter.rank_pattern={to_q: 3, 'up.*': 2}", "adapter.alpha_pattern={'up.to_q': 9}"]
    dropouts = ["adapter.rank_dropout=0.25", "adapter.module_dropout=0.5"]
    _, layers = adapted("adapter.rank=4", "adapter.alpha=4", *patterns, *dropouts)
    # The first key that matches counts.
    found = {name: (adapter.rank, adapter.alpha) for name, adapter in layers.items()}
    assert found == {"down.to_q": (3, 4), "down.to_v": (4, 4), "up.to_q": (3, 9), "up.to_v": (2, 4)}
    assert {(adapter.rank_dropout, adapter.module_dropout) for adapter in layers.values()} == {(0.25, 0.5)}


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        # Layers are 8 to 6 and 6 to 4.
        (
            ["adapter.rank=100000"],
            r"^adapter.rank has 100000, and the largest .* is 6 \(down.to_q\); give that",
        ),
        (["adapter.rank_pattern={to_v: 5}"], r"^adapter.rank_pattern has 5, and the .* is 4 \(down.to_v\)"),
        (["adapter.target=[nothing]"], r"^adapter.target 'nothing' matches no module; the nearest names are"),
        (["adapter.target=[norm]"], r"norm is of type LayerNorm, .*; leave it out of adapter.target"),
        (["adapter.alpha_pattern={to_k: 2}"], r"^adapter.alpha_pattern 'to_k' matches no adapted layer"),
    ],
)
def test_targets_and_ranks_that_cannot_be_meant(wanted, sentence):
    network = nn.ModuleDict({"down": Block(), "up": Block(), "norm": nn.LayerNorm(4)})
    fitting = ["adapter.method=lora", "adapter.rank=6", "adapter.target=[to_q, to_v]"]
    settings = load_config(None, [*fitting, *wanted]).adapter
    with pytest.raises(UsageError, match=sentence):
        check_targets({"unet": network}, settings)
    for good in ([], ["adapter.rank_pattern={to_v: 4}"], ["adapter.method=lokr", "adapter.rank=10000"]):
        check_targets({"unet": network}, load_config(None, [*fitting, *good]).adapter)


def test_rates_by_layer():
    adapters, layers = adapted("adapter.method=lora")
    factors = adapters.rate_factors({"down.to_v": 3.0, "down.*": 0.5})
    optimizer = build_optimizer(TrainConfig(lr=1e-2), adapters.parameters("unet"), factors=factors)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    expected = {"down.to_q": 0.005, "down.to_v": 0.03, "up.to_q": 0.01, "up.to_v": 0.01}
    assert len(rates) == 8
    for name, adapter in layers.items():
        assert [rates[parameter] for parameter in adapter.parameters()] == pytest.approx([expected[name]] * 2)
    assert optimizer.param_groups[0]["lr"] == 0.01
    with pytest.raises(UsageError, match=r"train.lr_pattern 'dwn.to_q' matches no adapted layer; the nearest names"):
        adapters.rate_factors({"dwn.to_q": 1.0})
    with pytest.raises(UsageError, match=r"prodigy has one rate for all parameters; leave train.lr_pattern out"):
        build_optimizer(TrainConfig(optimizer="prodigy", lr=1, lr_pattern={"down.*": 0.5}), [])


@pytest.mark.parametrize("method", ["lora", "loha", "lokr"])
def test_magnitudes_are_among_what_is_trained(method):
    adapters, _ = adapted(f"adapter.method={method}", "adapter.dora=true")
    assert [magnitude.shape for magnitude in adapters.magnitudes] == [(6, 1), (4, 1)] * 2
    assert set(adapters.magnitudes) < set(adapters.parameters("unet"))
    plain, _ = adapted(f"adapter.method={method}")
    assert plain.magnitudes == []
    assert adapters.size == plain.size + 2 * (6 + 4)
    kept = {name: tensor.clone() for name, tensor in adapters.state().items()}
    with torch.no_grad():
        for parameter in adapters.parameters("unet"):
            parameter.zero_()
    adapters.load_state(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapters.state().items())
    assert all(magnitude.any() for magnitude in adapters.magnitudes)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["adapter.method=adalora"],
            r"adapter.dora trains magnitudes, which neither PEFT folders nor kohya files of an",
        ),
        (["base.quantize=nf4"], r"adapter.dora takes norms of the base's own weights, .* set base.quantize: none"),
        (["train.scale_weight_norms=1"], r"magnitudes too, which train.scale_weight_norms does not reach; leave one"),
    ],
)
def test_what_magnitudes_do_not_go_with(overrides, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_config(None, ["adapter.dora=true", *overrides])


@pytest.mark.parametrize(
    ("axis", "dora", "sentence"),
    [
        ("out", "true", None),
        ("out", "false", r"which has DoRA's magnitudes; set adapter.dora: true"),
        (None, "true", r"which has none of DoRA's magnitudes; set adapter.dora: false"),
        (
            "in",
            "true",
            r"which has DoRA's magnitudes along the inputs, and training .*; merge it into the base, and tr",
        ),
    ],
)
def test_magnitudes_of_an_adapter_to_go_on_from(axis, dora, sentence, tmp_path):
    source = nn.ModuleDict({"down": Block(), "up": Block()})
    network = copy.deepcopy(source)
    inject(source, LoRA(rank=2, target_modules=["to_q", "to_v"], weight_decompose=axis, init_weights="random"))
    with torch.no_grad():
        for parameter in trainable_parameters(source):
            parameter.mul_(1.5)
    save(source, tmp_path / "own.safetensors", "kohya")
    config = load_config(
        None, ["adapter.method=lora", f"adapter.dora={dora}", f"adapter.init_from={tmp_path / 'own.safetensors'}"]
    )
    if sentence is not None:
        with pytest.raises(UsageError, match=sentence):
            put_adapters(SimpleNamespace(unet=network), config, print)
        return
    adapters = put_adapters(SimpleNamespace(unet=network), config, print)
    x = torch.randn(3, 8)
    assert len(adapters.magnitudes) == 4
    torch.testing.assert_close(network["up"].to_q(x), source["up"].to_q(x), rtol=0, atol=0)


def test_a_run_without_peft_folders_is_gone_on_from_by_its_folder(tmp_path):
    source = nn.ModuleDict({"down": Block(), "up": Block()})
    network = copy.deepcopy(source)
    config = LoHa(rank=2, target_modules=["to_q", "to_v"], weight_decompose="out", init_weights="random")
    inject(source, config)
    for name, form in (("mine", "kohya"), ("mine_lora", "lora")):
        save(source, tmp_path / f"{name}.safetensors" if form == "kohya" else tmp_path / name, form)
    (tmp_path / "config.yaml").write_text("name: mine\nadapter: {method: loha, dora: true}\n")
    (tmp_path / "metrics.jsonl").touch()
    config = load_config(None, ["adapter.method=loha", "adapter.dora=true", f"adapter.init_from={tmp_path}"])
    put_adapters(SimpleNamespace(unet=network), config, print)
    x = torch.randn(3, 8)
    torch.testing.assert_close(network["up"].to_q(x), source["up"].to_q(x), rtol=0, atol=0)
    (tmp_path / "mine.safetensors").unlink()
    with pytest.raises(LowrankError, match="has no adapter yet; wait for its end"):
        put_adapters(SimpleNamespace(unet=nn.ModuleDict({"up": Block()})), config, print)


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "adalora"])
def test_norms_above_the_limit_come_down_to_it_and_keep_their_direction(method):
    adapters, layers = adapted(f"adapter.method={method}", "adapter.rank=2", "adapter.alpha=3")
    before = {name: adapter.compose().detach().double() for name, adapter in layers.items()}
    limit = sorted(change.norm().item() for change in before.values())[1]
    down = layers["down.to_q"].factors.get("lora_A")
    down = None if down is None else down.detach().clone()
    adapters.limit_norms(limit)
    for name, adapter in layers.items():
        expected = before[name] * min(1, limit / before[name].norm().item())
        assert torch.allclose(adapter.compose().double(), expected, rtol=1e-4, atol=1e-6)
    if method == "adalora":
        assert torch.equal(layers["down.to_q"].factors["lora_A"], down)


def test_norms_of_adapters_that_are_zero_stay_so():
    adapters, layers = adapted("adapter.method=lora")
    for adapter in layers.values():
        adapter.form.init(adapter.factors, "peft")
    before = [parameter.detach().clone() for parameter in adapters.parameters("unet")]
    adapters.limit_norms(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, adapters.parameters("unet"), strict=True))


@pytest.mark.slow
def test_the_blora_preset_adapts_two_attention_blocks():
    from lowrank_core.costs.adapters import count_adapter
    from lowrank_diffusion.adapting import adapter_config
    from lowrank_diffusion.outline import outlined

    settings = load_config("sdxl-blora").adapter
    layers = count_adapter(outlined("unet")[0], adapter_config(settings, settings.target)).layers
    # Ten transformer blocks with two attentions of four layers, twice.
    assert len(layers) == 160
    assert {layer.name.split(".transformer_blocks")[0] for layer in layers} == {
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    }
