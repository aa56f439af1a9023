"""ΔW = up · down applied as two small products, without ΔW: LoRA's way, AdaLoRA's, and LoHa's through Khatri-Rao.

The pair is built anew in backward, so that between the passes only the input, the hidden activation and the factors
are held. Cost of a training step beyond the frozen base's, for T inputs and R = the pair's rank: 6·T·R·(out + in·K).
"""

# autograd.Function's context is untyped.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUnknownMemberType=false

from typing import Any

import torch
from torch import Tensor

from lowrank_core.adapters.forms import AdaLoRAForm, Form, LoHaForm
from lowrank_core.adapters.forms.loha import khatri_rao
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.convolution import convolve, input_gradient, pointwise, weight_gradient
from lowrank_core.adapters.ways.linear import linear, unflattened

Tensors = tuple[Tensor, ...]


def build(form: Form, factors: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The pair, `(out, R)` and `(R, in·K)`, in the dtype it is used in; products are formed in the factors' own."""
    if isinstance(form, LoHaForm):
        up, down = khatri_rao(*factors)
    elif isinstance(form, AdaLoRAForm):
        a, up, e = factors
        down = e * a
    else:
        down, up = (factor.flatten(1) for factor in factors)
    return up.to(dtype), down.to(dtype)


def build_backward(form: Form, factors: Tensors, up: Tensor, down: Tensor) -> Tensors:
    """The factors' gradients from those of up and down."""
    up, down = up.to(factors[0].dtype), down.to(factors[0].dtype)
    if isinstance(form, LoHaForm):
        a1, b1, a2, b2 = factors
        rank = a1.shape[1]
        up, down = up.view(-1, rank, rank), down.view(rank, rank, -1)
        return (
            torch.bmm(up, a2.unsqueeze(2)).squeeze(2),
            (down * b2.unsqueeze(0)).sum(1),
            torch.bmm(a1.unsqueeze(1), up).squeeze(1),
            (down * b1.unsqueeze(1)).sum(0),
        )
    if isinstance(form, AdaLoRAForm):
        a, _, e = factors
        return e * down, up, (down * a).sum(1, keepdim=True)
    return down.view_as(factors[0]), up.view_as(factors[1])


class PairLinear(torch.autograd.Function):
    """x Wᵀ + bias + scale · (x downᵀ) upᵀ in one node; without W, the last term alone. W is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, scale: float, *factors: Tensor
    ) -> Tensor:
        up, down = build(form, factors, x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat @ down.T
        if weight is None:
            out = hidden @ (scale * up).T
        else:
            out = linear(flat, weight, bias).addmm_(hidden, up.T, alpha=scale)
        ctx.form, ctx.scale, ctx.shape = form, scale, x.shape
        ctx.save_for_backward(flat, hidden, weight, *factors)
        return unflattened(out, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, hidden, weight, *factors = ctx.saved_tensors
        up, down = build(ctx.form, tuple(factors), flat.dtype)
        grad = grads[0].reshape(-1, up.shape[0])
        towards = grad @ (ctx.scale * up)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = towards @ down if weight is None else (grad @ weight).addmm_(towards, down)
            grad_x = grad_x.view(ctx.shape)
        gradients = build_backward(ctx.form, tuple(factors), ctx.scale * (grad.T @ hidden), towards.T @ flat)
        return grad_x, None, None, None, None, *gradients


class PairConv(torch.autograd.Function):
    """The same for a convolution: the kernel's pixels in `down`, 1x1 in `up`, group by group."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        form: Form,
        scale: float,
        geometry: Geometry,
        *factors: Tensor,
    ) -> Tensor:
        up, down = _kernels(form, factors, geometry, x.dtype)
        hidden = convolve(x, down, None, geometry)
        out = pointwise(hidden, scale * up, geometry.groups)
        if weight is not None:
            out = convolve(x, weight, bias, geometry).add_(out)
        ctx.form, ctx.scale, ctx.geometry = form, scale, geometry
        ctx.save_for_backward(x, hidden, weight, *factors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight, *factors = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        groups = geometry.groups
        up, down = _kernels(ctx.form, tuple(factors), geometry, x.dtype)
        last = _pointwise_geometry(geometry, hidden.shape[1])
        towards = input_gradient(grads[0], hidden, ctx.scale * up, last)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(towards, x, down, geometry)
            if weight is not None:
                grad_x = input_gradient(grads[0], x, weight, geometry).add_(grad_x)
        grad_up = ctx.scale * weight_gradient(grads[0], hidden, up, last).flatten(1)
        # Every group has the same `down`.
        grad_down = weight_gradient(towards, x, down, geometry).flatten(1).unflatten(0, (groups, -1)).sum(0)
        gradients = build_backward(ctx.form, tuple(factors), grad_up, grad_down)
        return grad_x, None, None, None, None, None, *gradients


def _kernels(form: Form, factors: Tensors, geometry: Geometry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The pair as kernels, `(out, R, *ones)` and `(groups·R, in, *kernel)`."""
    up, down = build(form, factors, dtype)
    ones = (1,) * len(geometry.kernel)
    down = down.view(-1, geometry.in_features // geometry.groups, *geometry.kernel)
    return up.view(*up.shape, *ones), down.repeat(geometry.groups, *(1,) * (down.dim() - 1))


def _pointwise_geometry(geometry: Geometry, channels: int) -> Geometry:
    dimensions = len(geometry.kernel)
    ones, zeros = (1,) * dimensions, (0,) * dimensions
    return Geometry("conv", geometry.out_features, channels, ones, ones, zeros, ones, geometry.groups)
