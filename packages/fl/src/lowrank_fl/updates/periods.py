"""Periods of updates: the mean factors that end one are merged into the weights, and everybody can do that alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_fl.packing import Arrays
from lowrank_fl.updates.layers import UpdatedConv2d, UpdatedLinear, WeightUpdate


@dataclass(frozen=True)
class Updates:
    """The updates of a model by the names of their weights, `NAME.weight`, in the model's order.

    interval: after so many rounds the factors are merged and begin anew; the rounds between are a period. The first
        period, and the first round, start from the model that everybody builds.
    """

    by_weight: Mapping[str, WeightUpdate]
    weights: Mapping[str, Tensor]
    """The frozen weights, sharing memory with the model's."""
    interval: int

    @classmethod
    def of(cls, model: nn.Module, interval: int) -> "Updates | None":
        """Those of a model; None where it has none."""
        found = {n: m for n, m in model.named_modules() if isinstance(m, UpdatedLinear | UpdatedConv2d)}
        if not found:
            return None
        weights = {f"{name}.weight": module.weight.detach() for name, module in found.items()}
        return cls({f"{name}.weight": module.update for name, module in found.items()}, weights, interval)

    def period(self, finished: int) -> int:
        """The period of the round that comes after so many finished ones."""
        return finished // self.interval

    def begins(self, finished: int) -> bool:
        """Whether that round is its period's first."""
        return finished % self.interval == 0

    @property
    def names(self) -> list[str]:
        """The names of the factors among a model's arrays."""
        return [factor_name(weight, factor) for weight, own in self.by_weight.items() for factor in own.form.trained]

    def start(self, period: int) -> dict[str, Tensor]:
        """All factors as that period begins, the fixed ones too, by their names."""
        return {
            factor_name(weight, factor): value
            for weight, update in self.by_weight.items()
            for factor, value in update.start(period).items()
        }

    @torch.no_grad()
    def merged(self, weights: Arrays, factors: Arrays, period: int) -> dict[str, np.ndarray]:
        """The weights with what the factors of that period compose to; in float64, and then as the weights are.

        The same arithmetic for everybody, so that server and clients come to the same bits.
        """
        found: dict[str, np.ndarray] = {}
        for weight, update in self.by_weight.items():
            own = update.start(period)
            own |= {factor: torch.tensor(factors[factor_name(weight, factor)]) for factor in update.form.trained}
            change = update.form.compose({factor: value.double() for factor, value in own.items()})
            found[weight] = (change.numpy() + weights[weight]).astype(weights[weight].dtype)
        return found


def factor_name(weight: str, factor: str) -> str:
    """`NAME.update.u` for the factor u of `NAME.weight`."""
    return f"{weight.removesuffix('weight')}update.{factor}"
