"""An adapted layer's output: the base layer's and the adapter's, by the cheapest exact way."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_core.adapters.forms import Factors, Form, LoKrForm
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.choice import Way, cheapest_way
from lowrank_core.adapters.ways.convolution import convolve
from lowrank_core.adapters.ways.dense import Dense
from lowrank_core.adapters.ways.kronecker import kronecker
from lowrank_core.adapters.ways.pair import PairConv, PairLinear
from lowrank_core.adapters.ways.tucker import tucker


def delta(
    x: Tensor, form: Form, factors: Factors, scale: float, geometry: Geometry, *, way: Way | None = None
) -> Tensor:
    """The scaled ΔW applied to a layer's input, without bias, in the input's dtype; differentiable.

    x is what the layer takes: `(..., in)`, `(batch, in, *positions)` for a convolution, integer ids for an embedding.
    """
    return _output(x, None, None, form, factors, scale, geometry, way)


def adapted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: Form,
    factors: Factors,
    scale: float,
    geometry: Geometry,
    *,
    way: Way | None = None,
) -> Tensor:
    """The output of the layer `(weight, bias)` plus `delta`, in one node of the graph where the layer is frozen.

    weight has `geometry.weight_shape`. way: force one of the ways; they give the same values and gradients.
    """
    if geometry.kind == "embedding" or weight.requires_grad or (bias is not None and bias.requires_grad):
        return apply_weight(x, weight, bias, geometry) + delta(x, form, factors, scale, geometry, way=way)
    return _output(x, weight, bias, form, factors, scale, geometry, way)


def apply_weight(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """What a layer of this geometry does with a weight of `geometry.weight_shape`."""
    if geometry.kind == "linear":
        return F.linear(x, weight, bias)
    if geometry.kind == "embedding":
        return F.embedding(x, weight.T)
    return convolve(x, weight, bias, geometry)


def _output(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    factors: Factors,
    scale: float,
    geometry: Geometry,
    way: Way | None,
) -> Tensor:
    if geometry.kind == "embedding":
        up, down = factors["lora_embedding_B"], factors["lora_embedding_A"]
        return F.embedding(x, down.T) @ (scale * up).T
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            weight = None if weight is None else weight.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
            return _output(x, weight, bias, form, factors, scale, geometry, way)
    way = way or cheapest_way(form, factors, geometry, x)
    tensors = dict(factors)
    if way == "pair":
        if geometry.kind == "linear":
            return PairLinear.apply(x, weight, bias, form, scale, *tensors.values())
        return PairConv.apply(x, weight, bias, form, scale, geometry, *tensors.values())
    if way == "factors":
        if isinstance(form, LoKrForm):
            return kronecker(x, weight, bias, form, factors, scale, geometry)
        out = tucker(x, factors, scale, geometry)
        return out if weight is None else apply_weight(x, weight, bias, geometry) + out
    merged = way == "merged"
    return Dense.apply(x, weight, bias, form, scale, geometry, merged, tuple(tensors), *tensors.values())
