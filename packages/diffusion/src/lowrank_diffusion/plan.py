"""`lowrank diffusion train --plan`: what a run would cost, from shapes alone."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lowrank_core.costs.adapters import count_adapter
from lowrank_core.costs.trace import ForwardCost, trace
from lowrank_core.files.tensors import read_shapes
from lowrank_diffusion import sdxl
from lowrank_diffusion.adapting import adapter_config, check_targets
from lowrank_diffusion.base_files import base_folder, check_base
from lowrank_diffusion.blocks import BLOCK, blocks_of
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.families import SDXL
from lowrank_diffusion.folder import missing_forms
from lowrank_diffusion.outline import outlined
from lowrank_diffusion.quantizing import Kind, bytes_of
from lowrank_diffusion.single_file import SingleFile, read_single_file, single_file

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_STATES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "adafactor": 1, "lion": 4, "schedulefree": 8}
"""Bytes that an optimizer keeps of each number; Adafactor's are few."""


@dataclass(frozen=True)
class RunPlan:
    """Bytes are estimates, of one process."""

    name: str
    method: str
    seed: int
    steps: int
    pictures_per_step: int
    pictures: int
    """Shown in all, those shown again included."""
    layers: int
    """Of the UNet, adapted."""
    trainable_params: int
    original_params: int
    """Of the UNet."""
    base_bytes: int
    """Frozen networks that stay on the device; of offloaded blocks the largest."""
    adapter_bytes: int
    """Factors, their gradients, the optimizer's state and the running average."""
    activation_bytes: int
    """What a forward keeps for the backward pass: about the inputs of all layers with weights."""
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Network:
    model: nn.Module
    cost: ForwardCost
    pixels: int
    """Side of the picture that the cost is for."""


def plan(config: DiffusionConfig, note: Callable[[str], None]) -> RunPlan:
    """Read the base's shapes, or take SDXL's where it is on the hub; no weight is loaded and nothing fetched.

    Raises:
        LowrankError: the base's folder is no SDXL.
        UsageError: what `check_targets` raises.
    """
    train, settings = config.train, config.adapter
    if (missing := missing_forms(config)) is not None:
        note(missing)
    file = single_file(config.base.path)
    single = None if file is None else read_single_file(file, has_vae=config.base.vae is None)
    described = config.base.path if single is None else config.base.config or single.family.repository
    local = described == "tiny" or Path(described).expanduser().exists()
    folder = base_folder(described, None, note, "base.path" if single is None else "base.config") if local else None
    if folder is None:
        note(f"{described} is not looked at: its networks are taken for SDXL's own")
        unet, family = _Network(*outlined("unet"), pixels=1024), SDXL if single is None else single.family
    else:
        family = check_base(folder, described, weights=single is None)
        unet = _read(folder)
    texts = [_text_model(folder, name) for name in family.encoders]
    adapted = dict(zip(family.encoders, texts, strict=True)) if settings.text_encoders else {}
    check_targets({"unet": unet.model} | adapted, settings)
    reports = [count_adapter(unet.model, adapter_config(settings, settings.target))]
    if settings.text_encoders:
        reports += [count_adapter(text, adapter_config(settings, settings.text_target)) for text in texts]
    trained = sum(report.trainable_params for report in reports)
    if config.pivotal.token is not None:
        trained += config.pivotal.vectors * sum(map(_embedding_width, texts))
    kept = texts if config.cache.text == "none" else []
    base_bytes = sum(_held(text, train.precision, "none") for text in kept)
    base_bytes += _held(unet.model, train.precision, config.base.quantize)
    if train.offload:
        blocks = [_held(block, train.precision, config.base.quantize) for block in blocks_of(unet.model).values()]
        largest = sorted(blocks, reverse=True)[: None if train.offload is True else train.offload]
        base_bytes -= sum(largest[1:])
    if config.cache.latents == "none":
        base_bytes += _vae_bytes(folder if single is None else single, train.precision)
    adapter_bytes = trained * (8 + _STATES[train.optimizer] + (0 if train.ema is None else 4))
    enlarged = (config.data.resolution / unet.pixels) ** 2
    activations = round(_kept(unet, int(train.checkpointing)) * enlarged) * train.batch_size * _BYTES[train.precision]
    per_step = train.batch_size * train.accumulate * train.processes
    return RunPlan(
        name=config.name,
        method=settings.described,
        seed=config.seed,
        steps=train.steps,
        pictures_per_step=per_step,
        pictures=per_step * train.steps,
        layers=len(reports[0].layers),
        trainable_params=trained,
        original_params=reports[0].original_params,
        base_bytes=base_bytes,
        adapter_bytes=adapter_bytes,
        activation_bytes=activations,
        peak_memory_bytes=base_bytes + adapter_bytes + activations,
    )


def _held(network: nn.Module, precision: str, quantized: Kind | Literal["none"]) -> int:
    """Bytes of a frozen network."""
    size = _BYTES[precision] * sum(parameter.numel() for parameter in network.parameters())
    if quantized != "none":
        for layer in network.modules():
            if type(layer) is nn.Linear:
                size += bytes_of(layer, quantized) - _BYTES[precision] * layer.weight.numel()
    return size


def _read(folder: Path) -> _Network:
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    if all(config.get(key) == (list(value) if isinstance(value, tuple) else value) for key, value in sdxl.UNET.items()):
        return _Network(*outlined("unet"), pixels=1024)
    # diffusers takes seconds to import.
    from lowrank_diffusion.folders import blank_from_config

    blank = blank_from_config(str(folder / "unet"), lambda _: None)
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    side = config["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    return _Network(blank.model, trace(blank.model, *blank.arguments, **blank.named), side)


def _text_model(folder: Path | None, name: str) -> nn.Module:
    if folder is None:
        return outlined(name)[0]
    config: dict[str, Any] = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    expected = sdxl.TEXT_ENCODER if name == "text_encoder" else sdxl.TEXT_ENCODER_2
    if all(config.get(key) == value for key, value in expected.items()):
        return outlined(name)[0]
    from lowrank_diffusion.folders import blank_from_config

    return blank_from_config(str(folder / name), lambda _: None).model


def _embedding_width(text: nn.Module) -> int:
    return next(module.embedding_dim for module in text.modules() if isinstance(module, nn.Embedding))


def _vae_bytes(base: Path | SingleFile | None, precision: str) -> int:
    if isinstance(base, Path):
        files = (base / "vae").glob("*.safetensors")
        numbers = sum(math.prod(shape) for file in files for shape in read_shapes(file).values())
    else:
        held = {} if base is None else base.shapes
        numbers = sum(math.prod(shape) for name, shape in held.items() if name.startswith(SDXL.prefixes["vae"]))
    return (numbers or 83_653_863) * (2 if precision == "bf16" else 4)  # or SDXL's


def _kept(unet: _Network, every: int) -> int:
    """How many numbers a forward of one picture keeps: the inputs of all layers, 0 for `every`.

    With checkpointing of every `every`-th block: each such block's own input, all of the largest, and all outside them.
    """
    inputs = {name: sum(math.prod(shape) for shape in call.inputs) for name, call in unet.cost.layers.items()}
    again = set(list(blocks_of(unet.model))[::every]) if every else set[str]()
    inside = {name: match[0] for name in inputs if (match := BLOCK.match(name)) and match[0] in again}
    blocks: dict[str, list[int]] = {}
    for name, block in inside.items():
        blocks.setdefault(block, []).append(inputs[name])
    outside = sum(count for name, count in inputs.items() if name not in inside)
    return outside + sum(first for first, *_ in blocks.values()) + max(map(sum, blocks.values()), default=0)
