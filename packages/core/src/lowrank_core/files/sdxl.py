"""The layers of SDXL by name, in diffusers' way and in that of the original code (sgm), both from their rules.

The U-Net has three resolutions, two residual blocks on each going down and three going up; the second and third have
transformers of 2 and 10 blocks. kohya's files name its layers as sgm does, with underscores for dots.
"""

import re
from collections.abc import Collection, Iterator
from functools import cache

_DEPTHS = (0, 2, 10)
"""Transformer blocks at each resolution."""
_LAYERS = 2
_TEXT_LAYERS = 32
"""Of the larger text encoder; the smaller has 12."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.*))?")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)(?:\.(.*))?")


@cache
def unet_layers() -> tuple[str, ...]:
    """The linear layers and convolutions of SDXL's U-Net, by diffusers' names."""
    return tuple(_unet_layers())


def _unet_layers() -> Iterator[str]:
    yield from _ENDS
    last = len(_DEPTHS) - 1
    for block, depth in enumerate(_DEPTHS):
        for layer in range(_LAYERS):
            yield from _resnet(f"down_blocks.{block}.resnets.{layer}", shortcut=block > 0 and layer == 0)
            yield from _transformer(f"down_blocks.{block}.attentions.{layer}", depth)
        if block < last:
            yield f"down_blocks.{block}.downsamplers.0.conv"
    for layer in range(2):
        yield from _resnet(f"mid_block.resnets.{layer}", shortcut=False)
    yield from _transformer("mid_block.attentions.0", _DEPTHS[-1])
    for block, depth in enumerate(reversed(_DEPTHS)):
        for layer in range(_LAYERS + 1):
            # What comes up is joined with what went down, so every block changes the number of channels.
            yield from _resnet(f"up_blocks.{block}.resnets.{layer}", shortcut=True)
            yield from _transformer(f"up_blocks.{block}.attentions.{layer}", depth)
        if block < last:
            yield f"up_blocks.{block}.upsamplers.0.conv"


def _resnet(path: str, *, shortcut: bool) -> Iterator[str]:
    for leaf in ("conv1", "time_emb_proj", "conv2", *(["conv_shortcut"] if shortcut else [])):
        yield f"{path}.{leaf}"


def _transformer(path: str, depth: int) -> Iterator[str]:
    if not depth:
        return
    yield from (f"{path}.proj_in", f"{path}.proj_out")
    for block in range(depth):
        inner = f"{path}.transformer_blocks.{block}"
        for attention in ("attn1", "attn2"):
            yield from (f"{inner}.{attention}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0"))
        yield from (f"{inner}.ff.net.0.proj", f"{inner}.ff.net.2")


@cache
def text_layers() -> tuple[str, ...]:
    """The linear layers of a CLIP text encoder, with the level `text_model` that files have."""
    leaves = [f"self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    layers = range(_TEXT_LAYERS)
    return ("text_projection", *(f"text_model.encoder.layers.{i}.{leaf}" for i in layers for leaf in leaves))


def is_sdxl(names: Collection[str]) -> bool:
    """Whether a U-Net with layers of these names may be SDXL's; that of Stable Diffusion 1 has a fourth resolution."""
    return not any(name.startswith(("down_blocks.3.", "up_blocks.3.")) for name in names)


def layers_per_block(names: Collection[str]) -> int:
    """How many residual blocks a U-Net with layers of these names has at each resolution going down; SDXL's 2 if none.

    An adapter's names may be too few to tell, so they count only where they are more than SDXL's.
    """
    found = [int(match[1]) + 1 for name in names if (match := re.match(r"down_blocks\.\d+\.resnets\.(\d+)\.", name))]
    return max(found, default=_LAYERS)


def to_sgm(name: str, layers: int = _LAYERS) -> str:
    """The original code's name of a U-Net module; a name that follows no rule stays as it is.

    layers: residual blocks at each resolution going down.
    """
    if name in _ENDS:
        return _ENDS[name]
    if match := _MIDDLE.fullmatch(name):
        kind, index, rest = match[1], int(match[2]), match[3] or ""
        position = 1 if kind == "attentions" else 2 * index
        return _join(f"middle_block.{position}", _RESNET.get(rest, rest) if kind == "resnets" else rest)
    if not (match := _BLOCK.fullmatch(name)):
        return name
    way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5] or ""
    rest = _RESNET.get(rest, rest) if kind == "resnets" else rest
    if way == "down":
        # Block 0 of the inputs is conv_in; a resolution ends in one of its own for downsampling.
        first = block * (layers + 1) + 1
        if kind == "downsamplers":
            return _join(f"input_blocks.{first + layers}.0", "op" if rest == "conv" else rest)
        return _join(f"input_blocks.{first + layer}.{int(kind == 'attentions')}", rest)
    first = block * (layers + 1)
    if kind == "upsamplers":
        return _join(f"output_blocks.{first + layers}.2", rest)
    return _join(f"output_blocks.{first + layer}.{int(kind == 'attentions')}", rest)


def _join(path: str, rest: str) -> str:
    return f"{path}.{rest}" if rest else path
