"""A convolution whose kernel is a composition of factors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_core.factorizations import Factorization, LowRank, Svd
from lowrank_core.layers.weight import FactorizedWeight

Pair = tuple[int, int]


class FactorizedConv2d(nn.Module):
    """A 2-D convolution with its kernel `(out, in / groups, *kernel)` composed from factors.

    Input `(batch, in_channels, height, width)`. Strides, zero padding, dilation and groups are nn.Conv2d's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        factorization: Factorization,
        *,
        rank: int,
        stride: Pair = (1, 1),
        padding: Pair | str = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        shape = (out_channels, in_channels // groups, *kernel_size)
        self.weight = FactorizedWeight(shape, factorization, rank=rank, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.weight.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if isinstance(weight.factorization, LowRank) and weight.factorization.avoids_composing(
            weight.shape, weight.rank, self.groups
        ):
            return weight.factorization.apply_conv2d(
                input, weight.factors, self.bias, self.stride, self.padding, self.dilation
            )
        if isinstance(weight.factorization, Svd) and weight.factorization.avoids_composing(
            weight.shape, weight.rank, self.groups
        ):
            _, _, height, width = weight.shape
            return weight.factorization.apply_conv2d(
                input, weight.factors, self.bias, self.stride, self.padding, self.dilation, (height, width)
            )
        if input.device.type == "cpu" and input.numel() < math.prod(weight.shape):
            # The composed weight is contiguous, and here the larger of the two: an input with its channels last would
            # have it, and its gradient, laid out anew.
            input = input.contiguous()
        return F.conv2d(input, weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
