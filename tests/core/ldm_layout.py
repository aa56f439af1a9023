"""SDXL's UNet as its authors wrote it: every layer in the order in which it computes, beside diffusers' name for it.

ComfyUI and sd-scripts build the network under these names and look a layer up in a file as `lora_unet_` and its path
with underscores for dots. Blocks are numbered here by counting them as they are built, apart from lowrank's own table.

Sources: Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py (`UNetModel`) for layers, numbers
and shapes; ComfyUI, comfy/lora.py (`model_lora_keys_unet`, `model_lora_keys_clip`), and kohya-ss/sd-scripts,
networks/lora.py (`LoRANetwork`), for what a file calls them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


class Layer(NamedTuple):
    ldm: str
    diffusers: str
    shape: tuple[int, ...]
    """Of its weight."""


def unet_layers(
    channels: tuple[int, ...] = (320, 640, 1280),
    depths: tuple[int, ...] = (0, 2, 10),
    text: int = 2048,
    added: int = 2816,
    layers: int = 2,
    middle: int | None = None,
) -> Iterator[Layer]:
    """The linear layers and convolutions.

    channels, depths: width and transformer blocks of each resolution. text, added: widths of the text's states and of
    the added conditions. layers: residual blocks of each resolution going down. middle: the transformer
    blocks there, if not the last resolution's; Stable Diffusion 1 has 1, after (1, 1, 1, 0), and no added conditions.
    """
    first, last = 4 * channels[0], len(channels) - 1
    yield Layer("time_embed.0", "time_embedding.linear_1", (first, channels[0]))
    yield Layer("time_embed.2", "time_embedding.linear_2", (first, first))
    if added:
        yield Layer("label_emb.0.0", "add_embedding.linear_1", (first, added))
        yield Layer("label_emb.0.2", "add_embedding.linear_2", (first, first))
    yield Layer("input_blocks.0.0", "conv_in", (channels[0], 4, 3, 3))
    built, width, skips = 1, channels[0], [channels[0]]
    for level, (wide, depth) in enumerate(zip(channels, depths, strict=True)):
        for layer in range(layers):
            block, theirs = f"input_blocks.{built}", f"down_blocks.{level}"
            yield from _residual(f"{block}.0", f"{theirs}.resnets.{layer}", width, wide, first)
            yield from _transformer(f"{block}.1", f"{theirs}.attentions.{layer}", wide, depth, text)
            built, width = built + 1, wide
            skips.append(wide)
        if level < last:
            name = f"down_blocks.{level}.downsamplers.0.conv"
            yield Layer(f"input_blocks.{built}.0.op", name, (wide, wide, 3, 3))
            built += 1
            skips.append(wide)
    yield from _residual("middle_block.0", "mid_block.resnets.0", width, width, first)
    yield from _transformer(
        "middle_block.1", "mid_block.attentions.0", width, depths[-1] if middle is None else middle, text
    )
    yield from _residual("middle_block.2", "mid_block.resnets.1", width, width, first)
    built = 0
    for level, (wide, depth) in enumerate(zip(reversed(channels), reversed(depths), strict=True)):
        for layer in range(layers + 1):
            block, theirs = f"output_blocks.{built}", f"up_blocks.{level}"
            yield from _residual(f"{block}.0", f"{theirs}.resnets.{layer}", width + skips.pop(), wide, first)
            yield from _transformer(f"{block}.1", f"{theirs}.attentions.{layer}", wide, depth, text)
            built, width = built + 1, wide
        if level < last:
            # The last member of the last block: behind a transformer where there is one.
            yield Layer(f"{block}.{2 if depth else 1}.conv", f"{theirs}.upsamplers.0.conv", (wide, wide, 3, 3))
    yield Layer("out.2", "conv_out", (4, channels[0], 3, 3))


def _residual(ldm: str, diffusers: str, inputs: int, outputs: int, embedding: int) -> Iterator[Layer]:
    yield Layer(f"{ldm}.in_layers.2", f"{diffusers}.conv1", (outputs, inputs, 3, 3))
    yield Layer(f"{ldm}.emb_layers.1", f"{diffusers}.time_emb_proj", (outputs, embedding))
    yield Layer(f"{ldm}.out_layers.3", f"{diffusers}.conv2", (outputs, outputs, 3, 3))
    if inputs != outputs:
        yield Layer(f"{ldm}.skip_connection", f"{diffusers}.conv_shortcut", (outputs, inputs, 1, 1))


def _transformer(ldm: str, diffusers: str, width: int, depth: int, text: int) -> Iterator[Layer]:
    if not depth:
        return
    yield Layer(f"{ldm}.proj_in", f"{diffusers}.proj_in", (width, width))
    for block in range(depth):
        for attention, source in (("attn1", width), ("attn2", text)):
            for leaf, shape in {"to_q": width, "to_k": source, "to_v": source, "to_out.0": width}.items():
                inner = f"transformer_blocks.{block}.{attention}.{leaf}"
                yield Layer(f"{ldm}.{inner}", f"{diffusers}.{inner}", (width, shape))
        # The gate doubles the four times wider inner layer.
        for leaf, shape in {"net.0.proj": (8 * width, width), "net.2": (width, 4 * width)}.items():
            inner = f"transformer_blocks.{block}.ff.{leaf}"
            yield Layer(f"{ldm}.{inner}", f"{diffusers}.{inner}", shape)
    yield Layer(f"{ldm}.proj_out", f"{diffusers}.proj_out", (width, width))


def text_layers(width: int, count: int, *, projected: bool = False) -> Iterator[tuple[str, tuple[int, int]]]:
    """The linear layers of a CLIP text encoder of so many blocks, and the shapes of their weights.

    The names are those that transformers had when kohya's files came up, with the level `text_model`. The projection is
    the larger encoder's; ComfyUI alone looks for it.
    """
    if projected:
        yield "text_projection", (width, width)
    for block in range(count):
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"text_model.encoder.layers.{block}.self_attn.{leaf}", (width, width)
        yield f"text_model.encoder.layers.{block}.mlp.fc1", (4 * width, width)
        yield f"text_model.encoder.layers.{block}.mlp.fc2", (width, 4 * width)


def flat(prefix: str, name: str) -> str:
    """The name in a file."""
    return f"{prefix}_{name.replace('.', '_')}"


def under_ldm_names(unet: nn.Module, layers: Iterator[Layer]) -> nn.Module:
    """A tree that holds the very layers of diffusers' UNet under their other names; it has no forward."""
    root = nn.Module()
    for layer in layers:
        parent = root
        *path, last = layer.ldm.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, unet.get_submodule(layer.diffusers))
    return root
