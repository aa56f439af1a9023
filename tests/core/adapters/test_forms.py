"""Factors against PEFT: the same names, shapes, start and composed weights."""

import itertools
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lokr.layer import factorization
from torch import nn

from lowrank_core.adapters.forms import AdaLoRAForm, Form, LoHaForm, LoKrForm, LoRAForm
from lowrank_core.adapters.forms.lokr import split
from lowrank_core.adapters.geometry import Geometry

LAYERS = {
    "linear": nn.Linear(48, 36),
    "conv2d": nn.Conv2d(12, 36, 3, padding=1),
    "conv2d 1x1": nn.Conv2d(12, 36, 1),
    "conv2d grouped": nn.Conv2d(12, 36, 3, groups=2),
    "conv1d": nn.Conv1d(12, 36, 3),
}
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 10, "lora_alpha": 2}
PAIRS: dict[str, tuple[Any, Form]] = {
    "lora": (LoraConfig(r=4, lora_alpha=2, init_lora_weights=False), LoRAForm()),
    "loha": (LoHaConfig(r=4, alpha=2, init_weights=False), LoHaForm()),
    "loha tucker": (LoHaConfig(r=4, alpha=2, init_weights=False, use_effective_conv2d=True), LoHaForm(tucker=True)),
    "lokr": (LoKrConfig(r=2, alpha=4, init_weights=False), LoKrForm()),
    "lokr factor": (LoKrConfig(r=2, alpha=4, init_weights=False, decompose_factor=4), LoKrForm(factor=4)),
    "lokr both": (LoKrConfig(r=1, alpha=4, init_weights=False, decompose_both=True), LoKrForm(decompose_both=True)),
    "lokr tucker": (LoKrConfig(r=2, alpha=4, init_weights=False, use_effective_conv2d=True), LoKrForm(tucker=True)),
    "adalora": (AdaLoraConfig(**ADALORA, init_lora_weights=False), AdaLoRAForm()),
}


def covered(layer: str, name: str) -> bool:
    if name == "adalora":
        return layer in ("linear", "conv2d", "conv2d 1x1")
    if name == "lora" and layer == "conv2d grouped":
        return False  # PEFT's LoRA of a grouped convolution mixes the groups: no weight of the layer's shape does that
    return not (name == "lokr tucker" and layer == "conv1d")  # PEFT fails there: "view size is not compatible"


CASES = [pair for pair in itertools.product(LAYERS, PAIRS) if covered(*pair)]


@pytest.mark.parametrize(("layer", "name"), CASES)
def test_factors_and_composed_weights_are_pefts(layer: str, name: str) -> None:
    config, form = PAIRS[name]
    config.target_modules = {"0"}
    module: Any = inject_adapter_in_model(config, nn.Sequential(LAYERS[layer]))[0]
    geometry = Geometry.of(module.base_layer)
    assert geometry is not None
    factors = {}
    for key in module.adapter_layer_names:
        held = getattr(module, key)
        if "default" in held:
            factors[key] = held["default"].weight if isinstance(held["default"], nn.Module) else held["default"]
    assert {key: tuple(factor.shape) for key, factor in factors.items()} == form.shapes(geometry, module.r["default"])
    scale = module.scaling["default"] / (module.r["default"] + 1e-5 if name == "adalora" else 1)
    ours = scale * form.compose(factors, geometry)
    torch.testing.assert_close(ours, module.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    pair = form.pair(factors, geometry)
    if pair is not None:
        up, down = pair
        torch.testing.assert_close(scale * (up @ down).view(geometry.weight_shape), ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("init", ["peft", "lycoris"])
def test_an_adapter_starts_at_zero_and_random_does_not(name: str, init: Any) -> None:
    form = PAIRS[name][1]
    geometry = Geometry.of(LAYERS["conv2d"])
    assert geometry is not None
    factors = {key: torch.full(shape, torch.nan) for key, shape in form.shapes(geometry, 2).items()}
    form.init(factors, init)
    assert form.compose(factors, geometry).abs().max() == 0
    form.init(factors, "random")
    assert form.compose(factors, geometry).abs().min() > 0


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "adalora"])
def test_the_start_is_pefts_draw(method: str) -> None:
    form = PAIRS[method][1]
    layer = nn.Linear(48, 36)
    geometry = Geometry.of(layer)
    assert geometry is not None
    configs: dict[str, Any] = {
        "lora": LoraConfig(r=4, target_modules=["0"]),
        "loha": LoHaConfig(r=4, target_modules=["0"]),
        "lokr": LoKrConfig(r=2, target_modules=["0"]),
        "adalora": AdaLoraConfig(**ADALORA, target_modules=["0"]),
    }
    module: Any = inject_adapter_in_model(configs[method], nn.Sequential(layer))[0]
    rank = module.r["default"]
    for key, shape in form.shapes(geometry, rank).items():
        theirs = getattr(module, key)["default"]
        theirs = theirs.weight if isinstance(theirs, nn.Module) else theirs
        factors = {name: torch.empty(size) for name, size in form.shapes(geometry, rank).items()}
        form.init(factors, "peft")
        assert factors[key].shape == shape
        # One draw each of a few hundred numbers: the same spread, not the same numbers.
        spread = theirs.std().item()
        assert factors[key].std().item() == pytest.approx(spread, rel=0.35)


def test_the_split_of_a_dimension_is_pefts() -> None:
    for dimension, factor in itertools.product(range(1, 400), (-1, 1, 2, 3, 4, 5, 8, 12, 16, 40)):
        assert split(dimension, factor) == tuple(factorization(dimension, factor))


@pytest.mark.parametrize("name", PAIRS)
def test_the_reachable_rank_is_reached_and_not_exceeded(name: str) -> None:
    form = PAIRS[name][1]
    geometry = Geometry("conv", 24, 12, (3, 3), (1, 1), (0, 0), (1, 1))
    factors = {key: torch.randn(shape, dtype=torch.float64) for key, shape in form.shapes(geometry, 2).items()}
    composed = form.compose(factors, geometry).flatten(1)
    assert torch.linalg.matrix_rank(composed).item() == form.max_rank(geometry, 2)
