"""W = Σ A_r ⊗ B_r: sums of Kronecker products, of which one term has full rank already."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank_core.factorizations.term import Shape, full_rank


@dataclass(frozen=True)
class Kronecker:
    """`w1` (R, a, c) and `w2` (R, b, d, *K) for outputs a·b and inputs c·d: R(a·c + b·d·|K|) parameters.

    a and c are the largest divisors of the outputs and inputs up to their square roots, as in LyCORIS's LoKr. "Rank"
    counts the terms: a single one has rank min(a, c)·min(b, d·|K|), and a sum of min(a·c, b·d·|K|) is any weight.

    Van Loan and Pitsianis, "Approximation with Kronecker Products", 1993; Yeh et al., https://arxiv.org/abs/2309.14859
    """

    def shapes(self, weight_shape: Sequence[int], rank: int) -> dict[str, Shape]:
        outputs, inputs, *kernel = weight_shape
        a, c = _smaller_divisor(outputs), _smaller_divisor(inputs)
        return {"w1": (rank, a, c), "w2": (rank, outputs // a, inputs // c, *kernel)}

    def compose(self, factors: Mapping[str, Tensor], weight_shape: Sequence[int]) -> Tensor:
        """R·|W| multiply-adds, as one matrix product over the terms, and a copy of W into its order."""
        w1, w2 = factors["w1"], factors["w2"]
        (_, a, c), (_, b, d, *kernel) = w1.shape, w2.shape
        products = (w1.flatten(1).T @ w2.flatten(1)).view(a, c, b, d, *kernel)
        return products.transpose(1, 2).reshape(*weight_shape)

    def reachable_rank(self, weight_shape: Sequence[int], rank: int) -> int:
        """Of generic factors; terms add up until the weight's own rank is reached."""
        shapes = self.shapes(weight_shape, rank)
        (_, a, c), (_, b, *rest) = shapes["w1"], shapes["w2"]
        return min(rank * min(a, c) * min(b, math.prod(rest)), full_rank(weight_shape))


def _smaller_divisor(size: int) -> int:
    """The largest divisor up to the square root."""
    return next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
