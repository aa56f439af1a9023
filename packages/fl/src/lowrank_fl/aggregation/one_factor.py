"""One factor at a time: which arrays clients train in a round, so that the mean of factors composes to the mean."""

import math

from torch import nn

from lowrank_fl.aggregation.weights import factorized_weights
from lowrank_fl.state import state_of


def turns(model: nn.Module) -> int:
    """After so many rounds every weight's turns begin anew together; 1 without a factorized weight."""
    return math.lcm(*(len(weight.factors) for weight in factorized_weights(model)))


def trained_in_turn(model: nn.Module, turn: int) -> frozenset[str]:
    """The names, among those of `state_of`, of what clients train in a turn, which counts from 0.

    Of each factorized weight that is its factor number `turn`, modulo how many it has; of the rest of the model it is
    everything, a norm's statistics included.
    """
    frozen = {
        weight.name(factor)
        for weight in factorized_weights(model)
        for number, factor in enumerate(weight.factors)
        if number != turn % len(weight.factors)
    }
    return frozenset(state_of(model)) - frozen
