"""The papers' formulas written out plainly, index by index, to hold the fast code against."""

import torch
from torch import Tensor

from lowrank_core.factorizations import Factorization, Kronecker, LowRank, Svd


def plain_term(x: Tensor, y: Tensor, t: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """X Yᵀ, or T ×₁ X ×₂ Y (FedPara, Proposition 3)."""
    if t is None:
        return torch.einsum("or,ir->oi", x, y).reshape(shape)
    return torch.einsum("op,iq,pqhw->oihw", x, y, t)


def plain_weight(factorization: Factorization, factors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The weight of any factorization by its definition."""
    if isinstance(factorization, LowRank):
        return plain_term(factors["x"], factors["y"], factors.get("t"), shape)
    if isinstance(factorization, Svd):
        return torch.einsum("or,r,ri->oi", *factors.values()).reshape(shape)
    if isinstance(factorization, Kronecker):
        pairs = zip(factors["w1"], factors["w2"], strict=True)
        kernel = [1] * (len(shape) - 2)  # torch.kron multiplies along every dimension
        return sum(torch.kron(w1.reshape(*w1.shape, *kernel), w2) for w1, w2 in pairs)
    first = plain_term(factors["x1"], factors["y1"], factors.get("t1"), shape)
    second = plain_term(factors["x2"], factors["y2"], factors.get("t2"), shape)
    if factorization.tanh:
        return torch.tanh(first) * torch.tanh(second)
    if factorization.plus_one:
        return first * (second + 1)
    return first * second
