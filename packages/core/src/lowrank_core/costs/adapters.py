"""What an adapter would hold on a model, without putting it there."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lowrank_core.adapters.config import AdaLoRA, AdapterConfig, LoKr
from lowrank_core.adapters.dora import magnitude_shape
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.targets import Target, find_targets
from lowrank_core.costs.factorized import count_parameters
from lowrank_core.costs.report import CostReport, LayerCost, total
from lowrank_core.errors import LowrankError


def count_adapter(model: nn.Module, config: AdapterConfig) -> CostReport:
    """The cost of an adapter on `model`, which may be on the meta device and stays as it is.

    Layers are those of `find_targets`, sizes those of `inject` and of PEFT. What travels is the adapter.

    Raises:
        UsageError: what `find_targets` raises.
    """
    layers = tuple(_entry(target, config) for target in find_targets(model, config))
    original, trained = count_parameters(model), total(layers)
    final = [layer.final_params for layer in layers if layer.final_params is not None]
    rule = f"rank {config.rank}"
    if isinstance(config, AdaLoRA):
        rule += f" to {config.target_rank}"
    return CostReport(
        method=config.method if config.weight_decompose is None else f"{config.method}+dora",
        rule=rule,
        layers=layers,
        left=(),
        original_params=original,
        params=original + trained,
        trainable_params=trained,
        transferred_params=trained,
        final_params=sum(final) if final else None,
    )


def largest_fitting(model: nn.Module, config: AdapterConfig, budget: int) -> AdapterConfig:
    """`config` with the largest rank whose adapter holds at most `budget` parameters.

    Of ranks that hold the same, as LoKr's beyond the size of its sides, the smallest. AdaLoRA starts with that rank and
    ends with the same share of it as before.

    Raises:
        LowrankError: rank 1 holds more.
        UsageError: what `find_targets` raises.
    """
    geometries = Counter(target.geometry for target in find_targets(model, config))

    def size(rank: int) -> int:
        return sum(count * _size(config, geometry, rank) for geometry, count in geometries.items())

    if isinstance(config, LoKr):
        rank = _last_of_scan(size, max(max(geometry.weight_shape[:2]) for geometry in geometries), budget)
    else:
        # No change of a weight has a larger rank than this.
        rank = _last_of_bisection(size, max(min(geometry.matrix_shape) for geometry in geometries), budget)
    if rank == 0:
        raise LowrankError(
            f"a budget of {budget:,} parameters is below {config.method}'s smallest, {size(1):,} at rank 1; "
            "raise the budget, or adapt fewer layers"
        )
    if isinstance(config, AdaLoRA):
        share = config.target_rank / config.rank
        return replace(config, rank=rank, target_rank=max(1, round(rank * share)))
    return replace(config, rank=rank)


def _last_of_bisection(size: Callable[[int], int], limit: int, budget: int) -> int:
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low


def _last_of_scan(size: Callable[[int], int], limit: int, budget: int) -> int:
    """LoKr's size may fall where a side is no longer decomposed, and then stays."""
    fitting = [(rank, held) for rank in range(1, limit + 1) if (held := size(rank)) <= budget]
    return next((rank for rank, held in fitting if held == fitting[-1][1]), 0)


def _entry(target: Target, config: AdapterConfig) -> LayerCost:
    geometry, rank = target.geometry, target.rank
    final = _size(config, geometry, config.target_rank) if isinstance(config, AdaLoRA) else None
    reach = config.form.max_rank(geometry, rank)
    if config.weight_decompose is not None:
        reach = min(geometry.matrix_shape)  # the magnitudes scale the frozen weight too
    return LayerCost(
        name=target.name,
        type=type(target.module).__name__,
        shape=geometry.weight_shape,
        rank=rank,
        max_rank=reach,
        original_params=math.prod(geometry.weight_shape),
        params=_size(config, geometry, rank),
        final_params=final,
    )


def _size(config: AdapterConfig, geometry: Geometry, rank: int) -> int:
    factors = sum(math.prod(shape) for shape in config.form.shapes(geometry, rank).values())
    if config.weight_decompose is None:
        return factors
    return factors + math.prod(magnitude_shape(geometry.weight_shape, config.weight_decompose))
