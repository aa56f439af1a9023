"""PEFT folders: adapter_config.json and adapter_model.safetensors, the four methods, in and out."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_core.adapters.config import AdaLoRA, AdapterConfig
from lowrank_core.adapters.patterns import by_ending
from lowrank_core.errors import LowrankError
from lowrank_core.files.bundle import AdapterFile, Component, ModuleAdapter
from lowrank_core.files.check import FACTOR_NAMES, check_factors, some
from lowrank_core.files.peft_config import from_json, to_json
from lowrank_core.files.tensors import read_tensors, write_json, write_tensors
from lowrank_core.parsing import parse_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"
COMPONENT_OF_CLASS: dict[str, Component] = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "te1",
    "CLIPTextModelWithProjection": "te2",
}
CLASS_OF_COMPONENT: dict[Component, dict[str, str]] = {
    "unet": {
        "base_model_class": "UNet2DConditionModel",
        "parent_library": "diffusers.models.unets.unet_2d_condition",
    },
    "te1": {"base_model_class": "CLIPTextModel", "parent_library": "transformers.models.clip.modeling_clip"},
    "te2": {
        "base_model_class": "CLIPTextModelWithProjection",
        "parent_library": "transformers.models.clip.modeling_clip",
    },
}
"""PEFT's `auto_mapping`."""
COMPONENT_OF_FOLDER: dict[str, Component] = {
    "unet": "unet",
    "text_encoder": "te1",
    "text_encoder_one": "te1",
    "text_encoder_2": "te2",
    "text_encoder_two": "te2",
}


def read_peft(folder: Path) -> AdapterFile:
    """Read a PEFT folder.

    Raises:
        LowrankError: a file is missing or damaged, a pickle stands in its place, keys belong to no module of the
            method, shapes do not fit together, or the JSON asks for something that is not supported.
    """
    config = from_json(_read_json(folder / CONFIG_NAME))
    path = folder / WEIGHTS_NAME
    pickle = next(iter(sorted(folder.glob("adapter_model.[bp]*"))), None)
    tensors, metadata = read_tensors(path if path.exists() or pickle is None else pickle)
    return from_peft_tensors(config, tensors, metadata, component_of(folder, config), path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LowrankError(f"there is no file {path}; a PEFT folder holds {CONFIG_NAME} and {WEIGHTS_NAME}") from None
    except ValueError as error:
        raise LowrankError(f"{path} is not JSON ({error}); copy or download it again") from None
    if not isinstance(fields, dict):
        raise LowrankError(f"{path} holds no JSON object; copy or download it again")
    return cast("dict[str, Any]", fields)


def component_of(folder: Path, config: AdapterConfig) -> Component:
    """Which model of a pipeline a PEFT folder belongs to, by what PEFT wrote down, else by its folder's name."""
    auto: Any = config.other_fields.get("auto_mapping") or {}
    known = COMPONENT_OF_CLASS.get(str(auto["base_model_class"])) if "base_model_class" in auto else None
    return known or COMPONENT_OF_FOLDER.get(folder.resolve().name, "")


def from_peft_tensors(
    config: AdapterConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], component: Component, path: Path
) -> AdapterFile:
    """What a PEFT state dict holds, by its keys."""
    names = FACTOR_NAMES[config.method]
    factors: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    foreign: list[str] = []
    for key, tensor in tensors.items():
        bare = key.removeprefix(_PREFIX)
        module, _, leaf = bare.removesuffix(".weight").rpartition(".")
        if leaf in names and module:
            factors.setdefault(module, {})[leaf] = tensor
        elif leaf == _MAGNITUDE and config.weight_decompose:
            magnitudes[module] = tensor.flatten()
        elif _is_saved(bare, config):
            saved[bare] = tensor
        else:
            foreign.append(key)
    if foreign:
        raise LowrankError(f"{path} has keys that belong to no {config.method} module: {some(foreign)}")
    if not factors:
        raise LowrankError(f"{path} holds no {config.method} factors; give the folder of a trained adapter")
    if lost := set(magnitudes) - set(factors):
        raise LowrankError(f"{path} has magnitudes without factors: {some(sorted(lost))}")
    modules: dict[str, ModuleAdapter] = {}
    configured = ranks_and_alphas(config, factors)
    for module, held in factors.items():
        rank = check_factors(config.method, module, held)
        if config.weight_decompose and module not in magnitudes:
            raise LowrankError(f"{path} has no {_MAGNITUDE} for {module}, which DoRA needs")
        said, alpha = configured[module]
        if rank not in (0, said) and config.method != "adalora":
            raise LowrankError(
                f"{module} has factors of rank {rank}, but {CONFIG_NAME} says {said}; restore the file that fits"
            )
        if config.method == "adalora":
            held = empty_row(held)
        modules[module] = ModuleAdapter(
            held, said, alpha, magnitudes.get(module), "out" if module in magnitudes else None
        )
    return AdapterFile(config, modules, saved, dict(metadata), component)


def _is_saved(key: str, config: AdapterConfig) -> bool:
    """Whether a key is a whole parameter: of `modules_to_save`, a bias where biases were trained, an embedding."""
    owner = key.rpartition(".")[0]
    named = any(re.search(rf"(^|\.){re.escape(name)}($|\.)", owner) for name in config.modules_to_save)
    # PEFT writes the embeddings that it adapts along with their adapters.
    embedded = owner.endswith(".base_layer") and key.endswith(".weight")
    return named or embedded or (config.other_fields.get("bias", "none") != "none" and key.endswith(".bias"))


def ranks_and_alphas(config: AdapterConfig, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
    """What a config's rank, alpha and patterns give modules; the first key that matches counts.

    Raises:
        UsageError: a pattern that is no regular expression, or that takes too long.
    """
    names = list(modules)
    ranks, _ = by_ending(names, config.rank_pattern, f"rank_pattern of {CONFIG_NAME}")
    alphas, _ = by_ending(names, config.alpha_pattern, f"alpha_pattern of {CONFIG_NAME}")
    return {name: (ranks.get(name, config.rank), alphas.get(name, config.alpha)) for name in names}


def peft_tensors(file: AdapterFile) -> dict[str, Tensor]:
    """The state dict of a PEFT folder.

    Kernels of one dimension keep PEFT's second, of one; DoRA's magnitudes get the shape of PEFT's norms.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in file.modules.items():
        for factor, tensor in module.factors.items():
            suffix = ".weight" if factor in ("lora_A", "lora_B") and file.config.method == "lora" else ""
            tensors[f"{_PREFIX}{name}.{factor}{suffix}"] = tensor
        if module.magnitude is not None:
            shape = magnitude_shape(module.factors.get("lora_A"))
            tensors[f"{_PREFIX}{name}.{_MAGNITUDE}"] = module.magnitude.reshape(shape)
    return tensors | {_PREFIX + name: tensor for name, tensor in file.saved.items()}


def magnitude_shape(down: Tensor | None) -> tuple[int, ...]:
    """Of PEFT's norms of a layer with this `lora_A`, None for an embedding."""
    return (1, -1, *(1,) * (down.dim() - 2)) if down is not None and down.dim() > 2 else (-1,)


def write_peft(file: AdapterFile, folder: Path) -> None:
    """Write a PEFT folder that `PeftModel.from_pretrained` of PEFT 0.21 loads.

    Raises:
        LowrankError: PEFT has no such form (see `to_json`), or the folder cannot be written to.
    """
    if isinstance(file.config, AdaLoRA):
        file = _with_kept_ranks(file, file.config)
    fields = to_json(file.config)
    write_tensors(folder / WEIGHTS_NAME, peft_tensors(file), {})
    # The JSON last: a folder without it is no adapter yet.
    write_json(folder / CONFIG_NAME, fields)


def _with_kept_ranks(file: AdapterFile, config: AdaLoRA) -> AdapterFile:
    """The bool lists by which PEFT knows that a module has shrunk, and a zero row where one would be empty."""
    patterns: dict[str, list[bool]] = {}
    if len(ranks := {module.rank for module in file.modules.values()}) > 1:
        raise LowrankError(
            "PEFT gives every AdaLoRA layer the same initial rank, but this adapter's rank_pattern gives "
            f'{", ".join(map(str, sorted(ranks)))}; write it as plain LoRA (format "lora"), which is exact, '
            "or leave rank_pattern out when you inject"
        )
    if len(alphas := {module.alpha for module in file.modules.values()}) > 1:
        raise LowrankError(
            "PEFT gives every AdaLoRA layer the same alpha, but this adapter's alpha_pattern gives "
            f'{", ".join(f"{alpha:g}" for alpha in sorted(alphas))}; write it as plain LoRA (format "lora"), which is '
            "exact, or leave alpha_pattern out when you inject"
        )
    filled = {name: replace(m, factors=empty_row(m.factors)) for name, m in file.modules.items()}
    file = replace(file, modules=filled)
    for name, module in filled.items():
        kept = module.factors["lora_A"].shape[0]
        if kept < module.rank:
            patterns[f"{name}.lora_E"] = [row < kept for row in range(module.rank)]
    given: Any = config.other_fields.get("rank_pattern")
    if patterns and (not given or any(sum(given.get(n, ())) != sum(mask) for n, mask in patterns.items())):
        full = {f"{n}.lora_E": [True] * m.rank for n, m in file.modules.items()} | patterns
        return replace(file, config=replace(config, other_fields={**config.other_fields, "rank_pattern": full}))
    return file


def empty_row(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdaLoRA's factors with one row that adds nothing, for a layer of which every row is pruned."""
    down, up, values = factors["lora_A"], factors["lora_B"], factors["lora_E"]
    if down.shape[0]:
        return dict(factors)
    return {
        "lora_A": down.new_zeros(1, down.shape[1]),
        "lora_B": up.new_zeros(up.shape[0], 1),
        "lora_E": values.new_zeros(1, 1),
    }


def dtype_of(file: AdapterFile) -> torch.dtype:
    """The widest dtype of a file's factors."""
    dtypes = {tensor.dtype for module in file.modules.values() for tensor in module.factors.values()}
    result = dtypes.pop()
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result
