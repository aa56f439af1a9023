"""The tiny SDXL's parts, untrained: three UNet blocks, two text encoders, a VAE and tokenizers, as in the real one."""

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SIZE = 64
"""Pixels of a picture's side; the VAE makes 16x16 latents of them."""
TOKENS = 32

_NOISE: dict[str, Any] = {
    # SDXL's own, scheduler/scheduler_config.json.
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
_TEXT: dict[str, Any] = {"max_position_embeddings": TOKENS, "num_hidden_layers": 3, "num_attention_heads": 4}
_VAE: dict[str, Any] = {
    "block_out_channels": (24, 48, 48),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    # Few groups keep a plain picture's colour, and without attention pictures of any size teach the same.
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
    "sample_size": SIZE,
}
_UNET: dict[str, Any] = {
    "sample_size": SIZE // 4,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 48, 64),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 3, 4),
    "cross_attention_dim": 48 + 80,
    "use_linear_projection": True,
    "norm_num_groups": 16,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 6 * 16 + 80,
}


def tiny_vae() -> AutoencoderKL:
    """4 latent channels at a quarter of the picture's side (SDXL's: an eighth)."""
    return AutoencoderKL(**_VAE)


def tiny_text_encoders(vocabulary: int, bos: int, eos: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """48 and 80 units wide; the second one has the pooled projection."""
    special: dict[str, Any] = {
        "vocab_size": vocabulary,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    first = CLIPTextConfig(
        **_TEXT, **special, hidden_size=48, intermediate_size=192, projection_dim=48, hidden_act="quick_gelu"
    )
    second = CLIPTextConfig(
        **_TEXT, **special, hidden_size=80, intermediate_size=320, projection_dim=80, hidden_act="gelu"
    )
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def tiny_unet() -> UNet2DConditionModel:
    """SDXL's blocks, 32, 48 and 64 channels wide."""
    return UNet2DConditionModel(**_UNET)


def training_noise() -> DDPMScheduler:
    return DDPMScheduler(**_NOISE, clip_sample=False)


def sampling_noise() -> EulerDiscreteScheduler:
    # From the last time step on: SDXL's own spacing, leading, begins with less noise, which shows on plain backgrounds.
    return EulerDiscreteScheduler(**_NOISE, timestep_spacing="trailing")
