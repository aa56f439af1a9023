"""How a weight is written as small factors: stateless descriptions, one module each."""

import math
from collections.abc import Sequence

from lowrank_core.factorizations.hadamard import Hadamard
from lowrank_core.factorizations.kronecker import Kronecker
from lowrank_core.factorizations.low_rank import LowRank
from lowrank_core.factorizations.svd import Svd

Factorization = LowRank | Hadamard | Svd | Kronecker

__all__ = ["Factorization", "Hadamard", "Kronecker", "LowRank", "Svd", "num_parameters"]


def num_parameters(factorization: Factorization, weight_shape: Sequence[int], rank: int) -> int:
    """How many numbers the factors of one weight hold."""
    return sum(math.prod(shape) for shape in factorization.shapes(weight_shape, rank).values())
