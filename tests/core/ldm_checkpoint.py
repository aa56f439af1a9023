"""An SDXL or Stable Diffusion 1 as one file in its authors' layout.

It is what diffusers reads with `from_single_file`, written the other way.

Sources: Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py and model.py (`Encoder`, `Decoder`)
and sgm/modules/encoders/modules.py; mlfoundations/open_clip, src/open_clip/transformer.py, for the larger text encoder.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from ldm_layout import unet_layers
from safetensors.torch import save_file
from torch import Tensor

_NORMS = {
    ".conv1": ("in_layers.2", "in_layers.0", "conv1", "norm1"),
    ".conv2": ("out_layers.3", "out_layers.0", "conv2", "norm2"),
    ".proj_in": ("proj_in", "norm", "proj_in", "norm"),
    ".attn1.to_q": ("attn1.to_q", "norm1", "attn1.to_q", "norm1"),
    ".attn2.to_q": ("attn2.to_q", "norm2", "attn2.to_q", "norm2"),
    ".ff.net.2": ("ff.net.2", "norm3", "ff.net.2", "norm3"),
    "conv_out": ("out.2", "out.0", "conv_out", "conv_norm_out"),
}
"""The norm beside a layer: the layer's end and the norm's, in the authors' names and in diffusers'."""
_VAE = {
    r"\.conv_norm_out\.": ".norm_out.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"mid_block\.attentions\.0\.": "mid.attn_1.",
    r"\.group_norm\.": ".norm.",
    r"attn_1\.to_([qkv])\.": r"attn_1.\1.",
    r"attn_1\.to_out\.0\.": "attn_1.proj_out.",
    r"(down|up)_blocks\.(\d+)\.resnets\.": r"\1.\2.block.",
    r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.": r"\1.\2.\3sample.",
}
_OPEN_CLIP = {
    r"^text_model\.embeddings\.token_embedding\.weight": "token_embedding.weight",
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"^text_model\.final_layer_norm\.": "ln_final.",
    r"^text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"layer_norm([12])": r"ln_\1",
    r"self_attn": "attn",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
}


def save_ldm(pipeline: Any, path: Path, metadata: Mapping[str, str] | None = None, **more: Tensor) -> Path:
    """Write the networks of diffusers' pipeline as one file; `more` are tensors beside them, such as `v_pred`."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in _unet(pipeline.unet)}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(pipeline.vae)}
    two = "text_encoder_2" in pipeline.components
    first = ("conditioner.embedders.0" if two else "cond_stage_model") + ".transformer.text_model."
    tensors |= {first + name.removeprefix("text_model."): t for name, t in pipeline.text_encoder.state_dict().items()}
    # What these files hold besides, and diffusers' networks do not.
    tensors[f"{first}embeddings.position_ids"] = torch.arange(77)[None]
    tensors["alphas_cumprod"] = torch.ones(1000)
    if two:
        open_clip = _open_clip(pipeline.text_encoder_2)
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in open_clip}
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    tensors = {name: tensor.contiguous() for name, tensor in (tensors | more).items()}
    save_file(tensors, path, {"format": "pt", **(metadata or {})})
    return path


def _unet(unet: Any) -> Iterator[tuple[str, Tensor]]:
    config, own = unet.config, unet.state_dict()
    kinds, blocks = config.down_block_types, config.transformer_layers_per_block
    blocks = (blocks,) * len(kinds) if isinstance(blocks, int) else blocks
    depths = tuple(depth if "CrossAttn" in kind else 0 for kind, depth in zip(kinds, blocks, strict=True))
    text, added = config.cross_attention_dim, config.projection_class_embeddings_input_dim or 0
    layers = unet_layers(config.block_out_channels, depths, text, added, middle=blocks[-1])
    names = {layer.diffusers: layer.ldm for layer in layers}
    for diffusers, ldm in list(names.items()):
        for end, (theirs, norm, ours, our_norm) in _NORMS.items():
            if diffusers.endswith(end):
                names[diffusers.removesuffix(ours) + our_norm] = ldm.removesuffix(theirs) + norm
    assert {name.rpartition(".")[0] for name in own} == names.keys()
    for name, tensor in own.items():
        module, _, leaf = name.rpartition(".")
        yield f"{names[module]}.{leaf}", tensor


def _vae(vae: Any) -> Iterator[tuple[str, Tensor]]:
    last = len(vae.config.up_block_types) - 1
    for name, tensor in vae.state_dict().items():
        # The authors number the decoder's blocks from the finest resolution.
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{last - int(found[1])}", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        for pattern, replacement in _VAE.items():
            name = re.sub(pattern, replacement, name)
        is_product = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        yield name, tensor[:, :, None, None] if is_product else tensor


def _open_clip(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    own = dict(encoder.state_dict())
    yield "text_projection", own.pop("text_projection.weight").T
    for name in [name for name in own if ".q_proj." in name]:
        parts = [own.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        own[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    for name, tensor in own.items():
        for pattern, replacement in _OPEN_CLIP.items():
            name = re.sub(pattern, replacement, name)
        yield name, tensor
