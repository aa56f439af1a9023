"""Networks of diffusers and transformers on the meta device, with what one forward reads."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_core.costs.trace import CountFlops
from lowrank_diffusion import sdxl


@dataclass(frozen=True)
class BlankNetwork:
    """A model without weights and the arguments of one forward of one example."""

    model: nn.Module
    arguments: tuple[Tensor, ...] = ()
    named: dict[str, Any] = field(default_factory=dict[str, Any])


def blank_sdxl(component: str) -> BlankNetwork:
    """`unet`, `text_encoder` or `text_encoder_2` of SDXL, built by its library; pictures of 1024 pixels, 77 tokens.

    Takes some ten seconds, nearly all to import diffusers or transformers: see `lowrank_diffusion.outline`.
    """
    if component == "unet":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        with torch.device("meta"), CountFlops():
            return BlankNetwork(UNet2DConditionModel(**sdxl.UNET), *unet_inputs(sdxl.UNET))
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"), CountFlops():
        if component == "text_encoder":
            model: nn.Module = CLIPTextModel(CLIPTextConfig(**sdxl.TEXT_ENCODER))
        else:
            model = CLIPTextModelWithProjection(CLIPTextConfig(**sdxl.TEXT_ENCODER_2))
        return BlankNetwork(model, (torch.empty(1, 77, dtype=torch.int64),))


def unet_inputs(config: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Latents, time step and text of a conditional UNet: what its `forward` takes, on the default device."""
    width = config["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]
    size = config["sample_size"]
    arguments = (torch.empty(1, config["in_channels"], size, size), torch.empty(()), torch.empty(1, 77, width))
    if config.get("addition_embed_type") != "text_time":
        return arguments, {}
    # Of the added embedding's width, six numbers of size and crop take their share and the pooled text the rest.
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return arguments, {"added_cond_kwargs": {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}}
