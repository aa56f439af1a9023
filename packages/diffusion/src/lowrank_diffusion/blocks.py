"""The UNet's residual and transformer blocks, which diffusers computes again, one by one, in the backward pass."""

import re
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# diffusers never computes the middle's first one again.
BLOCK = re.compile(r"(?!mid_block\.resnets\.0\b).*\.(?:resnets|transformer_blocks)\.\d+")


def blocks_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The blocks by name, in the order of the network's modules. All but a few large layers lie in one."""
    return {name: module for name, module in unet.named_modules() if BLOCK.fullmatch(name)}


def recompute(unet: Any, every: int) -> None:
    """Keep no activations within every `every`-th block: its forward is repeated in the backward pass, to the bit."""
    numbers = {block: number for number, block in enumerate(blocks_of(unet).values())}

    def call(block: nn.Module, *arguments: Any) -> Tensor | Any:
        if numbers[block] % every:
            return block(*arguments)
        return checkpoint(block, *arguments, use_reentrant=False)

    unet.enable_gradient_checkpointing(call)
