"""W = W1 ⊙ W2 of two low-rank terms: FedPara, and pFedPara's W1 ⊙ (W2 + 1).

Hyeon-Woo, Ye-Bin and Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient
Federated Learning", ICLR 2022, https://arxiv.org/abs/2108.06098
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.factorizations.term import Shape, compose_term, full_rank, term_shapes


@dataclass(frozen=True)
class Hadamard:
    """The entrywise product of two low-rank terms of rank R each.

    It stores 2R(O + I) numbers, for a kernel 2R(O + I + R·|K|), and reaches rank R²
    (Propositions 1 and 3): the least that any pair of ranks needs for it (Proposition 2).

    tanh: W = tanh(W1) ⊙ tanh(W2) (appendix B).
    plus_one: W = W1 ⊙ (W2 + 1), pFedPara's form, in which W1 alone is a whole weight:
        W1 travels, W2 stays with the client (section 2.3). It reaches rank R² + R.
    """

    tanh: bool = False
    plus_one: bool = False

    def __post_init__(self) -> None:
        if self.tanh and self.plus_one:
            raise ValueError("tanh and plus_one exclude each other: pFedPara has no tanh variant")

    def shapes(self, weight_shape: Sequence[int], rank: int) -> dict[str, Shape]:
        term = term_shapes(weight_shape, rank)
        return {f"{factor}{branch}": shape for branch in (1, 2) for factor, shape in term.items()}

    def terms(self, factors: Mapping[str, Tensor], weight_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """W1 and W2."""
        first = compose_term(factors["x1"], factors["y1"], factors.get("t1"), weight_shape)
        second = compose_term(factors["x2"], factors["y2"], factors.get("t2"), weight_shape)
        return first, second

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """The weight of two composed terms."""
        if self.tanh:
            return first.tanh() * second.tanh()
        if self.plus_one:
            return torch.addcmul(first, first, second)
        return first * second

    def compose(self, factors: Mapping[str, Tensor], weight_shape: Sequence[int]) -> Tensor:
        return self.combine(*self.terms(factors, weight_shape))

    def reachable_rank(self, weight_shape: Sequence[int], rank: int) -> int:
        """Tanh lifts the bound: entrywise functions raise the rank of a matrix in general."""
        if self.tanh:
            return full_rank(weight_shape)
        return min(rank * rank + (rank if self.plus_one else 0), full_rank(weight_shape))
