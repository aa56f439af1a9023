"""A whole model in one file, as ComfyUI and A1111 have it: what it is, what it says of itself, how it is loaded.

Its tensors stand under their authors' names, which diffusers turns into its own. Of sizes and tokenizers it says
nothing, so these come from a diffusers folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowrank_core.errors import LowrankError
from lowrank_core.files.difference import FACTORS
from lowrank_core.files.tensors import open_tensors
from lowrank_diffusion.families import SD1, SDXL, TRAINED, Family

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_OTHERS = {
    "cond_stage_model.model.": "a Stable Diffusion 2",
    "conditioner.embedders.0.model.": "SDXL's refiner",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "a Flux",
    "edm_": "an SDXL that was trained with EDM's noise",
}
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@dataclass(frozen=True)
class Learned:
    """What a file says that its UNet predicts.

    prediction: None where it says nothing. zero_terminal_snr: over a schedule that ends in pure noise. sources: the
    tensors and metadata that say so.
    """

    prediction: Literal["epsilon", "v_prediction"] | None = None
    zero_terminal_snr: bool = False
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class SingleFile:
    """A checked file: the shapes of its tensors by name, and what it says of its predictions."""

    family: Family
    shapes: Mapping[str, tuple[int, ...]]
    learned: Learned


def single_file(path: str) -> Path | None:
    """The file that `base.path` or `base.vae` means; None for a folder, a hub id or `tiny`."""
    file = Path(path).expanduser()
    meant = file.is_file() or (file.suffix.lower() in _ENDINGS and not file.is_dir())
    return file if meant else None


def read_single_file(path: Path, *, has_vae: bool = True, option: str = "base.path") -> SingleFile:
    """What a file holds, from its header; no weight is read.

    Args:
        path: of the file.
        has_vae: whether it must hold a VAE.
        option: what the user gave it by, for what errors say.

    Raises:
        LowrankError: it is missing, a pickle, cut off, an adapter, of no family that is known, or lacks a network.
    """
    with open_tensors(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        metadata = dict(file.metadata() or {})
    if any(factor in name for name in shapes for factor in FACTORS):
        raise LowrankError(f"{path} is an adapter, and {option} takes the model below it; give a whole model")
    others = (what for start, what in _OTHERS.items() if any(name.startswith(start) for name in shapes))
    if (other := next(others, None)) or shapes.get(_FIRST, (0, 4))[1:2] != (4,):
        other = other or "a model for inpainting"
        raise LowrankError(f"{path} is {other}, and {TRAINED} as {option}")
    family = SD1 if any(name.startswith(SD1.prefixes["text_encoder"]) for name in shapes) else SDXL
    lacking = [
        part
        for part, start in family.prefixes.items()
        if (has_vae or part != "vae") and not any(name.startswith(start) for name in shapes)
    ]
    if lacking == ["vae"]:
        raise LowrankError(f"{path} holds no VAE; give one as base.vae (--vae)")
    if lacking:
        raise LowrankError(f"{path} lacks {family.name}'s {', '.join(lacking)}; give the file of a whole {family.name}")
    return SingleFile(family, shapes, _learned(shapes, metadata))


def _learned(shapes: Mapping[str, Any], metadata: Mapping[str, str]) -> Learned:
    """Marks of ComfyUI (comfy/supported_models.py, `SDXL.model_type`), empty tensors, before ModelSpec's and kohya's.

    A merge often carries the metadata of one of its parents, so the marks count more.
    """
    said = {key: metadata.get(key, "").lower() for key in (_SPEC, _KOHYA_V, _KOHYA_ZERO)}
    if "v_pred" in shapes:
        source = "its tensor v_pred"
    elif said[_SPEC] in ("v", "v_prediction"):
        source = _SPEC
    elif said[_KOHYA_V] == "true":
        source = _KOHYA_V
    else:
        return Learned("epsilon", sources=(_SPEC,)) if said[_SPEC] == "epsilon" else Learned()
    if "ztsnr" in shapes:
        return Learned("v_prediction", True, (source, "its tensor ztsnr"))
    if said[_KOHYA_ZERO] == "true":
        return Learned("v_prediction", True, (source, _KOHYA_ZERO))
    return Learned("v_prediction", sources=(source,))


_SPEC, _KOHYA_V, _KOHYA_ZERO = "modelspec.prediction_type", "ss_v_parameterization", "ss_zero_terminal_snr"


def load_single_file(
    path: Path, family: Family, folder: Path, vae: "AutoencoderKL | None", dtype: torch.dtype, vae_dtype: torch.dtype
) -> Any:
    """The pipeline of a checked file, with configurations, tokenizers and scheduler of a diffusers folder.

    Raises:
        ValueError: tensors are missing; and what diffusers raises where shapes do not go together.
    """
    pipeline: Any = getattr(import_module("diffusers"), family.pipeline).from_single_file(
        str(path),
        config=str(folder),
        vae=vae or load_single_vae(path, folder, vae_dtype),
        dtype=dtype,
        local_files_only=True,
        **family.options,
    )
    for name in family.networks:
        _check_filled(getattr(pipeline, name))
    return pipeline


def load_single_vae(path: Path, folder: Path, dtype: torch.dtype) -> "AutoencoderKL":
    """The VAE of a whole model's file, or of a file of its own, with the configuration in `folder`/vae.

    Raises:
        ValueError: as `load_single_file`.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    load: Any = AutoencoderKL.from_single_file
    vae = load(str(path), config=str(folder), subfolder="vae", dtype=dtype, local_files_only=True)
    _check_filled(vae)
    return vae


def _check_filled(network: torch.nn.Module) -> None:
    # diffusers leaves on the meta device what a file lacks.
    missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
