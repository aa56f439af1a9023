"""A frozen base in fewer bits: its linear layers hold 8-bit or 4-bit numbers and compute with what these stand for."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_core.adapters.ways.linear import linear, unflattened
from lowrank_core.errors import LowrankError

Kind = Literal["int8", "nf4"]
NF4_BLOCK = 64
"""Weights that share a scale."""


def bitsandbytes() -> Any:
    """The library's functions.

    Raises:
        LowrankError: it is not installed.
    """
    try:
        # A statement, which torch.compile follows.
        import bitsandbytes.functional

        return bitsandbytes.functional
    except ImportError:
        raise LowrankError(
            "base.quantize needs the package bitsandbytes, which is not installed; install it with "
            "pip install 'lowrank[quantize]', or set base.quantize: none"
        ) from None


class QuantizedLinear(nn.Linear):
    """x Ŵᵀ + b, where Ŵ is the nearest to W that `kind` can hold; Ŵ is made dense for a product, and not kept.

    int8: whole numbers from -127 to 127, and a scale for each output (Dettmers et al., 2022); activations keep their
    precision. nf4: the sixteen numbers of NormalFloat, and a scale for each 64 weights (Dettmers et al., 2023,
    https://arxiv.org/abs/2305.14314).

    `weight` is a buffer, of the numbers and not of what they stand for.

    Raises:
        LowrankError: bitsandbytes is not installed.
    """

    def __init__(self, original: nn.Linear, kind: Kind, device: torch.device) -> None:
        super().__init__(original.in_features, original.out_features, bias=False, device="meta")
        del self.weight
        self.kind: Kind = kind
        functional, weight = bitsandbytes(), original.weight.detach().to(device)
        if kind == "int8":
            # On GPUs its kernel takes fp16 alone.
            numbers, scales, _ = functional.int8_vectorwise_quant(weight.half())
        else:
            numbers, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
            scales = state.absmax
        self.scales: Tensor
        self.register_buffer("weight", numbers)
        self.register_buffer("scales", scales)
        self.bias = original.bias

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Ŵ, `(out, in)`."""
        return _dense(self.weight, self.scales, self.kind, (self.out_features, self.in_features), dtype)

    def forward(self, input: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        return _Product.apply(input, self.weight, self.scales, self.bias, self.kind, shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


def quantize(network: nn.Module, kind: Kind, device: torch.device) -> None:
    """Put a `QuantizedLinear` on `device` in the place of every linear layer, also below adapters.

    Raises:
        LowrankError: bitsandbytes is not installed.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, QuantizedLinear(child, kind, device))


def bytes_of(linear: nn.Linear, kind: Kind) -> int:
    """What a layer's weight takes, scales included."""
    if kind == "int8":
        return linear.weight.numel() + 4 * linear.out_features
    return -(-linear.weight.numel() // 2) + 4 * -(-linear.weight.numel() // NF4_BLOCK)


def _dense(numbers: Tensor, scales: Tensor, kind: Kind, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    functional = bitsandbytes()
    if kind == "int8":
        return functional.int8_vectorwise_dequant(numbers, scales).to(dtype)
    state = functional.QuantState(scales, torch.Size(shape), blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
    return functional.dequantize_4bit(numbers, state)


class _Product(torch.autograd.Function):
    """Autograd's own product would hold the dense weight until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None, kind: Kind, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(numbers, scales)
        ctx.kind, ctx.shape = kind, shape
        return unflattened(linear(x, _dense(numbers, scales, kind, shape, x.dtype), bias), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        numbers, scales = ctx.saved_tensors
        return grads[0] @ _dense(numbers, scales, ctx.kind, ctx.shape, grads[0].dtype), None, None, None, None, None
