"""The penalty that keeps directions apart, and its gradient without autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

Oriented = tuple[Tensor, int]
"""A factor and the dimension that counts its directions."""


def orthogonality(factors: Sequence[Oriented]) -> Tensor:
    """The mean over factors of ‖A Aᵀ - I‖_F, with the directions as the rows of A; differentiable."""
    return torch.stack([_norm(_excess(_rows(factor, dim))) for factor, dim in factors]).mean()


@torch.no_grad()
def add_orthogonality_gradient(factors: Sequence[Oriented], weight: float, loss_scale: Tensor | None = None) -> None:
    """Add the gradient of weight · `orthogonality(factors)` to the factors' own.

    With G = A Aᵀ - I, the gradient of ‖G‖_F is 2 G A / ‖G‖_F, and zero where G is. It costs 2r² multiply-adds a
    number of A. Factors without a gradient are left without one, so that what the loss does not reach stays.

    loss_scale: what a gradient scaler multiplied the gradients by, where the optimizer is yet to divide by it.
    """
    for factor, dim in factors:
        if factor.grad is None or not factor.numel():
            continue
        rows = _rows(factor, dim).to(torch.promote_types(factor.dtype, torch.float32))
        excess = _excess(rows)
        norm = _norm(excess)
        gradient = torch.where(norm > 0, 2 * weight / len(factors) / norm, 0) * (excess @ rows)
        if loss_scale is not None:
            gradient = gradient * loss_scale.to(gradient.device)
        factor.grad += _rows(gradient, dim).to(factor.grad.dtype)


def _rows(factor: Tensor, dim: int) -> Tensor:
    return factor if dim == 0 else factor.T


def _excess(rows: Tensor) -> Tensor:
    return rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)


def _norm(matrix: Tensor) -> Tensor:
    return matrix.square().sum().sqrt()
