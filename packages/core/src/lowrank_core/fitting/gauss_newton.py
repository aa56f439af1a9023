"""Damped Gauss-Newton steps towards a given product of two low-rank matrices, W = (A1 B1) ⊙ (A2 B2).

Alternating least squares changes one factor at a time and crawls along the valleys that the product's many equal ways
of writing make; a step in all four factors at once does not. Real factors or complex ones: `.conj()` of a real number
is itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_linalg: Any = torch.linalg  # which has no types
Pair = tuple[Tensor, Tensor, Tensor, Tensor]
"""A1 `(m, r)`, B1 `(r, n)`, A2 `(m, r)` and B2 `(r, n)`."""
Vector = Sequence[Tensor]
"""What linear problems are solved for: a tensor of unknowns or several."""

_SOLVER_STEPS = 30
_LEAST_DAMPING = 1e-12


def product(pair: Pair) -> Tensor:
    """(A1 B1) ⊙ (A2 B2)."""
    return (pair[0] @ pair[1]) * (pair[2] @ pair[3])


@dataclass
class Descent:
    """Levenberg-Marquardt's damping μ, and whether it still goes down.

    μ by Nielsen's rule: a third after a step that did as foretold; twice, four times, eight times as much after steps
    that did not (Madsen, Nielsen and Tingleff, "Methods for non-linear least squares problems", 2004, section 3.2).
    """

    damping: float = 0.1
    growth: float = 2.0
    errors: list[float] = field(default_factory=list[float])

    def takes(self, before: float, after: float, foretold: float) -> bool:
        """Whether to take a step between these squared errors; adjusts the damping."""
        self.errors.append(min(before, after))
        if not after < before:
            self.damping, self.growth = self.damping * self.growth, self.growth * 2
            return False
        ratio = min((before - after) / max(before - foretold, 1e-300), 2.0)
        self.damping = max(self.damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3), _LEAST_DAMPING)
        self.growth = 2.0
        return True

    def stuck(self, least_gain: float) -> bool:
        """Whether ten steps took less than this share of the squared error."""
        slow = len(self.errors) > 10 and self.errors[-1] > self.errors[-11] * (1 - least_gain)
        return slow or self.damping > 1e8


def improve(target: Tensor, pair: Pair, *, steps: int, good: float, least_gain: float = 1e-3) -> tuple[Pair, float]:
    """Factors nearer to `target` `(m, n)`, and ‖target - product‖ / ‖target‖. Never for the worse.

    good: a relative error at which to stop. least_gain: stop when ten steps took less than this share of the squared
        error.

    Memory: some ten matrices of the target's size, and `(m + n)·(2r)²` numbers.
    """
    norm = float(target.abs().square().sum())
    descent = Descent()
    left = target - product(pair)
    error = float(left.abs().square().sum())
    for _ in range(steps):
        change, foretold = _step(pair, left, descent.damping)
        tried: Any = tuple(factor + delta for factor, delta in zip(pair, change, strict=True))
        left_then = target - product(tried)
        error_then = float(left_then.abs().square().sum())
        if descent.takes(error, error_then, foretold):
            pair, left, error = tried, left_then, error_then
        if error <= norm * good**2 or descent.stuck(least_gain):
            break
    return pair, (error / norm) ** 0.5


def _step(pair: Pair, left: Tensor, damping: float) -> tuple[Pair, float]:
    """The change of the factors that solves (JᴴJ + μD) δ = Jᴴ left, and the squared error it would leave if the product
    were linear.

    D is the mean diagonal of JᴴJ for the A and for the B. Conjugate gradients, since JᴴJ is too large to be written
    down; each row of (A1, A2) and each column of (B1, B2) by itself, which is a system of 2r unknowns, preconditions.
    """
    a1, b1, a2, b2 = pair
    first, second = a1 @ b1, a2 @ b2

    def forward(d: Pair) -> Tensor:
        return (d[0] @ b1 + a1 @ d[1]) * second + first * (d[2] @ b2 + a2 @ d[3])

    def backward(e: Tensor) -> Pair:
        of_first, of_second = e * second.conj(), e * first.conj()
        return of_first @ b1.mH, a1.mH @ of_first, of_second @ b2.mH, a2.mH @ of_second

    rows = _blocks(b1, b2, first, second)
    columns = _blocks(a1.T, a2.T, first.T, second.T)
    of_rows, of_columns = (float(block.diagonal(dim1=1, dim2=2).real.mean()) for block in (rows, columns))
    solve_rows = damped(rows, (damping + 1e-14) * of_rows)
    solve_columns = damped(columns, (damping + 1e-14) * of_columns)
    rank = b1.shape[0]

    def precondition(d: Pair) -> Pair:
        a, b = solve_rows(torch.cat([d[0], d[2]], 1)), solve_columns(torch.cat([d[1], d[3]], 0).T).T
        return a[:, :rank], b[:rank], a[:, rank:], b[rank:]

    def normal(d: Pair) -> Pair:
        of_a1, of_b1, of_a2, of_b2 = backward(forward(d))
        rows, columns = damping * of_rows, damping * of_columns
        return of_a1 + rows * d[0], of_b1 + columns * d[1], of_a2 + rows * d[2], of_b2 + columns * d[3]

    change = conjugate_gradients(normal, precondition, backward(left))
    return change, float((left - forward(change)).abs().square().sum())


def _blocks(basis1: Tensor, basis2: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The part of JᴴJ that is one row's own, for every row: `(m, 2r, 2r)`. Bases `(r, n)`, terms `(m, n)`."""

    def block(basis: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        rank = basis.shape[0]
        pairs = (basis.conj()[:, None] * other[None]).flatten(0, 1)
        return (mask @ pairs.T).view(-1, rank, rank)

    corner = block(basis1, basis2, second.conj() * first)
    above = torch.cat([block(basis1, basis1, second.conj() * second), corner], 2)
    below = torch.cat([corner.mH, block(basis2, basis2, first.conj() * first)], 2)
    return torch.cat([above, below], 1)


def damped(blocks: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """What solves (block + damping·I) x = y for each row y of a matrix; blocks `(m, p, p)`, rows `(m, p)`."""
    identity = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    factor, _ = _linalg.cholesky_ex(blocks + max(damping, 1e-300) * identity)

    def solve(rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows[..., None], factor)[..., 0]

    return solve


def conjugate_gradients(normal: Callable[[Any], Vector], precondition: Callable[[Any], Vector], right: Vector) -> Any:
    """An approximate solution of normal(x) = right, from zero, where x is a tuple of tensors.

    Stops early when the residual, as the preconditioner measures it, is a hundredth.
    """
    x: Vector = tuple(torch.zeros_like(each) for each in right)
    residual, z = right, precondition(right)
    direction, size = z, _dot(right, z)
    goal = 1e-4 * size
    for _ in range(_SOLVER_STEPS):
        if not size > 0:
            break
        ahead = normal(direction)
        length = size / _dot(direction, ahead)
        x = tuple(a + length * b for a, b in zip(x, direction, strict=True))
        residual = tuple(a - length * b for a, b in zip(residual, ahead, strict=True))
        z = precondition(residual)
        size, before = _dot(residual, z), size
        if size < goal:
            break
        direction = tuple(a + size / before * b for a, b in zip(z, direction, strict=True))
    return x


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((x.conj() * y).sum().real) for x, y in zip(a, b, strict=True))
