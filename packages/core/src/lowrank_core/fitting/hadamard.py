"""A LoHa for a weight that is given whole: (A1 B1) ⊙ (A2 B2) as near to it as steps from several starts bring it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_core.fitting.gauss_newton import Pair, improve
from lowrank_core.fitting.low_rank import leading, truncated
from lowrank_core.fitting.span import as_real, start_in_span

_TRIES = 8
_TRIES_IN_ALL = 4
_SPAN_STEPS = 150
_STEPS = 60
_NEARLY = 0.1
"""A share of ‖T‖ outside its best rank r² above which T is no product of rank r, and one start is all it gets."""
_SMALL = 1 << 16
"""Entries up to which complex starts are made in all factors at once, where r² singular vectors are all there are."""


@dataclass(frozen=True)
class HadamardFit:
    """a1, a2: `(m, r)`; b1, b2: `(r, n)`; all in float64. error: ‖T - product‖ / ‖T‖."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    error: float


def fit_hadamard(target: Tensor, rank: int, *, seed: int = 0) -> HadamardFit:
    """Factors of the rank whose Hadamard product is near to a matrix `(m, n)`, in float64 on the matrix's device.

    A matrix that is such a product is found again where m or n is some five times r² (docs/merging.md says how
    often).
    Any matrix is met at least as nearly as by its best rank-r approximation, which times a matrix of ones is a start.
    The same seed gives the same factors, up to rounding: some of torch's versions round by where numbers lie in memory.
    """
    target = target.double()
    if target.shape[0] < target.shape[1]:  # the longer side has more to say about a span
        turned = fit_hadamard(target.T, rank, seed=seed)
        return HadamardFit(turned.b1.T, turned.a1.T, turned.b2.T, turned.a2.T, turned.error)
    size = target.square().mean().sqrt()
    if not size > 0:
        zeros = target.new_zeros
        m, n = target.shape
        return HadamardFit(zeros(m, rank), zeros(rank, n), zeros(m, rank), zeros(rank, n), 0.0)
    pair, error = _best(target / size, rank, torch.Generator().manual_seed(seed))
    a1, b1 = _even(pair[0], pair[1])
    a2, b2 = _even(pair[2], pair[3])
    # Both sides of the product equally large, and the target's size in both.
    ratio = ((a1 @ b1).square().mean() / (a2 @ b2).square().mean().clamp_min(1e-300)).sqrt().sqrt()
    first, second = (size / ratio.square()).sqrt().sqrt(), (size * ratio.square()).sqrt().sqrt()
    return HadamardFit(a1 * first, b1 * first, a2 * second, b2 * second, error)


def _best(target: Tensor, rank: int, generator: torch.Generator) -> tuple[Pair, float]:
    basis = leading(target, rank**2, generator)
    # No product of rank r comes nearer than the best matrix of rank r².
    bound = float(((target - basis @ (basis.T @ target)).square().sum() / target.square().sum()).sqrt())
    good = 1.01 * bound + 1e-7
    tries = 0
    if rank**2 < min(target.shape):
        tries = _TRIES if bound < _NEARLY else 0
    elif target.numel() <= _SMALL and _is_determined(target.shape[0], target.shape[1], rank):
        tries = _TRIES_IN_ALL
    best: tuple[Pair, float] | None = None
    for _ in range(tries):
        if rank**2 < min(target.shape):
            pair = start_in_span(target, basis, rank, generator, steps=_SPAN_STEPS)
        else:
            pair = _start_in_all(target, rank, generator)
        found = improve(target, pair, steps=_STEPS, good=good)
        best = found if best is None or found[1] < best[1] else best
        if best[1] <= 1.1 * good + 1e-6:
            return best
    plain = improve(target, _plain_start(target, basis[:, :rank], rank, generator), steps=_STEPS, good=good)
    return plain if best is None or plain[1] < best[1] else best


def _is_determined(rows: int, columns: int, rank: int) -> bool:
    """Whether a matrix has more entries than a product of this rank has freedom, which leaves out changes of bases and
    the lengths of rows and columns that one term may take from the other.
    """
    return rank < min(rows, columns) and (2 * rank - 1) * (rows + columns) - 2 * rank**2 + 1 < rows * columns


def _start_in_all(target: Tensor, rank: int, generator: torch.Generator) -> Pair:
    """Complex steps in all factors, brought back to real ones."""
    (m, n), dtype = target.shape, torch.complex128
    shapes = ((m, rank), (rank, n)) * 2
    random: Any = tuple(
        torch.randn(shape, dtype=dtype, generator=generator).to(target.device) / rank**0.25 for shape in shapes
    )
    return as_real(improve(target.to(dtype), random, steps=_SPAN_STEPS, good=1e-8)[0])


def _plain_start(target: Tensor, basis: Tensor, rank: int, generator: torch.Generator) -> Pair:
    """The best approximation of the rank, times ones; the ones' other directions are open on one side."""
    (m, n), r = target.shape, basis.shape[1]
    a1, b1, b2 = target.new_zeros(m, rank), target.new_zeros(rank, n), target.new_zeros(rank, n)
    a1[:, :r], b1[:r], b2[0] = basis, basis.T @ target, 1
    a2 = torch.randn(m, rank, dtype=target.dtype, generator=generator).to(target.device)
    a2[:, 0] = 1
    return a1, b1, a2, b2


def _even(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with its singular values shared evenly between the two factors."""
    rank = up.shape[1]
    if rank > min(up.shape[0], down.shape[1]):
        return up, down
    even_up, even_down, _, _ = truncated(up, down, rank)
    return even_up, even_down
