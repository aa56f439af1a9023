"""How far the mean of factors is from the mean of weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from lowrank_fl.aggregation.weights import Factors, Weight


@dataclass(frozen=True)
class Means:
    """Of one weight, over clients i with shares p_i that sum to 1, all in float64."""

    weight: Tensor
    """Σ p_i W_i, the mean of the composed weights."""
    factors: Factors
    """Σ p_i F_i for each factor F."""


def means(weight: Weight, clients: Iterable[tuple[float, Factors]]) -> Means:
    """A running mean over (share, factors): of dense weights it holds the sum and one client's at a time."""
    total: Tensor | None = None
    factors: Factors = {}
    for share, own in clients:
        composed = weight.compose(own).mul_(share)
        total = composed if total is None else total.add_(composed)
        for name, factor in own.items():
            factors[name] = factors[name].add_(factor, alpha=share) if name in factors else factor * share
    assert total is not None, "a mean of no client"
    return Means(total, factors)


@dataclass
class Relative:
    """Squared Frobenius norms of an error and of what it is held against, to be added up over weights."""

    error: float = 0.0
    update: float = 0.0

    def add(self, error: Tensor, update: Tensor) -> float | None:
        """Count a weight in; its own ratio."""
        own = Relative(error.square().sum().item(), update.square().sum().item())
        self.error, self.update = self.error + own.error, self.update + own.update
        return own.ratio

    @property
    def ratio(self) -> float | None:
        """‖error‖ / ‖update‖; 0 where there is no error, None where there is one beside no update."""
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.update) if self.update else None
