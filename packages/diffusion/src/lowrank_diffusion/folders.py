"""A model on the meta device from the config.json of transformers or diffusers, in a folder or on the hub."""

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lowrank_core.costs.trace import CountFlops
from lowrank_core.errors import LowrankError, shortened
from lowrank_core.parsing import parse_json
from lowrank_diffusion.blank import BlankNetwork, unet_inputs

_TOKENS = 128
_MOST_LAYERS = 1000
_COUNTS = re.compile(r"layers|n_layer|depth|num_blocks")


def blank_from_config(source: str, note: Callable[[str], None]) -> BlankNetwork:
    """The model that a config.json describes. No weights are read, and no code that comes with them.

    Args:
        source: a folder, or a hub id, `OWNER/NAME` or `OWNER/NAME/SUBFOLDER`, of which config.json alone is fetched.
        note: told what is fetched, and from where.

    Raises:
        LowrankError: there is no config.json, it cannot be fetched, or neither library knows its model.
    """
    folder = Path(source)
    path = folder / "config.json" if folder.is_dir() else _fetched(source, note)
    if not path.is_file():
        parts = sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())
        hint = f"give one of its parts, such as {folder / parts[0]}" if parts else "give a folder of a saved model"
        raise LowrankError(f"no config.json in {folder}; {hint}")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LowrankError(
            f"{path} is not JSON: {shortened(str(error))}; save the model's configuration again"
        ) from None
    if not isinstance(config, dict):
        raise LowrankError(f"{path} holds no JSON object; save the model's configuration again")
    config = cast("dict[str, Any]", config)
    _check_depth(config, path)
    with torch.device("meta"), CountFlops():
        if "_class_name" in config:
            return _of_diffusers(config, path)
        return _of_transformers(path)


def _check_depth(config: Any, path: Path, key: str = "") -> None:
    """Refuse a network that would take hours to build, though its weights take no memory.

    Raises:
        LowrankError: it has more than `_MOST_LAYERS` layers or blocks of a kind.
    """
    if isinstance(config, dict | list):
        pairs = config.items() if isinstance(config, dict) else ((key, one) for one in config)
        for name, value in pairs:
            _check_depth(value, path, str(name))
    elif isinstance(config, int) and config > _MOST_LAYERS and _COUNTS.search(key):
        raise LowrankError(f"{path} has {key} of {config}, above {_MOST_LAYERS}; correct it")


def _fetched(source: str, note: Callable[[str], None]) -> Path:
    from huggingface_hub import hf_hub_download

    owner, name, *subfolder = source.split("/")
    file = "/".join([*subfolder, "config.json"])
    note(f"fetching {file} of {owner}/{name} from the Hugging Face hub")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    # The hub's errors are many, of several libraries, and all mean that there is no file.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LowrankError(
            f"{file} of {owner}/{name} cannot be fetched from the Hugging Face hub ({reason}); "
            "check the name and the network, or give a local folder"
        ) from None


def _of_diffusers(config: dict[str, Any], path: Path) -> BlankNetwork:
    import diffusers

    name = config["_class_name"]
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise LowrankError(
            f"{path} describes {shortened(str(name))}, which is no network of diffusers {diffusers.__version__}"
        )
    own = {key: value for key, value in config.items() if key != "_name_or_path"}
    try:
        model = cast(Any, kind).from_config(own)
        if name == "UNet2DConditionModel" and isinstance(config.get("sample_size"), int):
            return BlankNetwork(model, *unet_inputs(dict(model.config)))
    # A network raises errors of every kind for values that it does not take.
    except Exception as error:
        raise LowrankError(f"{path} describes no {name} ({_reason(error)}); save its configuration again") from None
    return BlankNetwork(model)


def _of_transformers(path: Path) -> BlankNetwork:
    transformers = import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(str(path.parent), local_files_only=True)
        names = [name for name in config.architectures or () if hasattr(transformers, name)]
        kind = getattr(transformers, names[0]) if names else None
        model = kind(config) if kind else transformers.AutoModel.from_config(config)
        return _with_inputs(model, config)
    except Exception as error:  # as in _of_diffusers
        reason = _reason(error)
        raise LowrankError(
            f"{path} describes no model of transformers {transformers.__version__} ({reason}); "
            "a newer transformers may know it"
        ) from None


def _with_inputs(model: nn.Module, config: Any) -> BlankNetwork:
    if getattr(config, "image_size", None) and hasattr(config, "num_channels"):
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return BlankNetwork(model, named={"pixel_values": torch.empty(1, config.num_channels, size, size)})
    if getattr(config, "vocab_size", None):
        tokens = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        named = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
        return BlankNetwork(model, named=named)
    return BlankNetwork(model)


def _reason(error: Exception) -> str:
    return shortened(str(error).strip()) or type(error).__name__
