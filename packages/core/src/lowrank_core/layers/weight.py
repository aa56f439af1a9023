"""A weight held as its factors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowrank_core.factorizations import Factorization
from lowrank_core.init import Init, init_factors


class FactorizedWeight(nn.Module):
    """The factors of one weight as parameters; calling it composes the weight, shape `weight_shape`.

    Raises:
        ValueError: the rank is below 1.
    """

    def __init__(
        self,
        weight_shape: Sequence[int],
        factorization: Factorization,
        *,
        rank: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.shape = tuple(weight_shape)
        self.factorization = factorization
        self.rank = rank
        for name, shape in factorization.shapes(self.shape, rank).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: factor for name, factor in self._parameters.items() if factor is not None}

    def reset_parameters(self, init: Init = "calibrated") -> None:
        """Draw the factors anew by the initialisation of that name (`lowrank_core.init`)."""
        init_factors(self.factors, self.factorization, self.shape, init)

    def forward(self) -> Tensor:
        return self.factorization.compose(self.factors, self.shape)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, rank={self.rank}, {self.factorization}"
