"""Where a base's files lie: in a folder or a file, on the hub, or in this package; and what tells bases apart."""

import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowrank_core.errors import LowrankError, shortened
from lowrank_core.parsing import parse_json
from lowrank_diffusion.config import BaseConfig
from lowrank_diffusion.families import SD1, SDXL, TRAINED, Family, family_named
from lowrank_diffusion.identity import source_identity
from lowrank_diffusion.single_file import read_single_file, single_file

Note = Callable[[str], None]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TINY = Path(str(files("lowrank_diffusion") / "tiny" / "weights"))


def base_folder(path: str, revision: str | None, note: Note, option: str = "base.path") -> Path:
    """Where the base's files lie, after a download if need be.

    Raises:
        LowrankError: nowhere.
    """
    folder = _local(path, option, "a diffusers folder or the file of an SDXL")
    if folder is not None:
        return folder
    note(
        f"fetching {path}{f' at {revision}' if revision else ''} from the Hugging Face hub, unless it is in the hub's "
        "cache; an SDXL has some 7 GB, in fp32 14"
    )
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    download: Any = DiffusionPipeline.download
    try:
        return Path(download(path, revision=revision, use_safetensors=True, safety_checker=None))
    except Exception as error:
        raise LowrankError(
            f"{path} cannot be fetched from the Hugging Face hub ({reason(error)}), and there is no such folder here; "
            f"check the name and the network, or give a local folder as {option}"
        ) from error


def config_folder(
    config: str | None, family: Family, revision: str | None, note: Note, option: str = "base.config"
) -> Path:
    """Where the configurations and tokenizers lie that a single file is read with; weights are not fetched.

    Args:
        config: a diffusers folder, a hub id or `tiny`; None is the family's own on the hub.
        family: of the file.
        revision: of the hub's repository.
        note: told of a download.
        option: what the user gave `config` by.

    Raises:
        LowrankError: nowhere, or they are another family's.
    """
    source = config or family.repository
    folder = _local(source, option, f"the diffusers folder of a whole {family.name}")
    if folder is None:
        note(f"fetching the configurations and tokenizers of {source}, a few MB, unless they are in the hub's cache")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.txt"]))
        # The hub's errors are many, of several libraries, and all mean that there are no files.
        except Exception as error:
            raise LowrankError(
                f"a single file holds neither configurations nor tokenizers, and those of {source} cannot be fetched "
                f"from the Hugging Face hub ({reason(error)}); give the diffusers folder of a whole {family.name} as "
                f"{option}"
            ) from error
    found = check_base(folder, source, option, weights=False)
    if found is not family:
        raise LowrankError(
            f"{source} is of {found.name}, and the file is of {family.name}; give such a one as {option}"
        )
    return folder


def _local(path: str, option: str, wanted: str) -> Path | None:
    """The folder here; None if the hub is to have it."""
    if path == "tiny":
        return _TINY
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() or not HUB_ID.fullmatch(path):
        found = "a file" if folder.is_file() else "no folder that exists"
        raise LowrankError(
            f"{option} is {path}, which is {found}; give {wanted}, a hub id such as {SDXL.repository}, or tiny"
        )
    return None


def identity_of(base: BaseConfig, parts: Sequence[str]) -> dict[str, Any]:
    """These parts of a base that has been loaded, told from all others; `["vae"]` is `base.vae` where there is one.

    A single file counts as a whole, with the parts of its configuration.

    Raises:
        LowrankError: they are gone.
    """
    own_vae = base.vae if list(parts) == ["vae"] else None
    if own_vae is not None and single_file(own_vae) is None:
        return source_identity(_expanded(own_vae))
    file = single_file(own_vae or base.path)
    whole = single_file(base.path)
    configured = base.path
    if whole is not None:
        configured = base.config or read_single_file(whole, has_vae=False).family.repository
    identity = source_identity(_expanded(configured), base.revision, parts)
    return identity if file is None else {**source_identity(str(file)), "configuration": identity}


def _expanded(source: str) -> str:
    if source == "tiny":
        return str(_TINY)
    folder = Path(source).expanduser()
    return str(folder) if folder.is_dir() else source


def check_base(folder: Path, path: str, option: str = "base.path", *, weights: bool = True) -> Family:
    """What a folder holds; refuses what cannot be fine-tuned before its weights are read.

    Args:
        folder: where the files are.
        path: what the user gave, by `option`.
        option: for what errors say.
        weights: whether they must be there.

    Raises:
        LowrankError: the folder is no pipeline, another one's, or lacks a part.
    """
    index = folder / "model_index.json"
    try:
        kind = str(parse_json(index.read_text(encoding="utf-8")).get("_class_name"))
    except (OSError, ValueError, AttributeError):
        raise LowrankError(
            f"{path} is no diffusers folder: there is no readable model_index.json in it; give the folder of an SDXL "
            "or Stable Diffusion 1 as diffusers saves it"
        ) from None
    family = family_named(kind)
    if family is None:
        raise LowrankError(f"{path} is a {shortened(kind)}, and {TRAINED} as {option}")
    if family is SD1 and _text_width(folder) == 1024:
        raise LowrankError(f"{path} is a Stable Diffusion 2, and {TRAINED} as {option}")
    if lacking := [part for part in family.parts if not (folder / part).is_dir()]:
        raise LowrankError(f"{path} lacks {', '.join(lacking)}; give the folder of a whole {family.name}")
    without = [part for part in family.networks if not any((folder / part).glob("*.safetensors"))]
    if weights and without:
        raise LowrankError(
            f"{path} has no safetensors in {', '.join(without)}, and nothing else is read; save it as safetensors"
        )
    return family


def _text_width(folder: Path) -> Any:
    """The width of the text that the UNet reads; None where its configuration cannot be read."""
    try:
        return parse_json((folder / "unet" / "config.json").read_text(encoding="utf-8")).get("cross_attention_dim")
    except (OSError, ValueError, AttributeError):
        return None


def reason(error: Exception) -> str:
    """The first line of what a library says."""
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
