"""Blocks of the UNet whose frozen weights wait in the CPU's memory, and are on the device only while it needs them."""

import torch
from torch import Tensor, nn

from lowrank_diffusion.blocks import blocks_of

Place = tuple[nn.Module, str]
"""A layer, and the name of a parameter or buffer of it."""


class Offloaded:
    """Blocks of which at most one has its frozen weights on the device; adapters and all else stay there.

    A block's weights come as its forward begins, and those of the block before go. Frozen weights do not change, so
    nothing is copied back. Where they are gone a tensor of no elements is in their place, which no product takes.
    For the backward pass every block must be computed again (`recompute` with 1): that brings its weights back, and
    what it saves for its backward holds on to them.

    Args:
        network: whose largest blocks these are, on the CPU or partly on the device.
        number: how many; None is all.
        device: where the network is going to compute. For a GPU the weights wait in pinned memory.
    """

    def __init__(self, network: nn.Module, number: int | None, device: torch.device) -> None:
        self.device = device
        self.resident: nn.Module | None = None
        """The block whose weights are on the device."""
        sizes = {block: sum(map(_bytes, _frozen(block).values())) for block in blocks_of(network).values()}
        self.blocks = sorted(sizes, key=lambda block: sizes[block], reverse=True)[:number]
        self._waiting: dict[nn.Module, dict[Place, Tensor]] = {}
        for block in self.blocks:
            waiting = {place: tensor.cpu() for place, tensor in _frozen(block).items()}
            if device.type == "cuda":
                waiting = {place: tensor.pin_memory() for place, tensor in waiting.items()}
            self._waiting[block] = waiting
            self._empty(block)
            block.register_forward_pre_hook(self._fetch)

    def _fetch(self, block: nn.Module, _: object) -> None:
        if block is self.resident:
            return
        if self.resident is not None:
            self._empty(self.resident)
        for place, tensor in self._waiting[block].items():
            # In the order of the device's own work, so nothing has to wait for the copy here.
            _put(place, tensor.to(self.device, non_blocking=True))
        self.resident = block

    def _empty(self, block: nn.Module) -> None:
        for place, tensor in _frozen(block).items():
            _put(place, tensor.new_empty(0))


def _frozen(block: nn.Module) -> dict[Place, Tensor]:
    """The tensors of a block that are not trained."""
    tensors: dict[Place, Tensor] = {}
    for layer in block.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                tensors[layer, name] = parameter.data
        for name, buffer in layer.named_buffers(recurse=False):
            tensors[layer, name] = buffer
    return tensors


def _put(place: Place, tensor: Tensor) -> None:
    layer, name = place
    held = getattr(layer, name)
    if isinstance(held, nn.Parameter):
        held.data = tensor
    else:
        setattr(layer, name, tensor)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
