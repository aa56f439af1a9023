"""(W1 ⊗ W2) x without the product: one side after the other, the cheaper order first."""

# autograd.Function's context is untyped.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUnknownMemberType=false

import math
from typing import Any

import torch
from torch import Tensor

from lowrank_core.adapters.forms import Factors, LoKrForm
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.convolution import convolve
from lowrank_core.adapters.ways.linear import linear, unflattened


def kronecker(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: LoKrForm,
    factors: Factors,
    scale: float,
    geometry: Geometry,
) -> Tensor:
    """The layer `(weight, bias)`, or nothing, plus the scaled ΔW, on a linear layer or an ungrouped convolution.

    With x as c blocks of d: y[a, b] = Σ_c W1[a, c] Σ_d W2[b, d] x[c, d]. Multiply-adds per position: c·b·(d·K + a), or
    on a linear layer, where that is less, a·d·(c + b) with the blocks mixed first.
    """
    first, second = (side.to(x.dtype) for side in form.sides(factors, geometry))
    if geometry.kind == "linear":
        return KroneckerLinear.apply(x, weight, bias, scale * first, second)
    (_, c), (b, d) = first.shape, second.shape[:2]
    blocks = convolve(x.reshape(x.shape[0] * c, d, *x.shape[2:]), second, None, geometry)
    mixed = (scale * first) @ blocks.reshape(x.shape[0], c, b * math.prod(blocks.shape[2:]))
    out = mixed.view(x.shape[0], geometry.out_features, *blocks.shape[2:])
    return out if weight is None else convolve(x, weight, bias, geometry) + out


def mix_first(a: int, c: int, b: int, d: int) -> bool:
    """Whether W1 goes before W2."""
    return a * d * (c + b) < c * b * (d + a)


class KroneckerLinear(torch.autograd.Function):
    """In one node with the frozen base, holding only the input: the hidden blocks are made again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, first: Tensor, second: Tensor
    ) -> Tensor:
        (a, c), (b, d) = first.shape, second.shape
        flat = x.reshape(-1, c * d)
        blocks = flat.view(-1, c, d)
        if mix_first(a, c, b, d):
            product = (first @ blocks) @ second.T
        else:
            product = first @ (blocks @ second.T)
        out = product.view(-1, a * b)
        if weight is not None:
            out = linear(flat, weight, bias).add_(out)
        ctx.shape = x.shape
        ctx.save_for_backward(flat, weight, first, second)
        return unflattened(out, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, first, second = ctx.saved_tensors
        (a, c), (b, d) = first.shape, second.shape
        blocks = flat.view(-1, c, d)
        grad = grads[0].reshape(-1, a * b)
        towards = grad.view(-1, a, b)
        if mix_first(a, c, b, d):
            mixed = first @ blocks  # (T, a, d)
            grad_mixed = towards @ second  # (T, a, d)
            grad_second = towards.flatten(0, 1).T @ mixed.flatten(0, 1)
            grad_first = torch.einsum("tad,tcd->ac", grad_mixed, blocks)
            grad_blocks = first.T @ grad_mixed if ctx.needs_input_grad[0] else None
        else:
            hidden = blocks @ second.T  # (T, c, b)
            grad_hidden = first.T @ towards  # (T, c, b)
            grad_first = torch.einsum("tab,tcb->ac", towards, hidden)
            grad_second = grad_hidden.flatten(0, 1).T @ blocks.flatten(0, 1)
            grad_blocks = grad_hidden @ second if ctx.needs_input_grad[0] else None
        grad_x = None
        if grad_blocks is not None:
            grad_x = grad_blocks.reshape(-1, c * d)
            grad_x = (grad_x if weight is None else (grad @ weight).add_(grad_x)).view(ctx.shape)
        return grad_x, None, None, grad_first, grad_second
