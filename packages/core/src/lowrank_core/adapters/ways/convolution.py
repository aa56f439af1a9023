"""A convolution and its two gradients, for the autograd nodes written by hand."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_core.adapters.geometry import Geometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`(batch, in, *positions)` to `(batch, out, *positions)`; the number of outputs is the weight's."""
    convolution = _CONV[len(geometry.kernel)]
    return convolution(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def pointwise(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """A convolution by kernels of one pixel."""
    return _CONV[weight.dim() - 2](x, weight, groups=groups)


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return _backward(grad, x, weight, geometry, (True, False, False))[0]


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return _backward(grad, x, weight, geometry, (False, True, False))[1]


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    padded, padding = _numeric_padding(x, geometry)
    gradients = torch.ops.aten.convolution_backward(
        grad,
        padded,
        weight,
        None,
        geometry.stride,
        padding,
        geometry.dilation,
        False,
        (0,) * len(geometry.kernel),
        geometry.groups,
        wanted,
    )
    if wanted[0] and padded is not x:
        # "same" with an even kernel pads one side more: the gradient of what was padded is cut off again.
        extra = [side for total in reversed(_same(geometry)) for side in (-(total // 2), -(total - total // 2))]
        gradients = (F.pad(gradients[0], extra), gradients[1], gradients[2])
    return gradients


def _numeric_padding(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, ...]]:
    """The input and symmetric padding that mean what the layer's padding does."""
    if geometry.padding == "valid":
        return x, (0,) * len(geometry.kernel)
    if not isinstance(geometry.padding, str):
        return x, geometry.padding
    totals = _same(geometry)
    if all(total % 2 == 0 for total in totals):
        return x, tuple(total // 2 for total in totals)
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return F.pad(x, sides), (0,) * len(geometry.kernel)


def _same(geometry: Geometry) -> tuple[int, ...]:
    """Pixels that "same" padding adds along each dimension, both sides together."""
    return tuple(width * (size - 1) for width, size in zip(geometry.dilation, geometry.kernel, strict=True))
