"""Floating-point operations of torch code, counted from the shapes it computes with."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ops = torch.ops.aten


def _mm(out: Tensor, left: Tensor, *_: object) -> int:
    return 2 * out.numel() * left.shape[-1]


def _addmm(out: Tensor, _added: Tensor, left: Tensor, *_: object) -> int:
    return _mm(out, left)


def _convolution(out: Tensor, _input: Tensor, weight: Tensor, *_: object) -> int:
    """Every output pixel sums over a filter; no network here has a transposed convolution."""
    return 2 * out.numel() * math.prod(weight.shape[1:])


def _convolution_backward(_out: object, gradient: Tensor, input: Tensor, weight: Tensor, *others: Any) -> int:
    """As much as forward for the gradient of the input and of the weight, each where it is wanted."""
    return sum(others[-1][:2]) * _convolution(gradient, input, weight)


_FORMULAS: dict[object, Callable[..., int]] = {
    _ops.mm: _mm,
    _ops.bmm: _mm,
    _ops.addmm: _addmm,
    _ops.addmm_: _addmm,
    _ops.baddbmm: _addmm,
    _ops.convolution: _convolution,
    _ops.convolution_backward: _convolution_backward,
}


class CountFlops(TorchDispatchMode):
    """Adds up in `total` the FLOPs of the matrix products and convolutions inside the block, backward's too.

    A multiply-add counts as two. The numbers are those of torch's FlopCounterMode, whose first use imports torch's
    compiler, four seconds; so does arithmetic on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch imports its compiler here too, to keep it away from this mode.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func.overloadpacket)
        if formula:
            self.total += formula(out, *args)
        return out


class Undrawn(TorchDispatchMode):
    """Leaves undrawn what is to be drawn at random, which on the meta device is such arithmetic."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func.overloadpacket in (_ops.normal_, _ops.uniform_)
        return args[0] if drawn else func(*args, **(kwargs or {}))
