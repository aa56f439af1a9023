"""Weight decomposition: directions from the adapted weight, magnitudes of their own (DoRA)."""

from typing import Literal, cast

import torch
from torch import Tensor

from lowrank_core.adapters.geometry import Shape

Axis = Literal["out", "in"]


def magnitude_shape(weight_shape: Shape, axis: Axis) -> Shape:
    """`(out, 1, ...)` or `(1, in, ...)`: LyCORIS's shapes, which say the axis and broadcast against the weight."""
    ones = (1,) * len(weight_shape)
    return (weight_shape[0], *ones[1:]) if axis == "out" else (1, weight_shape[1], *ones[2:])


def axis_of(shape: Shape) -> Axis:
    """The axis that a magnitude's shape says; a single number counts as an output's."""
    return "in" if shape[0] == 1 and len(shape) > 1 and shape[1] > 1 else "out"


def weight_norm(weight: Tensor, axis: Axis) -> Tensor:
    """‖W‖ over all but one axis, of `magnitude_shape`; never 0, so that a dead output divides by something."""
    kept = 0 if axis == "out" else 1
    others = [d for d in range(weight.dim()) if d != kept]
    norm = cast(Tensor, torch.linalg.vector_norm(weight, dim=others, keepdim=True))  # pyright: ignore[reportUnknownMemberType]
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def decomposed_change(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA adds to the weight W where the adapter alone would add D: m ⊙ (W + D) / ‖W + D‖ - W.

    weight, delta: `(out, in / groups, *kernel)`; magnitude: `magnitude_shape` of either axis. The norm is a constant to
    the gradient, as in section 4.3 of the paper and in PEFT, so gradients reach delta and magnitude alone through the
    product. Costs the composed weight, and saves tensors of its size for backward.

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353
    """
    scale = magnitude / weight_norm((weight + delta).detach(), axis_of(tuple(magnitude.shape)))
    # Not m ⊙ (W + D) / ‖W + D‖ minus W: where the magnitude is the norm itself this gives D to the bit.
    return (scale - 1) * weight + scale * delta
