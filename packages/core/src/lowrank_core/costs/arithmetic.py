"""The arithmetic a method adds to a forward pass and to a training step of a traced model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from lowrank_core.adapters.config import AdapterConfig
from lowrank_core.adapters.forms import Form, LoHaForm, LoKrForm
from lowrank_core.adapters.forward import apply_weight
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.targets import find_targets
from lowrank_core.adapters.ways.choice import cheapest_way, estimate
from lowrank_core.costs.report import CostReport
from lowrank_core.costs.trace import CountFlops, ForwardCost, Shape, flops_of
from lowrank_core.factorizations import Factorization
from lowrank_core.layers import FactorizedConv2d, FactorizedLinear
from lowrank_core.replacement import factorization_of


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of one forward of one example, a multiply-add as two."""

    original: int
    forward: int
    """With the method, what composes weights included."""
    composing: int
    """Of `forward`, what a batch pays once, however many examples it has."""
    training_overhead: float | None
    """A training step's arithmetic by the cost model, relative to the step without the method, minus 1: for an adapter
    the step of the frozen base, for factorized layers the original's. None where the model does not cover the method.
    """


def arithmetic_of_factorized(model: nn.Module, report: CostReport, cost: ForwardCost, batch_size: int) -> Arithmetic:
    """Of factorized layers. A step is three times its forward: the inputs' and the weights' gradients cost one each."""
    factorization = factorization_of(report.method)
    forward, composing = cost.flops, 0
    for entry in report.layers:
        module_name = entry.name if entry.type != "LSTM" else entry.name.rpartition(".")[0]
        call = cost.layers.get(module_name)
        if call is None:
            continue
        geometry = Geometry.of(model.get_submodule(module_name))
        for shape in call.inputs:
            if geometry is None:  # an LSTM composes each of its weights
                composing += _composed(factorization, entry.shape, entry.rank)
            else:
                changed, composed = _factorized(factorization, geometry, entry.rank, shape)
                forward, composing = forward + changed, composing + composed
    step = forward + composing / batch_size
    return Arithmetic(cost.flops, forward + composing, composing, step / cost.flops - 1 if cost.flops else None)


def arithmetic_of_adapter(model: nn.Module, config: AdapterConfig, cost: ForwardCost, batch_size: int) -> Arithmetic:
    """Of an adapter. The frozen base's step is twice its forward; what the adapter adds is `ways.choice.estimate`."""
    forward, composing, added = cost.flops, 0, 0
    decomposed = config.weight_decompose is not None
    for target in find_targets(model, config):
        call = cost.layers.get(target.name)
        if call is None:
            continue
        for shape in call.inputs:
            applied, composed = _added(config.form, decomposed, target.geometry, target.rank, shape)
            forward, composing = forward + applied, composing + composed
            if not decomposed:
                added += _estimated(config.form, target.geometry, target.rank, (batch_size * shape[0], *shape[1:]))
    covered = not decomposed and cost.flops > 0
    overhead = added / (2 * batch_size * cost.flops) if covered else None
    return Arithmetic(cost.flops, forward + composing, composing, overhead)


@lru_cache
def _composed(factorization: Factorization, shape: Shape, rank: int) -> int:
    factors = _on_meta(factorization.shapes(shape, rank))
    return flops_of(lambda: factorization.compose(factors, shape))


@lru_cache(maxsize=4096)
def _factorized(factorization: Factorization, geometry: Geometry, rank: int, input: Shape) -> tuple[int, int]:
    """What a factorized layer's forward has more than the original's, and what of it composes the weight."""
    x, weight = torch.empty(input, device="meta"), torch.empty(geometry.weight_shape, device="meta")
    original = flops_of(lambda: apply_weight(x, weight, None, geometry))
    layer = _layer(factorization, geometry, rank)
    whole, composed = flops_of(lambda: layer(x)), _composed(factorization, geometry.weight_shape, rank)
    # A layer that applies its factors one after the other composes nothing.
    return (0, composed) if whole == original + composed else (whole - original, 0)


def _layer(factorization: Factorization, geometry: Geometry, rank: int) -> nn.Module:
    device, sizes = torch.device("meta"), (geometry.in_features, geometry.out_features)
    if geometry.kind == "linear":
        return FactorizedLinear(*sizes, factorization, rank=rank, bias=False, device=device)
    return FactorizedConv2d(
        *sizes,
        _pair(geometry.kernel),
        factorization,
        rank=rank,
        stride=_pair(geometry.stride),
        padding=geometry.padding if isinstance(geometry.padding, str) else _pair(geometry.padding),
        dilation=_pair(geometry.dilation),
        groups=geometry.groups,
        bias=False,
        device=device,
    )


def _pair(sizes: Shape) -> tuple[int, int]:
    first, second = sizes
    return first, second


@lru_cache(maxsize=4096)
def _added(form: Form, decomposed: bool, geometry: Geometry, rank: int, input: Shape) -> tuple[int, int]:
    """What the adapter's cheapest way adds to a forward: FLOPs that grow with the batch, and those of composing."""
    if geometry.kind == "embedding":
        return 2 * math.prod(input) * rank * geometry.out_features, 0
    x, weight = _input(geometry, input), torch.empty(geometry.weight_shape, device="meta")
    factors = _on_meta(form.shapes(geometry, rank))
    layer = flops_of(lambda: apply_weight(x, weight, None, geometry))
    if decomposed:
        return layer, flops_of(lambda: form.compose(factors, geometry))
    with torch.no_grad():
        way = cheapest_way(form, factors, geometry, x)
    outputs, inputs = geometry.matrix_shape
    positions = layer // (2 * outputs * inputs)
    if way == "pair":
        middle = rank * rank if isinstance(form, LoHaForm) else rank
        # Every group has a middle of its own.
        return 2 * positions * middle * (inputs * geometry.groups + outputs), 0
    if way == "factors":
        return _of_factors(form, factors, geometry, positions, math.prod(input) // geometry.in_features)
    return layer if way == "dense" else 0, flops_of(lambda: form.compose(factors, geometry))


def _of_factors(
    form: Form, factors: Mapping[str, Tensor], geometry: Geometry, positions: int, input_positions: int
) -> tuple[int, int]:
    """Of one factor after the other: LoKr's two sides, the second composed first, or LoRA's through a Tucker core."""
    if not isinstance(form, LoKrForm):
        rank, core = factors["lora_mid"].shape[0], factors["lora_mid"].numel()
        widened = positions * (core + rank * geometry.out_features)
        return 2 * (input_positions * rank * geometry.in_features + widened), 0
    with CountFlops() as sides:
        first, second = form.sides(factors, geometry)
    (a, c), (b, d), pixels = first.shape, second.shape[:2], math.prod(geometry.kernel)
    products = c * b * (d * pixels + a)
    if geometry.kind == "linear":
        products = min(products, a * d * (c + b))
    return 2 * positions * products, sides.total


@lru_cache(maxsize=4096)
def _estimated(form: Form, geometry: Geometry, rank: int, input: Shape) -> int:
    if geometry.kind == "embedding":
        return 6 * math.prod(input) * rank * geometry.out_features
    x, factors = _input(geometry, input), _on_meta(form.shapes(geometry, rank))
    with torch.enable_grad():
        return estimate(cheapest_way(form, factors, geometry, x), form, factors, geometry, x, training=True)


def _input(geometry: Geometry, shape: Shape) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.int64 if geometry.kind == "embedding" else None)


def _on_meta(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
