"""A linear layer whose weight is a composition of factors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_core.factorizations import Factorization, LowRank, Svd
from lowrank_core.layers.weight import FactorizedWeight


class FactorizedLinear(nn.Module):
    """`y = x Wᵀ + b` with W composed from factors; input `(..., in_features)`, output `(..., out_features)`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        factorization: Factorization,
        *,
        rank: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (out_features, in_features)
        self.weight = FactorizedWeight(shape, factorization, rank=rank, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.weight.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if isinstance(weight.factorization, LowRank | Svd) and weight.factorization.avoids_composing(
            weight.shape, weight.rank
        ):
            return weight.factorization.apply_linear(input, weight.factors, self.bias)
        return F.linear(input, weight(), self.bias)
