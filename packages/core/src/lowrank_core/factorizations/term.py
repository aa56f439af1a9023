"""One low-rank term: a matrix X Yᵀ, or a convolution kernel T ×₁ X ×₂ Y (Tucker-2).

Shapes, with O = outputs, I = inputs of a group, R = rank, K = kernel sizes:
X is (O, R), Y is (I, R) and T, where the kernel is larger than one pixel, is (R, R, *K).
A 1x1 kernel is a matrix; a core tensor would be a mere change of basis there.
"""

import math
from collections.abc import Sequence

from torch import Tensor

Shape = tuple[int, ...]


def split_shape(weight_shape: Sequence[int]) -> tuple[int, int, Shape]:
    """`(out, in, *kernel)` as outputs, inputs and the kernel, which is empty for a matrix or a 1x1 kernel."""
    outputs, inputs, *kernel = weight_shape
    return outputs, inputs, tuple(kernel) if math.prod(kernel) > 1 else ()


def term_shapes(weight_shape: Sequence[int], rank: int) -> dict[str, Shape]:
    """The shapes of `x`, `y` and, for kernels, `t`."""
    outputs, inputs, kernel = split_shape(weight_shape)
    shapes: dict[str, Shape] = {"x": (outputs, rank), "y": (inputs, rank)}
    if kernel:
        shapes["t"] = (rank, rank, *kernel)
    return shapes


def compose_term(x: Tensor, y: Tensor, t: Tensor | None, weight_shape: Sequence[int]) -> Tensor:
    """The weight of one term, `(out, in, *kernel)`.

    The inputs are contracted first, on the small core, so that the large product comes out
    in the layout of a convolution's weight and needs no copy.
    Cost: R²·I·|K| + R·|W| multiply-adds.
    """
    _, inputs, _ = split_shape(weight_shape)
    if t is None:
        return (x @ y.T).view(*weight_shape)
    rank = x.shape[1]
    core = t.flatten(2).transpose(1, 2)  # (R, |K|, R): the inputs' rank last
    right = (core.reshape(-1, rank) @ y.T).view(rank, -1, inputs).transpose(1, 2)
    return (x @ right.reshape(rank, -1)).view(*weight_shape)


def full_rank(weight_shape: Sequence[int]) -> int:
    """The rank of a generic weight of this shape: min(O, I·|K|)."""
    outputs, inputs, *kernel = weight_shape
    return min(outputs, inputs * math.prod(kernel))
