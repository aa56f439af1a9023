"""Every adapter on every layer by every way: values and gradients are those of the plain formula."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_forms import FORMS
from torch import Tensor, nn
from torch.autograd import gradcheck

from lowrank_core.adapters.forms import Form, LoHaForm, LoKrForm, LoRAForm
from lowrank_core.adapters.forward import adapted, apply_weight, delta
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.choice import cheapest_way, possible_ways

pytestmark = pytest.mark.usefixtures("on_device")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 8),
    "linear without bias": lambda: nn.Linear(6, 8, bias=False),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv2d strided and dilated": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
    "conv2d same": lambda: nn.Conv2d(4, 6, (5, 3), padding="same"),
    "conv2d same, more on one side": lambda: nn.Conv2d(4, 6, (4, 2), padding="same"),
    "conv2d grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv2d 1x1": lambda: nn.Conv2d(4, 6, 1),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
}
SCALE = 0.7  # alpha differs from the rank


def case(layer: str, form: Form, dtype: torch.dtype) -> tuple[Any, Geometry, Tensor, dict[str, Tensor]]:
    module = LAYERS[layer]().to(dtype).requires_grad_(False)
    geometry = Geometry.of(module)
    assert geometry is not None
    shape = (2, 3, 6) if geometry.kind == "linear" else (2, geometry.in_features, *(5,) * len(geometry.kernel))
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    rank = 1 if isinstance(form, LoKrForm) else 2
    factors = {
        name: torch.randn(size, dtype=dtype, requires_grad=True) for name, size in form.shapes(geometry, rank).items()
    }
    return module, geometry, x, factors


def plain(module: nn.Module, geometry: Geometry, form: Form, x: Tensor, factors: dict[str, Tensor]) -> Tensor:
    return module(x) + apply_weight(x, SCALE * form.compose(factors, geometry), None, geometry)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("layer", "name"), list(itertools.product(LAYERS, FORMS)))
def test_every_way_has_the_plain_formulas_values_and_gradients(layer: str, name: str) -> None:
    form = FORMS[name]
    module, geometry, x, factors = case(layer, form, torch.float64)
    expected = plain(module, geometry, form, x, factors)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *factors.values()])
    for way in possible_ways(form, factors, geometry, x.dtype):

        def run(x: Tensor, *tensors: Tensor, way: Any = way) -> Tensor:
            given = dict(zip(factors, tensors, strict=True))
            return adapted(x, module.weight, module.bias, form, given, SCALE, geometry, way=way)

        out = run(x, *factors.values())
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad((out * weights).sum(), [x, *factors.values()])
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        assert gradcheck(run, (x, *factors.values()), fast_mode=True)
        alone = delta(x, form, factors, SCALE, geometry, way=way)
        torch.testing.assert_close(alone, expected - module(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("layer", "name"), list(itertools.product(["linear", "conv2d"], FORMS)))
def test_what_follows_may_work_in_place(layer: str, name: str) -> None:
    form = FORMS[name]
    module, geometry, x, factors = case(layer, form, torch.float64)
    inputs = [x, x[0]] if layer == "linear" else [x]
    for given in inputs:
        expected = plain(module, geometry, form, given, factors).relu()
        wanted = torch.autograd.grad(expected.sum(), [*factors.values()])
        for way in possible_ways(form, factors, geometry, x.dtype):
            out = adapted(given, module.weight, module.bias, form, factors, SCALE, geometry, way=way).relu_()
            gradients = torch.autograd.grad(out.sum(), [*factors.values()])
            for got, want in zip([out, *gradients], [expected, *wanted], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", FORMS)
def test_pictures_may_be_channels_last(name: str) -> None:
    form = FORMS[name]
    module, geometry, x, factors = case("conv2d", form, torch.float64)
    expected = plain(module, geometry, form, x, factors)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *factors.values()])
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = module.weight.contiguous(memory_format=torch.channels_last)
    for way in possible_ways(form, factors, geometry, x.dtype):
        out = adapted(x, weight, module.bias, form, factors, SCALE, geometry, way=way)
        gradients = torch.autograd.grad(out.square().sum(), [x, *factors.values()])
        for got, want in zip([out, *gradients], [expected, *wanted], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("layer", "name"), list(itertools.product(["linear", "conv2d"], FORMS)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_agrees_to_its_rounding(layer: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    form = FORMS[name]
    module, geometry, x, factors = case(layer, form, torch.float64)
    exact = plain(module, geometry, form, x, factors)
    lower = {key: factor.float() for key, factor in factors.items()}  # float32 factors on a base of `dtype`
    module = module.to(dtype)
    for way in possible_ways(form, lower, geometry, dtype):
        out = adapted(x.to(dtype), module.weight, module.bias, form, lower, SCALE, geometry, way=way)
        assert out.dtype == dtype
        assert (out.double() - exact).norm() <= tolerance * exact.norm(), way


def test_merging_with_the_base_is_no_way_for_low_precision() -> None:
    module, geometry, _, factors = case("linear", LoHaForm(), torch.float32)
    assert "merged" in possible_ways(LoHaForm(), factors, geometry, torch.float32)
    assert "merged" not in possible_ways(LoHaForm(), factors, geometry, torch.bfloat16)
    assert module.weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "name"), list(itertools.product(["linear", "conv2d"], FORMS)))
def test_every_way_traces_without_a_break(layer: str, name: str) -> None:
    form = FORMS[name]
    module, geometry, x, factors = case(layer, form, torch.float32)
    for way in possible_ways(form, factors, geometry, x.dtype):
        torch.compiler.reset()

        def run(x: Tensor, factors: dict[str, Tensor], way: Any = way) -> Tensor:
            return adapted(x, module.weight, module.bias, form, factors, SCALE, geometry, way=way)

        traced = torch.compile(run, backend="aot_eager", fullgraph=True)
        gradients = [
            torch.autograd.grad(function(x, factors).square().sum(), [x, *factors.values()])
            for function in (traced, run)
        ]
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_autocast_runs_the_whole_layer_in_its_dtype(device: torch.device) -> None:
    module, geometry, x, factors = case("linear", LoHaForm(), torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = adapted(x, module.weight, module.bias, LoHaForm(), factors, SCALE, geometry)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), [x, *factors.values()])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_a_base_that_is_trained_gets_its_gradient() -> None:
    module, geometry, x, factors = case("linear", LoHaForm(), torch.float64)
    module.requires_grad_(True)
    adapted(x, module.weight, module.bias, LoHaForm(), factors, SCALE, geometry).sum().backward()
    torch.testing.assert_close(module.weight.grad, x.detach().flatten(0, 1).sum(0).expand(8, 6))


def test_embedding_rows_are_those_of_the_composed_table() -> None:
    table, geometry = nn.Embedding(10, 4), Geometry("embedding", 4, 10, transposed=True)
    assert Geometry.of(table) == geometry
    factors = {name: torch.randn(size) for name, size in LoRAForm().shapes(geometry, 3).items()}
    ids = torch.tensor([[1, 7], [0, 1]])
    composed = LoRAForm().compose(factors, geometry)
    torch.testing.assert_close(delta(ids, LoRAForm(), factors, SCALE, geometry), SCALE * composed.T[ids])


@pytest.mark.parametrize(("rank", "way"), [(4, "pair"), (8, "pair"), (16, "pair"), (32, "merged")])
def test_small_ranks_go_as_a_pair_and_large_ones_with_the_base(rank: int, way: str) -> None:
    geometry = Geometry("linear", 1280, 1280)
    shapes = LoHaForm().shapes(geometry, rank)
    factors = {name: torch.empty(size, device="meta") for name, size in shapes.items()}
    x = torch.empty(1, 1024, 1280, device="cpu")
    assert cheapest_way(LoHaForm(), factors, geometry, x) == way


def test_a_pair_holds_little_more_than_its_input_between_the_passes() -> None:
    """LoHa of rank 8 against LoRA of rank 16, 1024 inputs to a layer of 1280: at most 1.15 times the bytes."""

    def held(form: Form, rank: int) -> int:
        layer, geometry = nn.Linear(1280, 1280).requires_grad_(False), Geometry("linear", 1280, 1280)
        shapes = form.shapes(geometry, rank)
        factors = {name: nn.Parameter(torch.randn(size)) for name, size in shapes.items()}
        own = {layer.weight.data_ptr(), *(factor.data_ptr() for factor in factors.values())}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            adapted(torch.randn(1024, 1280), layer.weight, layer.bias, form, factors, 1.0, geometry, way="pair")
        return sum(sizes.values())

    assert held(LoHaForm(), 8) <= 1.15 * held(LoRAForm(), 16)
