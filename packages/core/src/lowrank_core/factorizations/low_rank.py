"""W = X Yᵀ, and for convolutions W = T ×₁ X ×₂ Y: the paper's low-rank (TKD) baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lowrank_core.factorizations.term import Shape, compose_term, full_rank, split_shape, term_shapes


@dataclass(frozen=True)
class LowRank:
    """One low-rank term. R(O + I) parameters, for a kernel R(O + I + R·|K|); rank at most R."""

    def shapes(self, weight_shape: Sequence[int], rank: int) -> dict[str, Shape]:
        return term_shapes(weight_shape, rank)

    def compose(self, factors: Mapping[str, Tensor], weight_shape: Sequence[int]) -> Tensor:
        return compose_term(factors["x"], factors["y"], factors.get("t"), weight_shape)

    def reachable_rank(self, weight_shape: Sequence[int], rank: int) -> int:
        return min(rank, full_rank(weight_shape))

    def avoids_composing(self, weight_shape: Sequence[int], rank: int, groups: int = 1) -> bool:
        """Whether applying the factors one after the other takes fewer multiply-adds an output
        position than the dense weight does; grouped convolutions are always composed.
        """
        outputs, inputs, kernel = split_shape(weight_shape)
        size = 1
        for width in kernel:
            size *= width
        core = rank * rank * size if kernel else 0
        return groups == 1 and rank * (outputs + inputs) + core < outputs * inputs * size

    def apply_linear(self, input: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """`(..., in)` to `(..., out)` without composing the weight."""
        return F.linear(F.linear(input, factors["y"].T), factors["x"], bias)

    def apply_conv2d(
        self,
        input: Tensor,
        factors: Mapping[str, Tensor],
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int] | str,
        dilation: tuple[int, int],
    ) -> Tensor:
        """1x1 to R channels, the core's kernel, 1x1 to the outputs; padding pixels stay zero through a 1x1."""
        x, y, t = factors["x"][:, :, None, None], factors["y"].T[:, :, None, None], factors.get("t")
        if t is None:
            return F.conv2d(F.conv2d(input, y, None, stride, padding), x, bias)
        hidden = F.conv2d(F.conv2d(input, y), t, None, stride, padding, dilation)
        return F.conv2d(hidden, x, bias)
