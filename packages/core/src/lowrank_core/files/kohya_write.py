"""Writing the single files that kohya's sd-scripts, LyCORIS and ComfyUI read."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from lowrank_core.adapters.config import LoKr
from lowrank_core.errors import LowrankError
from lowrank_core.files.bundle import AdapterFile, Component, Layers, is_tucker
from lowrank_core.files.check import some
from lowrank_core.files.kohya import CONFIGS_KEY, MODULES_KEY
from lowrank_core.files.kron import wrapped_sides
from lowrank_core.files.names import file_name
from lowrank_core.files.peft_config import to_json
from lowrank_core.files.sdxl import is_sdxl, layers_per_block
from lowrank_core.files.tensors import write_tensors

_LEAVES = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}
_NETWORKS = {"lora": "networks.lora", "loha": "lycoris.kohya", "lokr": "lycoris.kohya"}
_CORES = ("hada_t1", "hada_t2", "lokr_t2")


def write_kohya(
    files: Sequence[AdapterFile],
    path: Path,
    layers: Mapping[Component, Layers] | None = None,
    *,
    block_names: str = "sgm",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write LoRA, LoHa or LoKr adapters of one or several models into a file.

    layers: the models' layers, where they are at hand; they say how many residual blocks a small U-Net has, and which
        kernels have one dimension.
    block_names: `sgm` (kohya's, which every reader of SDXL files knows) or `diffusers`, as it always is for Stable
        Diffusion 1.
    metadata: entries to add to the usual ones, such as a title.

    Raises:
        LowrankError: an AdaLoRA, a Tucker LoRA with nothing to say it, embeddings or modules that were trained whole,
            which such files have no place for; two modules with one name.
    """
    tensors, entries = kohya_tensors(files, layers, block_names=block_names)
    write_tensors(path, tensors, {**entries, **(metadata or {})})


def kohya_tensors(
    files: Sequence[AdapterFile], layers: Mapping[Component, Layers] | None = None, *, block_names: str = "sgm"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of such a file."""
    tensors: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    sdxl = all(is_sdxl((layers or {}).get("unet", file.modules)) for file in files if file.component == "unet")
    for file in files:
        _check(file)
        at_hand = (layers or {}).get(file.component)
        depth = layers_per_block(at_hand) if at_hand is not None else 2
        for name in file.modules:
            flat = file_name(name, file.component, sgm=sdxl and block_names == "sgm", layers=depth, alone=not sdxl)
            if flat in modules:
                raise LowrankError(f"{name} and {modules[flat]} would both be called {flat}; write a PEFT folder")
            modules[flat] = name
            dimensions = len(at_hand[name].kernel) if at_hand is not None and name in at_hand else None
            for leaf, tensor in _leaves(file, name, dimensions).items():
                tensors[f"{flat}.{leaf}"] = tensor
    configs = {file.component: to_json(file.config) for file in files if not _beyond_peft(file)}
    entries = {**_described(files, tensors, sdxl), MODULES_KEY: json.dumps(modules)}
    return tensors, {**entries, CONFIGS_KEY: json.dumps(configs)} if configs else entries


def _check(file: AdapterFile) -> None:
    if file.config.method not in _NETWORKS:
        raise LowrankError(f"kohya files have no {file.config.method}; convert it to plain LoRA first, which is exact")
    if file.saved:
        raise LowrankError(
            f"kohya files have no place for modules trained whole ({some(file.saved, 2)}); write a PEFT folder"
        )
    if embedded := [name for name, module in file.modules.items() if "lora_embedding_A" in module.factors]:
        raise LowrankError(f"kohya files have no place for embeddings ({some(embedded, 2)}); write a PEFT folder")


def _beyond_peft(file: AdapterFile) -> bool:
    """Whether PEFT has no configuration for it; the file then says all there is to say by itself."""
    config = file.config
    other_dora = config.weight_decompose is not None and (config.method != "lora" or config.weight_decompose == "in")
    return other_dora or (config.method == "lora" and is_tucker(config))


def _leaves(file: AdapterFile, name: str, dimensions: int | None) -> dict[str, Tensor]:
    """What the file says of one module; alpha so that alpha / rank is the scale, whatever rule it came from.

    dimensions: the kernel's, where the layer is known.
    """
    module, scaling = file.modules[name], file.scaling(name)
    factors = dict(module.factors)
    if isinstance(file.config, LoKr):
        factors, alpha = wrapped_sides(factors, scaling, module.rank)
    else:
        # The module's own alpha where it is the same, for that is what a reader of the file expects to see.
        alpha = scaling * module.rank if file.config.rank_stabilized else module.alpha
    if dimensions == 1:
        # LyCORIS stores kernels of one dimension as they are, PEFT with a second one.
        factors = {key: t.squeeze(-1) if key in _CORES and t.dim() == 4 else t for key, t in factors.items()}
    leaves = {"alpha": torch.tensor(float(alpha))} | {_LEAVES.get(key, key): t for key, t in factors.items()}
    if module.magnitude is not None:
        # A flat convolution does not show its kernel; the shape that its magnitude came in may.
        shown = max(_kernel_dimensions(module.factors), module.magnitude.dim() - 2)
        ones = (1,) * (shown if dimensions is None else dimensions)
        leaves["dora_scale"] = module.magnitude.reshape((1, -1, *ones) if module.axis == "in" else (-1, 1, *ones))
    return leaves


def _kernel_dimensions(factors: Mapping[str, Tensor]) -> int:
    """How many dimensions of a kernel the factors themselves show."""
    shown = ("lora_A", "lora_mid", "hada_t1", "lokr_t2", "lokr_w2")
    return max((factors[key].dim() - 2 for key in shown if key in factors), default=0)


def _described(files: Sequence[AdapterFile], tensors: Mapping[str, Tensor], sdxl: bool) -> dict[str, str]:
    """What sd-scripts and ComfyUI's model managers read, all strings."""
    first = files[0]
    config = first.config
    named = any(file.component in ("unet", "te2") for file in files)
    arguments: dict[str, Any] = {"algo": config.method}
    if isinstance(config, LoKr):
        arguments |= {"factor": str(config.factor), "decompose_both": str(config.decompose_both)}
    if is_tucker(config):
        arguments["use_tucker"] = "True"
    if config.weight_decompose:
        arguments |= {"dora_wd": "True", "wd_on_output": str(config.weight_decompose == "out")}
    lycoris = config.method != "lora" or is_tucker(config)
    entries = {
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": f"{config.scaling(config.rank, config.alpha) * config.rank:g}",
        "ss_network_args": json.dumps(arguments),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
        if named and sdxl
        else "diffusers",
        "sshs_model_hash": _hash(tensors),
    }
    if named:
        entries |= {
            "ss_v2": "False",
            "ss_base_model_version": "sdxl_base_v1-0" if sdxl else "sd_v1",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora" if sdxl else "stable-diffusion-v1/lora",
            "modelspec.prediction_type": "epsilon",
            "modelspec.resolution": "1024x1024" if sdxl else "512x512",
        }
    given = {key: value for key, value in first.metadata.items() if key.startswith(("ss_", "modelspec."))}
    return {**entries, **{key: value for key, value in given.items() if key not in _OURS}}


_OURS = {"ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """As model managers take it: of the tensors' bytes without the header, so that a title does not change it."""
    content = serialise({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    return hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
