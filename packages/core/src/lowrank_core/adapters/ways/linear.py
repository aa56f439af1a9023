"""A frozen linear layer in the autograd nodes written by hand."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`(..., in)` to `(positions, out)`."""
    flat = x.reshape(-1, x.shape[-1])
    return torch.mm(flat, weight.T) if bias is None else torch.addmm(bias, flat, weight.T)


def unflattened(out: Tensor, x: Tensor) -> Tensor:
    """`(positions, out)` as `(..., out)`, with the positions of `x`.

    Not by a view, because what follows a layer may work in place, an activation for example, and autograd forbids that
    on a view that such a node returns.
    """
    return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])
