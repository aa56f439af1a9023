"""Factors whose weight is as near to a given one as alternating least squares brings them.

A weight is linear in each of its factors alone, so with the others held a factor's best change is a linear least
squares problem, and one that falls apart into small ones: a row of X, or a pixel of a core, has unknowns of its own.
Each change solves (G + ρI) δ = g, where G and g are the problem's normal equations and ρ is `RIDGE` times G's mean
diagonal: it holds the factor where it was in directions that hardly change the weight. No ρ makes a change for the
worse.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_core.factorizations import Hadamard, Kronecker, LowRank, Svd
from lowrank_core.factorizations.term import split_shape
from lowrank_fl.aggregation.weights import Factors, Weight

RIDGE = 1e-9

_LARGEST_CORE = 1024
"""A Hadamard branch's core has rank² unknowns a pixel, and rank⁴ numbers in their normal equations."""

Change = Callable[[Factors, Tensor], Tensor]
"""A factor's change, from all factors and the error that is left, both in float64."""


def refit(weight: Weight, start: Factors, target: Tensor, sweeps: int) -> Factors:
    """Factors near `start` whose composed weight is nearer to `target`, or as near; float64 all of them.

    A sweep changes each factor once, in their order. A change that rounding makes one for the worse is not taken.
    """
    factors = dict(start)
    error = target - weight.compose(factors)
    steps = changes(weight)
    for _ in range(sweeps):
        for name, change in steps.items():
            tried = factors | {name: factors[name] + change(factors, error)}
            left = target - weight.compose(tried)
            if left.norm() < error.norm():
                factors, error = tried, left
    return factors


def changes(weight: Weight) -> dict[str, Change]:
    """How each factor is changed; Svd's values are left alone, because `left` takes up any scale."""
    factorization, shape = weight.factorization, weight.shape
    if isinstance(factorization, Svd):
        return {
            "left": lambda f, error: _rows(error.flatten(1), None, f["right"].T * f["values"]),
            "right": lambda f, error: _rows(error.flatten(1).T, None, f["left"] * f["values"]).T,
        }
    if isinstance(factorization, Kronecker):
        return {
            "w1": lambda f, error: _rows(_by_blocks(error, f), None, f["w2"].flatten(1).T).T.reshape(f["w1"].shape),
            "w2": lambda f, error: _rows(_by_blocks(error, f).T, None, f["w1"].flatten(1).T).T.reshape(f["w2"].shape),
        }
    if isinstance(factorization, LowRank):
        return {name: _term(name, "", shape, lambda f: None) for name in weight.factors}
    assert not factorization.tanh, "a weight of tanh is linear in no factor"
    return {name: _term(name[0], name[1], shape, _other(factorization, name[1], shape)) for name in weight.factors}


def _by_blocks(error: Tensor, factors: Factors) -> Tensor:
    """A weight's entries in the order of Σ w1_r ⊗ w2_r: `(a·c, b·d·|K|)`, which w1ᵀ w2 is as a matrix."""
    (_, a, c), (_, b, d, *kernel) = factors["w1"].shape, factors["w2"].shape
    return error.reshape(a, b, c, d, *kernel).transpose(1, 2).reshape(a * c, -1)


def _other(factorization: Hadamard, branch: str, shape: tuple[int, ...]) -> Callable[[Factors], Tensor]:
    """What a branch of a Hadamard product is multiplied by."""

    def mask(factors: Factors) -> Tensor:
        first, second = factorization.terms(factors, shape)
        if branch == "2":
            return first
        return second + 1 if factorization.plus_one else second

    return mask


def _term(factor: str, branch: str, shape: tuple[int, ...], mask_of: Callable[[Factors], Tensor | None]) -> Change:
    """The change of one factor of a low-rank term, `(O, I, |K|)` with its pixels in a row, under a mask."""
    outputs, inputs, kernel = split_shape(shape)

    def change(factors: Factors, error: Tensor) -> Tensor:
        x, y, t = factors[f"x{branch}"], factors[f"y{branch}"], factors.get(f"t{branch}")
        error = error.reshape(outputs, inputs, -1)
        mask = mask_of(factors)
        mask = None if mask is None else mask.reshape(outputs, inputs, -1)
        if factor == "t":
            return _core(error, mask, x, y).unflatten(2, kernel)
        if factor == "x":
            basis = y if t is None else torch.einsum("rsk,is->ikr", t.flatten(2), y).flatten(0, 1)
        else:
            basis = x if t is None else torch.einsum("rsk,or->oks", t.flatten(2), x).flatten(0, 1)
            error, mask = error.transpose(0, 1), None if mask is None else mask.transpose(0, 1)
        return _rows(error.flatten(1), None if mask is None else mask.flatten(1), basis)

    return change


def _rows(error: Tensor, mask: Tensor | None, basis: Tensor) -> Tensor:
    """The δ `(N, F)` that makes mask ⊙ δ basisᵀ nearest to `error` `(N, P)`, row by row; `basis` is `(P, F)`.

    P·F² numbers under a mask, whose rows have each their own normal equations.
    """
    if mask is None:
        return torch.linalg.solve(_ridged(basis.T @ basis), (error @ basis).T).T
    pairs = (basis[:, :, None] * basis[:, None, :]).flatten(1)
    normal = (mask.square() @ pairs).unflatten(1, (basis.shape[1], -1))
    return torch.linalg.solve(_ridged(normal), ((mask * error) @ basis)[..., None])[..., 0]


def _core(error: Tensor, mask: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """The δ `(R, R, |K|)` that makes mask ⊙ (x δ_k yᵀ) nearest to `error` `(O, I, |K|)`, pixel by pixel.

    Without a mask the normal equations are a Kronecker product, which is solved side by side. A large core's under a
    mask are bounded by such a product, which makes a smaller change in the same direction.
    """
    rank = x.shape[1]
    pixels: list[Tensor] = []
    for k in range(error.shape[2]):
        seen = error[:, :, k] if mask is None else mask[:, :, k] * error[:, :, k]
        right = x.T @ seen @ y
        if mask is None or rank * rank > _LARGEST_CORE:
            bound = 1.0 if mask is None else mask[:, :, k].square().max().clamp_min(torch.finfo(x.dtype).tiny)
            half = torch.linalg.solve(_ridged(x.T @ x), right / bound)
            pixels.append(torch.linalg.solve(_ridged(y.T @ y), half.T).T)
            continue
        of_x = (x[:, :, None] * x[:, None, :]).flatten(1)
        of_y = (y[:, :, None] * y[:, None, :]).flatten(1)
        normal = (of_x.T @ mask[:, :, k].square() @ of_y).view(rank, rank, rank, rank)
        flat = normal.transpose(1, 2).reshape(rank * rank, -1)
        pixels.append(torch.linalg.solve(_ridged(flat), right.flatten()).view(rank, rank))
    return torch.stack(pixels, 2)


def _ridged(normal: Tensor) -> Tensor:
    """Normal equations `(..., F, F)` with the ridge; where they are all zero, they say that nothing is to change."""
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(normal.dtype).tiny
    return normal + torch.diag_embed(ridge.expand_as(diagonal))
