"""The frozen SDXL below an adapter: from a diffusers folder, the hub, or this package."""

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lowrank_core.errors import LowrankError
from lowrank_core.parsing import parse_json
from lowrank_diffusion.config import BaseConfig
from lowrank_diffusion.encoding import vae_dtype
from lowrank_diffusion.identity import source_identity

# diffusers takes ten seconds to import, and looking at a base's shapes does not need it.
if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

Note = Callable[[str], None]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_TINY = Path(str(files("lowrank_diffusion") / "tiny" / "weights"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names of `train.precision`."""
_NETWORKS = ("unet", "text_encoder", "text_encoder_2", "vae")


def load_base(
    path: str,
    vae: str | None,
    revision: str | None,
    dtype: torch.dtype,
    note: Note,
    *,
    option: str = "base.path",
    vae_option: str = "base.vae",
) -> "StableDiffusionXLPipeline":
    """An SDXL on the CPU, frozen, in evaluation mode. Only safetensors are read, and no code that comes with them.

    After the tiny one, torch computes with one thread in this process.

    Args:
        path: a diffusers folder, a hub id, or `tiny`, as `base.path` has it.
        vae: a VAE of its own, as folder or hub id; None is the base's.
        revision: of the hub's repository.
        dtype: of the UNet and the text encoders. The VAE is in fp32 unless this is bf16, since
            SDXL's overflows in fp16.
        note: told of downloads before they begin.
        option, vae_option: what the user gave `path` and `vae` by, for what errors say.

    Raises:
        LowrankError: there is no such folder or repository, it is no SDXL, or its weights are no safetensors.
    """
    folder = base_folder(path, revision, note, option)
    check_sdxl(folder, path, option)
    if path == "tiny":
        # Its products are too small to share: a second core makes it a tenth faster, and a hundred times slower where
        # another program holds that core, because threads wait for each other at every product.
        torch.set_num_threads(1)
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    for_vae = vae_dtype("bf16" if dtype == torch.bfloat16 else "fp32")
    own_vae = None if vae is None else _load_vae(vae, for_vae, note, vae_option)
    loaded: Any = {} if own_vae is None else {"vae": own_vae}
    make: Any = StableDiffusionXLPipeline
    try:
        with _no_progress_bars():
            pipeline = make.from_pretrained(
                folder,
                dtype={"default": dtype, "vae": for_vae},
                use_safetensors=True,
                variant=_variant(folder),
                local_files_only=True,
                add_watermarker=False,
                **loaded,
            )
    # The libraries raise errors of every kind for files that are missing, cut off or of another model.
    except Exception as error:
        raise LowrankError(
            f"the base model {path} cannot be loaded ({_reason(error)}); give the folder of a whole SDXL, "
            "saved as safetensors by diffusers"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for name in _NETWORKS:
        getattr(pipeline, name).requires_grad_(False).eval()
    return pipeline


def base_folder(path: str, revision: str | None, note: Note, option: str = "base.path") -> Path:
    """Where the base's files lie, after a download if need be.

    Raises:
        LowrankError: nowhere.
    """
    if path == "tiny":
        return _TINY
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() or not _HUB_ID.fullmatch(path):
        found = "a file" if folder.is_file() else "no folder that exists"
        raise LowrankError(
            f"{option} is {path}, which is {found}; give a diffusers folder of an SDXL, a hub id such as "
            "stabilityai/stable-diffusion-xl-base-1.0, or tiny"
        )
    return _downloaded(path, revision, note, option)


def identity_of(base: BaseConfig, parts: Sequence[str]) -> dict[str, Any]:
    """These parts of a base that has been loaded, told from all others; `["vae"]` is `base.vae` where there is one.

    Raises:
        LowrankError: they are gone.
    """
    if list(parts) == ["vae"] and base.vae is not None:
        own = Path(base.vae).expanduser()
        return source_identity(base.vae if not own.is_dir() else str(own))
    path = str(_TINY) if base.path == "tiny" else base.path
    folder = Path(path).expanduser()
    return source_identity(str(folder) if folder.is_dir() else path, base.revision, parts)


def check_sdxl(folder: Path, path: str, option: str = "base.path") -> None:
    """Refuse what is not an SDXL before its weights are read.

    Raises:
        LowrankError: the folder is no pipeline, another one's, or lacks a part.
    """
    index = folder / "model_index.json"
    try:
        kind = parse_json(index.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        raise LowrankError(
            f"{path} is no diffusers folder: there is no readable model_index.json in it; give the folder of an SDXL "
            "as diffusers saves it"
        ) from None
    if not str(kind).startswith("StableDiffusionXL"):
        raise LowrankError(f"{path} is a {kind}, and adapters are trained for SDXL; give an SDXL as {option}")
    if lacking := [part for part in _PARTS if not (folder / part).is_dir()]:
        raise LowrankError(f"{path} lacks {', '.join(lacking)}; give the folder of a whole SDXL")
    if without := [part for part in _NETWORKS if not any((folder / part).glob("*.safetensors"))]:
        raise LowrankError(
            f"{path} has no safetensors in {', '.join(without)}, and nothing else is read; save it as safetensors"
        )


def decoded(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Pictures of latents as the UNet gives them, `(n, channels, height, width)`; in the VAE's own dtype."""
    from diffusers.image_processor import VaeImageProcessor

    config = vae.config
    latents = latents.to(vae.device, torch.float32) / config.scaling_factor
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[key], device=vae.device) for key in ("latents_mean", "latents_std"))
        latents = latents * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    with torch.no_grad():
        # One at a time: at 1024x1024 decoding takes more memory than anything else.
        pixels = torch.cat([vae.decode(one[None].to(vae.dtype)).sample.float().cpu() for one in latents])
    made: Any = VaeImageProcessor().postprocess(pixels, output_type="pil")
    return made


def _load_vae(source: str, dtype: torch.dtype, note: Note, option: str) -> "AutoencoderKL":
    folder = Path(source).expanduser()
    if not folder.is_dir() and not _HUB_ID.fullmatch(source):
        raise LowrankError(f"{option} is {source}, and there is no such folder; give a VAE's folder or a hub id")
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
    if not folder.is_dir():
        note(f"fetching the VAE {source} from the Hugging Face hub, unless it is in the hub's cache")
        where = {"pretrained_model_name_or_path": source}
    elif (folder / "vae").is_dir():
        where["subfolder"] = "vae"
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    load: Any = AutoencoderKL.from_pretrained
    try:
        with _no_progress_bars():
            return load(**where, dtype=dtype, use_safetensors=True)
    except Exception as error:
        raise LowrankError(
            f"{option} {source} cannot be loaded ({_reason(error)}); give the folder or hub id of an AutoencoderKL "
            "in safetensors"
        ) from error


def _downloaded(path: str, revision: str | None, note: Note, option: str) -> Path:
    note(
        f"fetching {path}{f' at {revision}' if revision else ''} from the Hugging Face hub, unless it is in the hub's "
        "cache; an SDXL has some 7 GB, in fp32 14"
    )
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    download: Any = StableDiffusionXLPipeline.download
    try:
        return Path(download(path, revision=revision, use_safetensors=True))
    except Exception as error:
        raise LowrankError(
            f"{path} cannot be fetched from the Hugging Face hub ({_reason(error)}), and there is no such folder here; "
            f"check the name and the network, or give a local folder as {option}"
        ) from error


@contextmanager
def _no_progress_bars() -> Generator[None]:
    """Silences the libraries' own bars, and gives them back to who wanted them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggings: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    shown = [logging for logging in loggings if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()


def _variant(folder: Path) -> str | None:
    """`fp16` where a folder holds nothing else."""
    names = [file.name for file in (folder / "unet").glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _reason(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
