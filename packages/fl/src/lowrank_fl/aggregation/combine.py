"""What the server does about factors in a round, beside the strategy's own step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lowrank_fl.aggregation.gap import Relative, means
from lowrank_fl.aggregation.one_factor import trained_in_turn, turns
from lowrank_fl.aggregation.refit import refit
from lowrank_fl.aggregation.weights import Arrays, factorized_weights
from lowrank_fl.config import AggregationConfig
from lowrank_fl.timing import torch_threads


@dataclass(frozen=True)
class Found:
    """What one round's replies came to. None where no mean moved, or nobody looked."""

    gap: float | None = None
    layer_gaps: dict[str, float | None] = field(default_factory=dict[str, float | None])
    residual: float | None = None
    refitted: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """Factors to take instead of the mean ones, by their arrays' names."""


class FactorAggregation:
    """`aggregation` of a configuration for one model.

    threads: that torch computes with here; more or fewer may change the last bits of a refit.
    """

    def __init__(self, config: AggregationConfig, model: nn.Module, threads: int = 1) -> None:
        self.config, self.threads = config, threads
        self.weights = factorized_weights(model)
        count = turns(model) if config.kind == "one-factor" else 0
        self._returned = [trained_in_turn(model, turn) for turn in range(count)]

    @property
    def turns(self) -> int:
        """After so many rounds clients train, and send, the same names again."""
        return max(1, len(self._returned))

    def turn(self, number: int) -> int | None:
        """The turn of that round, the first being round 1; None where every round trains everything."""
        return (number - 1) % len(self._returned) if self._returned else None

    def returned(self, number: int) -> frozenset[str] | None:
        """The names of what clients train and send in that round; None for everything they got."""
        turn = self.turn(number)
        return None if turn is None else self._returned[turn]

    def combine(self, sent: Arrays, trained: Sequence[tuple[int, Arrays]]) -> Found:
        """Look at the clients' models, and under `refit` find better factors than their mean.

        One weight after the other, so that no more than a few dense ones are held at a time.

        sent: the model that the round began with.
        trained: each client's examples, by which it counts, and the arrays it returned.
        """
        refits = self.config.kind == "refit"
        if not (self.config.gap or refits) or not self.weights:
            return Found()
        examples = sum(count for count, _ in trained)
        gap, residual = Relative(), Relative()
        layers: dict[str, float | None] = {}
        refitted: dict[str, np.ndarray] = {}
        with torch_threads(self.threads), torch.no_grad():
            for weight in self.weights:
                mean = means(weight, ((n / examples, weight.read({**sent, **own})) for n, own in trained))
                names = [weight.name(factor) for factor in mean.factors]
                if all(np.array_equal(own.get(name, sent[name]), sent[name]) for _, own in trained for name in names):
                    layers[weight.path] = 0.0  # what the means differ by is rounding, as is all that they changed
                    continue
                update = mean.weight - weight.compose(weight.read(sent))
                layers[weight.path] = gap.add(mean.weight - weight.compose(mean.factors), update)
                if not refits:
                    continue
                found = refit(weight, mean.factors, mean.weight, self.config.sweeps)
                # As clients will get them, in the model's own dtype.
                rounded = [
                    {weight.name(f): value.numpy().astype(sent[weight.name(f)].dtype) for f, value in factors.items()}
                    for factors in (found, mean.factors)
                ]
                errors = [mean.weight - weight.compose(weight.read(arrays)) for arrays in rounded]
                better = 0 if errors[0].norm() < errors[1].norm() else 1
                residual.add(errors[better], update)
                refitted |= rounded[better]
        return Found(gap.ratio, layers, residual.ratio if refits else None, refitted)
