"""Where to start from, so that a known Hadamard product is found again.

The columns of T = (A1 B1) ⊙ (A2 B2) lie in the span of the r² products a1_j ⊙ a2_k of columns of A1 and A2 (T = F B
with F their row-wise Kronecker product and B that of the columns, see `khatri_rao`). So A1 and A2 are looked for
first, for which B need not be a product: those whose F spans T's leading r² left singular vectors U. That is a problem
of (m, r²) numbers instead of (m, n), in which all directions count alike.

Complex A1 and A2: on the way from a wrong sign of an entry of A1 B1 to the right one a real product passes zero, where
it is far from any T; a complex one goes round it. Real starts find a product of rank 4 next to never, complex ones
nearly always where m is some ten times r² (see docs/merging.md).
"""

from typing import Any

import torch
from torch import Tensor

from lowrank_core.fitting.gauss_newton import Descent, Pair, Vector, conjugate_gradients, damped
from lowrank_core.fitting.low_rank import truncated

_linalg: Any = torch.linalg  # which has no types


def start_in_span(target: Tensor, basis: Tensor, rank: int, generator: torch.Generator, *, steps: int) -> Pair:
    """Real factors whose product is near `target` `(m, n)`; with luck, the factors of a product of this rank.

    basis: the target's leading rank² left singular vectors, `(m, rank²)`.
    """
    a1, a2 = match_span(basis, rank, generator, steps=steps)
    products = _products(a1, a2)
    columns = _linalg.lstsq(products, target.to(products.dtype)).solution.T.reshape(-1, rank, rank)
    # Each is b1 b2ᵀ of a column of B1 and one of B2.
    left, values, right = _linalg.svd(columns, full_matrices=False)
    root = values[:, :1].sqrt()
    return as_real((a1, (left[:, :, 0] * root).T, a2, (right[:, 0] * root).T))


def match_span(basis: Tensor, rank: int, generator: torch.Generator, *, steps: int) -> tuple[Tensor, Tensor]:
    """Complex A1 and A2, `(m, r)`, whose row-wise Kronecker product F spans `basis` `(m, r²)` as nearly as it comes.

    Minimises ‖U - F C‖ over A1 and A2, with the best C for each (variable projection, Golub and Pereyra 1973, with
    Kaufman's Jacobian).
    """
    dtype = torch.complex128
    basis = basis.to(dtype)
    shape = (basis.shape[0], rank)
    a1, a2 = (torch.randn(shape, dtype=dtype, generator=generator).to(basis.device) for _ in range(2))
    descent = Descent()
    inner, left, error = _projected(a1, a2, basis)
    for _ in range(steps):
        # What a change of row o does to row o of F C: `(m, 2r, r²)`.
        cube = inner.view(rank, rank, -1)
        slopes = torch.cat([torch.einsum("ok,jkp->ojp", a2, cube), torch.einsum("oj,jkp->okp", a1, cube)], 1)
        orthonormal, _ = _linalg.qr(_products(a1, a2))
        change, foretold = _step(slopes, orthonormal, left, descent.damping)
        tried1, tried2 = _balanced(a1 + change[:, :rank], a2 + change[:, rank:])
        found = _projected(tried1, tried2, basis)
        if descent.takes(error, found[2], foretold):
            a1, a2, (inner, left, error) = tried1, tried2, found
        if error < 1e-16 * basis.shape[1] or descent.stuck(1e-3):
            break
    return a1, a2


def _step(slopes: Tensor, orthonormal: Tensor, left: Tensor, damping: float) -> tuple[Tensor, float]:
    """A damped Gauss-Newton step of all rows of A1 and A2, `(m, 2r)`, and the squared error that it foretells."""

    def outside(rows: Tensor) -> Tensor:
        return rows - orthonormal @ (orthonormal.mH @ rows)

    def forward(d: Tensor) -> Tensor:
        return outside((d[:, None] @ slopes)[:, 0])

    def backward(e: Tensor) -> Tensor:
        return (slopes.conj() @ outside(e)[..., None])[..., 0]

    blocks = slopes.conj() @ slopes.mT
    scale = float(blocks.diagonal(dim1=1, dim2=2).real.mean())
    solve = damped(blocks, (damping + 1e-13) * scale)

    def normal(d: Vector) -> Vector:
        return (backward(forward(d[0])) + damping * scale * d[0],)

    def precondition(d: Vector) -> Vector:
        return (solve(d[0]),)

    (change,) = conjugate_gradients(normal, precondition, (backward(left),))
    return change, float((left - forward(change)).abs().square().sum())


def _projected(a1: Tensor, a2: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, float]:
    """The best C, what is left of the basis, and its square."""
    products = _products(a1, a2)
    inner = _linalg.lstsq(products, basis).solution
    left = basis - products @ inner
    return inner, left, float(left.abs().square().sum())


def _products(a1: Tensor, a2: Tensor) -> Tensor:
    return (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)


def _balanced(a1: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """With the two sides' rows of equal length; what one row gains the other loses, and their product stays."""
    lengths = [side.abs().square().sum(1, keepdim=True).clamp_min(1e-300) for side in (a1, a2)]
    ratio = (lengths[0] / lengths[1]) ** 0.25
    return a1 / ratio, a2 * ratio


def as_real(pair: Pair) -> Pair:
    """Real factors with the product of complex ones, if that is real.

    The two terms of a real product have opposite phases, and where both have been found up to the phases of whole rows
    and columns, W1 = eⁱ⁽ᶿᵒ⁺ᵠᵢ⁾ · real. The phases of W1 ⊙ W1 are then those of its leading singular vectors, doubled.
    """
    a1, b1, a2, b2 = pair
    squared = (a1 @ b1).square()
    columns = squared[squared.abs().sum(1).argmax()].conj()
    for _ in range(30):
        rows = squared @ columns
        columns = squared.mH @ (rows / rows.abs().max().clamp_min(1e-300))
    turn_rows, turn_columns = _turn(squared @ columns, -0.5), _turn(columns, 0.5)
    terms = [(a1 * turn_rows[:, None], b1 * turn_columns), (a2 * turn_rows.conj()[:, None], b2 * turn_columns.conj())]
    rank = b1.shape[0]
    real: list[Tensor] = []
    for up, down in terms:
        wide_up, wide_down = torch.cat([up.real, up.imag], 1), torch.cat([down.real, -down.imag], 0)
        real += truncated(wide_up, wide_down, rank)[:2]
    return real[0], real[1], real[2], real[3]


def _turn(numbers: Tensor, share: float) -> Tensor:
    """Numbers of size 1 with a share of the phases of these."""
    phases = torch.angle(numbers)
    return torch.polar(torch.ones_like(phases), share * phases)
