"""From a wish to a rank: the paper's gamma, the authors' ratio, a fixed rank, a budget for a whole model.

The rules speak of FedPara's factors. `rank_for` carries them over to other factorizations by matching FedPara's
parameter count layer by layer, so that all methods under one rule cost the same.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.factorizations import Factorization, Hadamard, num_parameters

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def smallest_rank(weight_shape: Sequence[int]) -> int:
    """r_min = min(⌈√O⌉, ⌈√I⌉), below which Corollary 1 limits the rank of a matrix."""
    outputs, inputs, *_ = weight_shape
    return min(_ceil_sqrt(outputs), _ceil_sqrt(inputs))


def largest_rank(weight_shape: Sequence[int], parameters: int, factorization: Factorization) -> int:
    """The largest rank whose factors hold at most `parameters` numbers; 0 where rank 1 holds more."""
    bound = math.isqrt(parameters) + parameters  # more than any rank that could fit
    return bisect_right(range(1, bound + 1), parameters, key=lambda r: num_parameters(factorization, weight_shape, r))


@dataclass(frozen=True)
class Gamma:
    """The paper's rule: r = (1 - γ)·r_min + γ·r_max, rounded, where r_max is the largest rank that holds
    no more parameters than the weight itself (section 2.2). The paper leaves the rounding open; this one is
    within 0.01M of every entry of its Table 5.
    """

    gamma: float

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise UsageError(f"gamma must lie between 0 and 1, got {self.gamma}")

    def __call__(self, weight_shape: Sequence[int]) -> int:
        low = smallest_rank(weight_shape)
        high = largest_rank(weight_shape, math.prod(weight_shape), Hadamard())
        return max(1, round((1 - self.gamma) * low + self.gamma * high))


@dataclass(frozen=True)
class Ratio:
    """The authors' notebook's rule: the rank at which the factors hold `ratio` of the weight's parameters,
    rounded up, and never below max(⌈√O⌉, ⌈√I⌉).

    Source: https://github.com/South-hw/FedPara_ICLR22
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise UsageError(f"ratio must lie between 0 and 1, got {self.ratio}")

    def __call__(self, weight_shape: Sequence[int]) -> int:
        outputs, inputs, *_ = weight_shape
        target = self.ratio * math.prod(weight_shape)
        fitting = largest_rank(weight_shape, math.floor(target), Hadamard())
        exact = fitting > 0 and num_parameters(Hadamard(), weight_shape, fitting) == target
        return max(_ceil_sqrt(outputs), _ceil_sqrt(inputs), fitting if exact else fitting + 1)


@dataclass(frozen=True)
class FixedRank:
    """The same rank for every layer, whatever the factorization."""

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank must be at least 1, got {self.rank}")

    def __call__(self, weight_shape: Sequence[int]) -> int:
        return self.rank


RankRule = Gamma | Ratio | FixedRank


def rank_for(rule: RankRule, factorization: Factorization, weight_shape: Sequence[int]) -> int:
    """The rank that `rule` gives a weight under `factorization`.

    Where it is not FedPara's, `Gamma` and `Ratio` give the rank whose parameter count is nearest to FedPara's.
    """
    rank = rule(weight_shape)
    if isinstance(rule, FixedRank) or isinstance(factorization, Hadamard):
        return rank
    target = num_parameters(Hadamard(), weight_shape, rank)
    below = max(1, largest_rank(weight_shape, target, factorization))
    return min((below, below + 1), key=lambda r: abs(num_parameters(factorization, weight_shape, r) - target))


def gamma_within(budget: int, size_under: Callable[[RankRule], int]) -> Gamma:
    """The largest gamma under which a model holds no more than `budget` parameters; `size_under` counts them.

    Raises:
        LowrankError: not even gamma 0 keeps to it.
    """
    smallest = size_under(Gamma(0.0))
    if smallest > budget:
        raise LowrankError(
            f"a budget of {budget:,} parameters is below the smallest size, {smallest:,} at gamma 0; "
            "raise the budget, or set a fixed rank"
        )
    if size_under(Gamma(1.0)) <= budget:
        return Gamma(1.0)
    low, high = 0.0, 1.0  # the size never falls as gamma grows
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if size_under(Gamma(middle)) <= budget else (low, middle)
    return Gamma(low)


def parse_budget(budget: int | str, bytes_per_parameter: int = 4) -> int:
    """A budget as a number of parameters: `1500000`, `"1.5M"` parameters, or `"6MB"` of them.

    Raises:
        UsageError: the text is neither, or comes to less than one parameter.
    """
    text = str(budget).strip().upper()
    number = text.rstrip("KMGB")
    unit = text[len(number) :]
    try:
        if unit in _BYTES:
            parameters = math.floor(float(number) * _BYTES[unit]) // bytes_per_parameter
        else:
            parameters = math.floor(float(number) * _COUNTS[unit])
    except (ValueError, KeyError):
        raise UsageError(
            f"budget {budget!r} is neither a number of parameters (1500000, 1.5M) nor a size (6MB)"
        ) from None
    if parameters < 1:
        raise UsageError(f"budget must be at least one parameter, got {budget!r}")
    return parameters


def _ceil_sqrt(n: int) -> int:
    return math.isqrt(n - 1) + 1
