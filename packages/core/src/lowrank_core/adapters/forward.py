"""An adapted layer's output: the base layer's and the adapter's, by the cheapest exact way."""

import torch.nn.functional as F
from torch import Tensor

from lowrank_core.adapters.forms import Factors, Form
from lowrank_core.adapters.geometry import Geometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def delta(x: Tensor, form: Form, factors: Factors, scale: float, geometry: Geometry) -> Tensor:
    """scale · ΔW applied to a layer's input, without bias, in the input's dtype; differentiable.

    x is what the layer takes: `(..., in)`, `(batch, in, *positions)` for a convolution, integer ids for an embedding.
    """
    weight = (scale * form.compose(factors, geometry)).to(x.dtype if x.is_floating_point() else None)
    return apply_weight(x, weight, None, geometry)


def adapted(
    x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, factors: Factors, scale: float, geometry: Geometry
) -> Tensor:
    """The output of the layer `(weight, bias)`, weight as `geometry.weight_shape` and frozen, plus `delta`."""
    return apply_weight(x, weight, bias, geometry) + delta(x, form, factors, scale, geometry)


def apply_weight(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """What a layer of this geometry does with a weight of `geometry.weight_shape`."""
    if geometry.kind == "linear":
        return F.linear(x, weight, bias)
    if geometry.kind == "embedding":
        return F.embedding(x, weight.T)
    convolve = _CONV[len(geometry.kernel)]
    return convolve(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
