"""ΔW composed and applied as a weight, composed again in backward instead of kept.

With `merged` the base's weight and ΔW are added first and applied in one product: exact where the sum rounds nothing
that matters, so only for float32 and float64. Without it ΔW has a product of its own.
"""

# autograd.Function's context is untyped.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUnknownMemberType=false

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_core.adapters.forms import Factors, Form, LoHaForm
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.convolution import convolve, input_gradient, weight_gradient
from lowrank_core.adapters.ways.kernels import compose
from lowrank_core.adapters.ways.linear import linear, unflattened

Pullback = Callable[[Tensor], tuple[Tensor, ...]]


class Dense(torch.autograd.Function):
    """The layer `(weight, bias)` plus scale · ΔW on a linear layer or a convolution; `weight` None for ΔW alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        form: Form,
        scale: float,
        geometry: Geometry,
        merged: bool,
        names: tuple[str, ...],
        *factors: Tensor,
    ) -> Tensor:
        delta = compose(form, dict(zip(names, factors, strict=True)), scale, geometry, x.dtype)
        ctx.form, ctx.scale, ctx.geometry, ctx.merged, ctx.names = form, scale, geometry, merged, names
        ctx.save_for_backward(x, weight, *factors)
        if weight is None:
            return _apply(x, delta, bias, geometry)
        if merged:
            return _apply(x, delta.add_(weight), bias, geometry)
        out = _apply(x, weight, bias, geometry)
        if geometry.kind == "linear":
            out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), delta.T)
            return out
        return out.add_(convolve(x, delta, None, geometry))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *factors = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        grad = grads[0]
        composed, pullback = compose_with_pullback(ctx.form, dict(zip(ctx.names, factors, strict=True)), geometry)
        delta = (ctx.scale * composed).to(x.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.merged and weight is not None:
                grad_x = _grad_input(grad, x, delta.add_(weight), geometry)
            else:
                grad_x = _grad_input(grad, x, delta, geometry)
                if weight is not None:
                    grad_x = grad_x.add_(_grad_input(grad, x, weight, geometry))
        grad_delta = _grad_weight(grad, x, composed, geometry).to(composed.dtype)
        return grad_x, *(None,) * 7, *pullback(grad_delta.mul_(ctx.scale))


def compose_with_pullback(form: Form, factors: Factors, geometry: Geometry) -> tuple[Tensor, Pullback]:
    """ΔW, and the function from its gradient to the factors' (which may overwrite what it is given)."""
    if isinstance(form, LoHaForm) and len(factors) == 4:
        return _hadamard_with_pullback(factors, geometry)
    names = tuple(factors)

    def composition(*tensors: Tensor) -> Tensor:
        return form.compose(dict(zip(names, tensors, strict=True)), geometry)

    return cast("tuple[Tensor, Pullback]", torch.func.vjp(composition, *factors.values()))


def _hadamard_with_pullback(factors: Factors, geometry: Geometry) -> tuple[Tensor, Pullback]:
    """By hand for flat factors: two buffers of the weight's size less than autograd would hold."""
    a1, b1, a2, b2 = factors.values()
    first, second = a1 @ b1, a2 @ b2
    composed = first * second

    def pullback(grad: Tensor) -> tuple[Tensor, ...]:
        grad = grad.reshape(first.shape)  # a kernel's may be channels last
        second.mul_(grad)  # now the gradient of the first term, and below of the second
        first.mul_(grad)
        return second @ b1.T, a1.T @ second, first @ b2.T, a2.T @ first

    return composed.view(geometry.weight_shape), pullback


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if geometry.kind == "linear":
        return unflattened(linear(x, weight, bias), x)
    return convolve(x, weight, bias, geometry)


def _grad_input(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return grad @ weight if geometry.kind == "linear" else input_gradient(grad, x, weight, geometry)


def _grad_weight(grad: Tensor, x: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
    if geometry.kind == "linear":
        return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return weight_gradient(grad, x, like.to(x.dtype), geometry)
