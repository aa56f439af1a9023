"""Weight decomposition: against PEFT, against autograd of the formula, and along either axis."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA, adapters_of, inject, merge, set_scale, unmerge
from lowrank_core.adapters.config import AdapterConfig
from lowrank_core.adapters.dora import axis_of, magnitude_shape

METHODS: dict[str, AdapterConfig] = {
    "lora": LoRA(target_modules=["0"]),
    "loha": LoHa(target_modules=["0"]),
    "lokr": LoKr(target_modules=["0"]),
    "adalora": AdaLoRA(target_modules=["0"], target_rank=1),
}
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), (2, 4, 7, 7)),
}


def sample(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[kind]
    return make().to(dtype), torch.randn(shape, dtype=dtype)


def decomposed(layer: nn.Module, method: str, axis: str | None, **fields: Any) -> nn.Module:
    kind = METHODS[method]
    extra = {"target_rank": 1} if method == "adalora" else {}
    fields = {"rank": 2, "alpha": 3, "init_weights": "random", "weight_decompose": axis, **extra, **fields}
    return inject(nn.Sequential(copy.deepcopy(layer)), type(kind)(target_modules=["0"], **fields))


def by_formula(model: nn.Module, axis: str) -> Tensor:
    """m ⊙ (W + sΔW) / ‖W + sΔW‖, the norm a constant to the gradient."""
    layer: Any = model[0]
    adapter = layer.adapter("default")
    weight = layer.base.weight + adapter.scaling * adapter.form.compose(adapter.factors, adapter.geometry)
    matrix = weight.detach().transpose(0, 0 if axis == "out" else 1).flatten(1)
    norm = torch.stack([(row * row).sum().sqrt() for row in matrix])
    return adapter.magnitude * weight / norm.view(adapter.magnitude.shape)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradients_are_those_of_the_formula(method: str, axis: str, kind: str) -> None:
    layer, x = sample(kind, torch.float64)
    model = decomposed(layer, method, axis)
    adapter = adapters_of(model)["0"]
    with torch.no_grad():
        adapter.magnitude.mul_(torch.rand_like(adapter.magnitude) + 0.5)
    expected = torch.func.functional_call(model[0].base, {"weight": by_formula(model, axis)}, x)
    out = model(x)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    parameters = list(adapter.parameters())
    for ours, plain in zip(
        torch.autograd.grad(out, parameters, direction),
        torch.autograd.grad(expected, parameters, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


def test_magnitudes_start_as_the_norms_of_the_base_and_change_nothing() -> None:
    layer, x = sample("grouped")
    for axis, shape, others in (("out", (6, 1, 1, 1), (1, 2, 3)), ("in", (1, 2, 1, 1), (0, 2, 3))):
        model = decomposed(layer, "loha", axis, init_weights="peft")
        magnitude = adapters_of(model)["0"].magnitude
        assert tuple(magnitude.shape) == shape
        torch.testing.assert_close(magnitude.detach(), layer.weight.detach().pow(2).sum(others, True).sqrt())
        torch.testing.assert_close(model(x), layer(x), rtol=0, atol=0)


def test_a_magnitudes_shape_says_its_axis() -> None:
    for shape in ((8, 6), (8, 6, 3), (8, 6, 3, 3), (1, 6)):
        assert axis_of(magnitude_shape(shape, "out")) == "out"
        assert axis_of(magnitude_shape(shape, "in")) == "in"


def test_the_scale_goes_from_the_base_to_dora() -> None:
    layer, x = sample("linear")
    model = decomposed(layer, "lora", "out")
    base, whole = layer(x), model(x)
    set_scale(model, 0.25)
    torch.testing.assert_close(model(x), base + 0.25 * (whole - base))
    set_scale(model, 0)
    torch.testing.assert_close(model(x), base)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_weights_size_is_kept_for_backward(method: str, axis: str) -> None:
    model = decomposed(nn.Linear(64, 64), method, axis)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.randn(2, 64, requires_grad=True))
    assert sum(kept) < 64 * 64
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in adapters_of(model)["0"].parameters())


def test_a_dead_output_gives_no_nan() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    model = decomposed(layer, "lora", "out")
    out = model(torch.randn(2, 3))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weight_is_the_formula_rounded_once(axis: str, dtype: torch.dtype) -> None:
    for method in METHODS:
        for kind in LAYERS:
            layer, x = sample(kind, dtype)
            model = decomposed(layer, method, axis)
            before = model[0].base.weight
            exact = copy.deepcopy(model).double()
            expected = by_formula(exact, axis)
            out = model(x)
            merge(model)
            error = (model[0].base.weight.double() - expected).abs()
            # Half a unit in the last place, and what float64 itself leaves open.
            assert (error <= (0.5001 * torch.finfo(dtype).eps) * expected.abs() + 1e-15).all(), (method, kind)
            torch.testing.assert_close(model(x), out, rtol=0.05, atol=0.1 if dtype == torch.bfloat16 else 1e-4)
            unmerge(model)
            assert model[0].base.weight is before


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.conv(x)).flatten(1))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_is_that_of_peft(mode: str) -> None:
    base = Two().double()
    ours = inject(copy.deepcopy(base), LoRA(target_modules=["conv", "linear"], rank=2, alpha=3, weight_decompose="out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.LoraConfig(target_modules=["conv", "linear"], r=2, lora_alpha=3, use_dora=True)
        theirs = peft.inject_adapter_in_model(wanted, base).double()
    factors = {f"{path}.{n}": p for path, a in adapters_of(ours).items() for n, p in a.named_parameters()}
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for path, parameter in theirs.named_parameters():
        if ".default" in path:
            key = path.replace(".default.weight", "").replace("lora_magnitude_vector", "magnitude")
            pairs.append((factors.pop(key), parameter))
            if "magnitude" in key:
                torch.testing.assert_close(pairs[-1][0].flatten(), parameter.flatten())
            value = torch.rand_like(parameter) + 0.5
            parameter.data.copy_(value)
            pairs[-1][0].data.copy_(value.view(pairs[-1][0].shape))
    assert not factors
    x = torch.randn(3, 2, 4, 4).double()
    out, expected = ours.train(mode == "train")(x), theirs.train(mode == "train")(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    for our, their in pairs:
        torch.testing.assert_close(our.grad.flatten(), their.grad.flatten(), rtol=1e-10, atol=1e-10)
