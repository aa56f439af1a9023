"""The factorized weights of a model, composed from named arrays instead of from the model's own parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_core.factorizations import Factorization
from lowrank_core.layers.weight import FactorizedWeight

Arrays = Mapping[str, np.ndarray]
Factors = dict[str, Tensor]


@dataclass(frozen=True)
class Weight:
    """One factorized weight: its module's name, how it is written, its shape and its factors' names in their order."""

    path: str
    factorization: Factorization
    shape: tuple[int, ...]
    factors: tuple[str, ...]

    def name(self, factor: str) -> str:
        """What the factor is called among a model's arrays."""
        return f"{self.path}.{factor}"

    def read(self, arrays: Arrays) -> Factors:
        """Its factors among a model's arrays, in float64. A copy."""
        return {factor: torch.tensor(arrays[self.name(factor)], dtype=torch.float64) for factor in self.factors}

    def compose(self, factors: Mapping[str, Tensor]) -> Tensor:
        return self.factorization.compose(factors, self.shape)


def factorized_weights(model: nn.Module) -> list[Weight]:
    """Every factorized weight of a model; the arrays are those of `state_of`."""
    return [
        Weight(path, module.factorization, module.shape, tuple(module.factors))
        for path, module in model.named_modules()
        if isinstance(module, FactorizedWeight)
    ]
