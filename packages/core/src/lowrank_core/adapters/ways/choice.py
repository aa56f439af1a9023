"""Which exact way is cheapest, told from sizes alone: no measurement, no synchronisation with a GPU.

The estimate of a step is its arithmetic plus its memory traffic, the latter times the operations a processor does while
a byte passes. Only differences between the ways count, so what all of them do (the base's own products) is left out.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lowrank_core.adapters.forms import Factors, Form, LoHaForm, LoKrForm
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.kronecker import mix_first

Way = Literal["pair", "factors", "dense", "merged"]
"""pair: ΔW as up · down, two thin products. factors: one factor after the other. dense: ΔW composed, a product of its
own. merged: base weight + ΔW composed, one product."""

# Operations per byte: two cores of a server reach some 100 GFLOP/s and 10 GB/s, an H200 600 TFLOP/s and 4 TB/s.
_BALANCE = {"cpu": 10, "cuda": 150}


def possible_ways(form: Form, factors: Factors, geometry: Geometry, dtype: torch.dtype) -> tuple[Way, ...]:
    """The ways that are exact here. `merged` needs a sum that rounds nothing away: in bfloat16 it loses most of ΔW."""
    composing: tuple[Way, ...] = ("dense", "merged") if dtype in (torch.float32, torch.float64) else ("dense",)
    if isinstance(form, LoKrForm) or "lora_mid" in factors:
        return (("factors",) if geometry.groups == 1 else ()) + composing
    if "hada_t1" in factors:
        return composing
    if geometry.kind == "conv" and not all(factor.numel() for factor in factors.values()):
        return composing  # of rank 0, as pruning may leave it: torch has no convolution to no channels
    return ("pair", *composing)


def cheapest_way(form: Form, factors: Factors, geometry: Geometry, x: Tensor) -> Way:
    """The way with the lowest estimate for this layer and this input."""
    ways = possible_ways(form, factors, geometry, x.dtype)
    if ways[0] not in ("pair", "factors"):
        return ways[-1]
    # A pair as small as LoRA's never loses to composing, and needs no estimate.
    if ways[0] == "pair" and not isinstance(form, LoHaForm):
        return "pair"
    training = torch.is_grad_enabled()
    estimates = {way: estimate(way, form, factors, geometry, x, training=training) for way in ways}
    return min(ways, key=lambda way: estimates[way])


def estimate(way: Way, form: Form, factors: Factors, geometry: Geometry, x: Tensor, *, training: bool) -> int:
    """Operations, with bytes counted as the operations that fit in their time, beyond those of the base layer."""
    outputs, inputs = geometry.matrix_shape
    inputs *= geometry.groups  # per position, every group reads its own
    positions = x.numel() // geometry.in_features // math.prod(geometry.stride)
    passes = 3 if training else 1  # forward, towards the input, towards the factors
    if way == "pair":
        rank = factors["hada_w1_a"].shape[1] ** 2 if isinstance(form, LoHaForm) else factors["lora_B"].shape[1]
        work = 2 * passes * positions * rank * (outputs + inputs)
        traffic = 2 * passes * positions * rank * geometry.groups + (outputs + inputs) * rank * 2 * passes
    elif way == "factors":
        work, traffic = _factors_cost(form, factors, geometry, positions, passes)
    else:
        # `merged` shares the base's product forward and towards the input; the factors' gradient needs one of its own.
        own_products = passes if way == "dense" else int(training)
        work = 2 * own_products * positions * outputs * inputs
        size = outputs * inputs // geometry.groups
        rank = max(factor.shape[0 if name.endswith("b") else 1] for name, factor in factors.items())
        terms = 2 if isinstance(form, LoHaForm) else 1
        work += (8 if training else 2) * terms * rank * size
        traffic = (16 if training else 5) * size
    return work + _BALANCE.get(x.device.type, 50) * x.element_size() * traffic


def _factors_cost(form: Form, factors: Factors, geometry: Geometry, positions: int, passes: int) -> tuple[int, int]:
    """Of the Kronecker product's two sides (or the Tucker core's three), one after the other."""
    outputs, inputs = geometry.matrix_shape
    if not isinstance(form, LoKrForm):
        rank = factors["lora_mid"].shape[0]
        core = factors["lora_mid"].numel()
        work = 2 * passes * positions * (rank * (geometry.in_features + outputs) + core)
        return work, 4 * passes * positions * rank
    a = (factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"]).shape[0]
    c = (factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_b"]).shape[1]
    b, d = outputs // a, inputs // c
    if geometry.kind == "linear" and mix_first(a, c, b, d):
        multiplications, written = a * d * (c + b), a * d + outputs
    else:
        multiplications, written = c * b * (d + a), c * b + outputs
    return 2 * passes * positions * multiplications, 2 * passes * positions * written
