"""The frozen model below an adapter: from a diffusers folder, one file, the hub, or this package."""

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lowrank_core.errors import LowrankError
from lowrank_core.files.tensors import check_readable
from lowrank_diffusion.base_files import HUB_ID, Note, base_folder, check_base, config_folder, reason
from lowrank_diffusion.encoding import vae_dtype
from lowrank_diffusion.families import SDXL, Family
from lowrank_diffusion.infer.schedulers import make_scheduler
from lowrank_diffusion.single_file import Learned, load_single_file, load_single_vae, read_single_file, single_file

# diffusers takes ten seconds to import, and looking at a base's shapes does not need it.
if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names of `train.precision`."""


def load_base(
    path: str,
    vae: str | None,
    revision: str | None,
    dtype: torch.dtype,
    note: Note,
    *,
    config: str | None = None,
    option: str = "base.path",
    vae_option: str = "base.vae",
    config_option: str = "base.config",
) -> Any:
    """Diffusers' pipeline of a base, on the CPU, frozen, in evaluation mode.

    Only safetensors are read, and no code that comes with them.

    After the tiny one, torch computes with one thread in this process.

    Args:
        path: a diffusers folder, a whole model's file, a hub id, or `tiny`, as `base.path` has it.
        vae: a VAE of its own, as folder, file or hub id; None is the base's.
        revision: of the hub's repository.
        dtype: of the UNet and the text encoders. The VAE is in fp32 unless this is bf16, since
            SDXL's overflows in fp16.
        note: told of downloads before they begin, and of what the base predicts where that is not plain noise.
        config: where a single file's configurations and tokenizers are; see `config_folder`.
        option, vae_option, config_option: what the user gave `path`, `vae` and `config` by, for what errors say.

    Raises:
        LowrankError: there is no such folder, file or repository, it is of no family that is known, or its weights are
            no safetensors.
    """
    file = single_file(path)
    learned, family = None, SDXL
    if file is not None:
        held = read_single_file(file, has_vae=vae is None, option=option)
        learned, family = held.learned, held.family
        folder = config_folder(config, family, revision, note, config_option)
    else:
        folder = base_folder(path, revision, note, option)
        family = check_base(folder, path, option)
    if "tiny" in (path, config):
        # Its products are too small to share: a second core makes it a tenth faster, and a hundred times slower where
        # another program holds that core, because threads wait for each other at every product.
        torch.set_num_threads(1)
    for_vae = vae_dtype("bf16" if dtype == torch.bfloat16 else "fp32")
    own_vae = None if vae is None else _load_vae(vae, folder, for_vae, note, vae_option)
    try:
        with _quiet():
            if file is None:
                pipeline: Any = _load_folder(folder, family, own_vae, dtype, for_vae)
            else:
                pipeline = load_single_file(file, family, folder, own_vae, dtype, for_vae)
    # The libraries raise errors of every kind for files that are missing, cut off or of another model.
    except Exception as error:
        whole = f"the folder of a whole {family.name}, saved as safetensors by diffusers"
        if file is not None:
            whole = f"the file of a whole {family.name}, and as {config_option} a folder with its configuration"
        raise LowrankError(f"the base model {path} cannot be loaded ({reason(error)}); give {whole}") from error
    if learned is not None:
        pipeline.scheduler = make_scheduler(pipeline.scheduler, None, learned)
    _tell(path, pipeline.scheduler.config, learned, note)
    pipeline.set_progress_bar_config(disable=True)
    for name in family.networks:
        getattr(pipeline, name).requires_grad_(False).eval()
    return pipeline


def _tell(path: str, scheduler: Any, learned: Learned | None, note: Note) -> None:
    """Say what the base predicts, where that is not what every SDXL in a folder does."""
    predicted = scheduler.get("prediction_type", "epsilon")
    rescaled = bool(scheduler.get("rescale_betas_zero_snr"))
    if learned is None and predicted == "epsilon" and not rescaled:
        return
    what = {"epsilon": "noise", "v_prediction": "v"}.get(predicted, predicted)
    over = " over a schedule that ends in pure noise" if rescaled else ""
    if learned is not None and not learned.sources:
        note(f"{path} does not say what it predicts; it is taken to predict {what}{over}, as its configuration has it")
    else:
        sources = learned.sources if learned is not None else ("its scheduler's configuration",)
        note(f"{path} predicts {what}{over}, as {' and '.join(sources)} {'say' if len(sources) > 1 else 'says'}")


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


def _load_folder(
    folder: Path, family: Family, vae: "AutoencoderKL | None", dtype: torch.dtype, vae_dtype: torch.dtype
) -> Any:
    make: Any = getattr(import_module("diffusers"), family.pipeline)
    return make.from_pretrained(
        folder,
        dtype={"default": dtype, "vae": vae_dtype},
        use_safetensors=True,
        variant=_variant(folder),
        local_files_only=True,
        **family.options,
        **({} if vae is None else {"vae": vae}),
    )


def _load_vae(source: str, base: Path, dtype: torch.dtype, note: Note, option: str) -> "AutoencoderKL":
    """A VAE of its own; one in a single file has the configuration of the base's."""
    folder, file = Path(source).expanduser(), single_file(source)
    if file is not None:
        check_readable(file)
    elif not folder.is_dir() and not HUB_ID.fullmatch(source):
        raise LowrankError(
            f"{option} is {source}, and there is no such folder; give a VAE's folder, its file or a hub id"
        )
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
    if file is None and not folder.is_dir():
        note(f"fetching the VAE {source} from the Hugging Face hub, unless it is in the hub's cache")
        where = {"pretrained_model_name_or_path": source}
    elif (folder / "vae").is_dir():
        where["subfolder"] = "vae"
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    load: Any = AutoencoderKL.from_pretrained
    try:
        with _quiet():
            if file is not None:
                return load_single_vae(file, base, dtype)
            return load(**where, dtype=dtype, use_safetensors=True)
    except Exception as error:
        raise LowrankError(
            f"{option} {source} cannot be loaded ({reason(error)}); give the folder, file or hub id of an "
            "AutoencoderKL in safetensors"
        ) from error


@contextmanager
def _quiet() -> Generator[None]:
    """Silences the libraries' own bars and diffusers' warnings, and gives them back to who wanted them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggings: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    shown = [logging for logging in loggings if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        for logging in shown:
            logging.enable_progress_bar()


def _variant(folder: Path) -> str | None:
    """`fp16` where a folder holds nothing else."""
    names = [file.name for file in (folder / "unet").glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None
