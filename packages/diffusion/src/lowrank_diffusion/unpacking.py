"""A whole model in one file, network by network under diffusers' names, without building any of them."""

import re
from importlib import import_module
from typing import Any

from torch import Tensor

from lowrank_core.errors import LowrankError
from lowrank_core.files import Component, UnpackedModel
from lowrank_core.files.difference import FACTORS
from lowrank_core.files.tensors import read_tensors
from lowrank_diffusion.families import SDXL
from lowrank_diffusion.single_file import read_single_file, single_file

_DOWNSAMPLING = re.compile(r"model\.diffusion_model\.input_blocks\.([1-9]\d*)\.0\.op\.weight")


def unpacked(source: str, option: str) -> UnpackedModel | None:
    """The UNet and the text encoders of a whole SDXL or Stable Diffusion 1 in one file; None where that is none.

    diffusers renames the tensors, cuts up those that hold three layers and turns one round. The others stay in the
    file until they are looked at.

    Args:
        source: the file, or a folder, or a file of one network.
        option: what the user gave it by, for what errors say.

    Raises:
        LowrankError: what `read_single_file` raises; a UNet alone; a tensor is missing.
    """
    path = single_file(source)
    if path is None:
        return None
    tensors = read_tensors(path)[0]
    if not any(name.startswith(SDXL.prefixes["unet"]) for name in tensors):
        return None
    if all(name.startswith(SDXL.prefixes["unet"]) for name in tensors) and not any(
        factor in name for name in tensors for factor in FACTORS
    ):
        raise LowrankError(
            f"{path} holds a UNet alone; give its folder as diffusers saves it, or the file of a whole model"
        )
    family = read_single_file(path, has_vae=False, option=option).family
    # diffusers takes seconds to import.
    rename: Any = import_module("diffusers.loaders.single_file_utils")
    # The first resolution's blocks are followed by the first downsampling, at block layers + 1.
    downsamplings = [int(found[1]) for name in tensors if (found := _DOWNSAMPLING.fullmatch(name))]
    config: dict[str, Any] = {"layers_per_block": min(downsamplings, default=3) - 1}
    if family is SDXL:
        config["addition_embed_type"] = "text_time"
    networks: dict[Component, dict[str, Tensor | None]] = {}
    try:
        networks["unet"] = rename.convert_ldm_unet_checkpoint(dict(tensors), config)
        first: dict[str, Tensor] = rename.convert_ldm_clip_checkpoint(dict(tensors))
        # The smaller encoder's names as transformers 5 saves them, without a level.
        networks["te1"] = {name.removeprefix("text_model."): tensor for name, tensor in first.items()}
        if family is SDXL:
            start = family.prefixes["text_encoder_2"]
            if f"{start}text_projection" not in tensors:
                # diffusers would ask the model for its width.
                raise KeyError(f"{start}text_projection")
            networks["te2"] = rename.convert_open_clip_checkpoint(None, dict(tensors), prefix=start)
    except KeyError as error:
        raise LowrankError(
            f"{path} lacks a tensor of {family.name}, {error.args[0]}; give the file of a whole {family.name}"
        ) from None
    # What has a weight and no bias gets one that is None.
    held: dict[Component, dict[str, Tensor]] = {
        part: {name: tensor for name, tensor in network.items() if tensor is not None}
        for part, network in networks.items()
    }
    return UnpackedModel(path, held)
