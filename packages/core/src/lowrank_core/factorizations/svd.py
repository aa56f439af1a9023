"""W = P diag(λ) Q: a low-rank matrix whose directions have a value each, so that their number can adapt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lowrank_core.factorizations.term import Shape, full_rank


@dataclass(frozen=True)
class Svd:
    """`left` P (O, R), `values` λ (R,), `right` Q (R, I·|K|): R(O + I·|K| + 1) parameters, rank at most R.

    Kernels are taken as matrices, their pixels among the inputs. Nothing holds P and Q orthonormal; the penalty that
    `adapt_ranks` adds draws them there.
    """

    def shapes(self, weight_shape: Sequence[int], rank: int) -> dict[str, Shape]:
        outputs, inputs = weight_shape[0], math.prod(weight_shape[1:])
        return {"left": (outputs, rank), "values": (rank,), "right": (rank, inputs)}

    def compose(self, factors: Mapping[str, Tensor], weight_shape: Sequence[int]) -> Tensor:
        """R·|W| multiply-adds."""
        return ((factors["left"] * factors["values"]) @ factors["right"]).view(*weight_shape)

    def reachable_rank(self, weight_shape: Sequence[int], rank: int) -> int:
        return min(rank, full_rank(weight_shape))

    def avoids_composing(self, weight_shape: Sequence[int], rank: int, groups: int = 1) -> bool:
        """Whether applying the factors one after the other takes fewer multiply-adds than the dense weight does."""
        outputs, inputs = weight_shape[0], math.prod(weight_shape[1:])
        return groups == 1 and 0 < rank * (outputs + inputs) < outputs * inputs

    def apply_linear(self, input: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """`(..., in)` to `(..., out)` without composing the weight."""
        return F.linear(F.linear(input, factors["right"]) * factors["values"], factors["left"], bias)

    def apply_conv2d(
        self,
        input: Tensor,
        factors: Mapping[str, Tensor],
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int] | str,
        dilation: tuple[int, int],
        kernel: tuple[int, int],
    ) -> Tensor:
        """The kernel to R channels, then 1x1 to the outputs."""
        right = factors["right"]
        down = right.view(len(right), -1, *kernel)
        up = (factors["left"] * factors["values"])[:, :, None, None]
        return F.conv2d(F.conv2d(input, down, None, stride, padding, dilation), up, bias)
