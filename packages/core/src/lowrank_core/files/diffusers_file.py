"""diffusers' LoRA files (`pytorch_lora_weights.safetensors`): `unet.<module>.lora_A.weight` and the like."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lowrank_core.adapters.config import LoRA
from lowrank_core.errors import LowrankError, shortened
from lowrank_core.files.bundle import AdapterFile, Component, ModuleAdapter, with_patterns
from lowrank_core.files.check import check_factors, some
from lowrank_core.files.names import Names, fit, names_for, with_text_level
from lowrank_core.files.peft import magnitude_shape, ranks_and_alphas
from lowrank_core.files.peft_config import from_json
from lowrank_core.files.tensors import stored_dtype, write_tensors
from lowrank_core.parsing import parse_json

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_METADATA_KEY = "lora_adapter_metadata"
_PREFIX_OF: dict[Component, str] = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}
_LEAVES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora.down.weight": "lora_A",
    "lora.up.weight": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha",
}


def is_diffusers(keys: Mapping[str, Any]) -> bool:
    """Whether the keys are those of such a file: some end in a LoRA's factor, with dots in the module's name."""
    endings = (".lora_A.weight", ".lora.down.weight")
    return any(key.endswith(endings) and not key.startswith("base_model.") for key in keys)


def read_diffusers(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    known: Names | None = None,
    *,
    whole: bool = False,
) -> list[AdapterFile]:
    """The LoRAs in a file, one for each model; a file without configuration has scale 1 in every module.

    known, whole: as for `read_kohya`.

    Raises:
        LowrankError: keys that are no LoRA's, factors that are missing or do not fit, modules the model does not have.
    """
    parts: defaultdict[Component, defaultdict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    foreign: list[str] = []
    for key, tensor in tensors.items():
        ending = next((leaf for leaf in _LEAVES if key.endswith("." + leaf)), None)
        if ending is None:
            foreign.append(key)
            continue
        component, module = _component(key.removesuffix("." + ending))
        parts[component][module][_LEAVES[ending]] = tensor
    if foreign:
        raise LowrankError(f"{path} has keys that belong to no LoRA module: {some(foreign)}")
    configured = _configured(metadata, path)
    files: list[AdapterFile] = []
    for component, modules in parts.items():
        at_hand = names_for(component, known, single=len(parts) == 1, whole=whole)
        if known is not None and at_hand is None:
            continue
        file = _file(modules, configured.get(component), metadata, component)
        files.append(file if at_hand is None else file.renamed(fit(file.modules, component, at_hand)))
    return files


def _component(module: str) -> tuple[Component, str]:
    for component, prefix in _PREFIX_OF.items():
        if module.startswith(prefix):
            return component, module.removeprefix(prefix)
    return "", module


def _configured(metadata: Mapping[str, str], path: Path) -> dict[Component, dict[str, Any]]:
    """The fields of each model's LoraConfig, which newer versions of diffusers write into the metadata."""
    try:
        fields = parse_json(metadata.get(_METADATA_KEY, "{}"))
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise LowrankError(
            f"{path} has {_METADATA_KEY} in its metadata that is not JSON; write the file anew"
        ) from None
    found: dict[Component, dict[str, Any]] = {}
    for component, prefix in _PREFIX_OF.items():
        own = {
            key.removeprefix(prefix): value
            for key, value in cast("dict[str, Any]", fields).items()
            if key.startswith(prefix)
        }
        if own:
            found[component] = {**own, "peft_type": "LORA"}
    return found


def _alpha(name: str, tensor: Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else 0.0
    if not (math.isfinite(alpha) and alpha > 0):
        found = cast("Any", tensor).tolist()
        raise LowrankError(f"{name} has alpha {shortened(str(found))}, expected a positive number; correct it")
    return alpha


def _file(
    held: Mapping[str, dict[str, Tensor]], fields: dict[str, Any] | None, metadata: Mapping[str, str], part: Component
) -> AdapterFile:
    config = from_json(fields) if fields is not None else None
    configured = ranks_and_alphas(config, held) if config is not None else {}
    modules: dict[str, ModuleAdapter] = {}
    for name, each in held.items():
        factors = {key: tensor for key, tensor in each.items() if key in ("lora_A", "lora_B")}
        rank = check_factors("lora", name, factors)
        if config is not None:
            rank, alpha = configured[name]
            if ("magnitude" in each) != (config.weight_decompose is not None):
                what = "has a magnitude" if "magnitude" in each else "has no magnitude"
                raise LowrankError(f"{name} {what}, but the file's metadata says otherwise; write the file anew")
        else:
            alpha = _alpha(name, each["alpha"]) if "alpha" in each else rank
        magnitude = each.get("magnitude")
        flat = None if magnitude is None else magnitude.flatten()
        modules[name] = ModuleAdapter(factors, rank, alpha, flat, None if magnitude is None else "out")
    if config is None:
        decomposed = any(module.magnitude is not None for module in modules.values())
        config = with_patterns(LoRA(target_modules=[]), modules, weight_decompose="out" if decomposed else None)
    return AdapterFile(config, modules, {}, dict(metadata), part)


def write_diffusers(files: Sequence[AdapterFile], path: Path) -> None:
    """Write LoRAs for diffusers' `load_lora_weights`, with DoRA's magnitudes where they are along the outputs.

    diffusers reads a module's rank from its factors and takes the scale for 1, so a scale of another value is
    multiplied into A, in float64 and rounded once.

    Raises:
        LowrankError: adapters that are no LoRA, or have magnitudes along the inputs, of a model that diffusers has no
            name for, or with modules trained whole.
    """
    write_tensors(path, diffusers_tensors(files), {})


def diffusers_tensors(files: Sequence[AdapterFile]) -> dict[str, Tensor]:
    """The tensors of such a file."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not isinstance(file.config, LoRA) or file.config.tucker or file.config.weight_decompose == "in":
            raise LowrankError(
                "diffusers reads LoRA alone, and of DoRA's magnitudes those of the outputs; convert the adapter to "
                "LoRA first, or merge it"
            )
        if file.saved:
            raise LowrankError(f"diffusers' LoRA files have no place for modules trained whole: {some(file.saved)}")
        if file.component not in _PREFIX_OF:
            raise LowrankError(
                "diffusers needs to know which model an adapter is for, and this one does not say; "
                "name its folder unet, text_encoder or text_encoder_2"
            )
        prefix = _PREFIX_OF[file.component]
        for name, module in file.modules.items():
            path = prefix + (with_text_level(name) if file.component != "unet" else name)
            scaling = file.scaling(name)
            if "lora_A" not in module.factors:
                raise LowrankError(f"diffusers' LoRA files have no place for embeddings ({name}); write a PEFT folder")
            down = module.factors["lora_A"]
            if scaling != 1:
                down = (down.double() * scaling).to(stored_dtype(down))
            tensors[f"{path}.lora_A.weight"] = down
            tensors[f"{path}.lora_B.weight"] = module.factors["lora_B"].to(down.dtype)
            if module.magnitude is not None:
                # Without `weight`, as PEFT writes it, transformers 5 would not find those of text encoders.
                tensors[f"{path}.lora_magnitude_vector.weight"] = module.magnitude.reshape(magnitude_shape(down))
    return tensors
