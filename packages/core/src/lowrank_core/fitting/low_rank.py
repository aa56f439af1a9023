"""Matrices of low rank: the best one near a product or near a whole matrix."""

from typing import Any

import torch
from torch import Tensor

_linalg: Any = torch.linalg  # which has no types

_SPARE = 8
_PASSES = 6


def truncated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of up · down of this rank, its energy, and the energy of what it leaves out.

    The singular values are those of a product of two R x R triangles, at a cost of O((out + in·K) R² + R³).
    """
    q_up, r_up = _linalg.qr(up)
    q_down, r_down = _linalg.qr(down.T)
    left, values, right = _linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = values[:rank].sqrt()
    energies = values.square()
    kept, gone = float(energies[:rank].sum()), float(energies[rank:].sum())
    return q_up @ left[:, :rank] * root, root.unsqueeze(1) * (right[:rank] @ q_down.T), kept, gone


def whole_pair(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix `(m, n)` as a product: of itself and the identity, which stands on the shorter side."""
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return (identity, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix, identity)


def leading(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The leading left singular vectors of a matrix `(m, n)`, `(m, rank)`, or fewer if it has not as many.

    By subspace iteration from a random start, which is exact where the rest is zero (Halko, Martinsson and Tropp,
    https://arxiv.org/abs/0909.4061, algorithm 4.4); by a whole decomposition where that is no more work.
    """
    smaller = min(matrix.shape)
    if 4 * (rank + _SPARE) > smaller:
        return _linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    random = torch.randn(matrix.shape[1], rank + _SPARE, dtype=matrix.dtype, generator=generator).to(matrix.device)
    basis, _ = _linalg.qr(matrix @ random)
    for _ in range(_PASSES):
        other, _ = _linalg.qr(matrix.mH @ basis)
        basis, _ = _linalg.qr(matrix @ other)
    left, _, _ = _linalg.svd(basis.mH @ matrix, full_matrices=False)
    return basis @ left[:, :rank]
