"""Stable Diffusion XL's networks, as the configuration values that diffusers and transformers build them from.

Source: unet/, text_encoder/ and text_encoder_2/config.json of stabilityai/stable-diffusion-xl-base-1.0.
"""

from typing import Any

UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_CLIP: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77}
TEXT_ENCODER: dict[str, Any] = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
"""OpenAI's CLIP ViT-L/14, without its projection."""
TEXT_ENCODER_2: dict[str, Any] = {
    **_CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
"""OpenCLIP's ViT-bigG/14, with its projection."""

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""By their names in diffusers' pipeline."""
