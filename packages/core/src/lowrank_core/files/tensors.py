"""Reading and writing safetensors files: what can be wrong with one is said, and a write is whole or not at all."""

import json
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from lowrank_core.errors import LowrankError, UsageError, shortened

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAGICS = {b"PK\x03\x04": "a zip archive, as torch.save writes", b"\x80": "a pickle"}
_LARGEST_HEADER = 100_000_000
"""safetensors' own limit."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, on the CPU, and its metadata.

    Raises:
        LowrankError: there is no such file, it is a pickle, it is no safetensors file, or it is cut off.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})


@contextmanager
def open_tensors(path: Path) -> Generator[Any]:
    """An open safetensors file, of which `get_tensor(name)` reads one tensor at a time.

    Raises:
        LowrankError: as `read_tensors`.
    """
    check_readable(path)
    try:
        file: Any = safe_open(path, "pt")  # which has no types
        with file as opened:
            yield opened
    except SafetensorError as error:
        raise LowrankError(
            f"{path} is not a whole safetensors file ({shortened(str(error))}); copy or download it again"
        ) from None


def check_readable(path: Path) -> None:
    """Refuse what must not be opened, before anything is.

    Raises:
        LowrankError: as `read_tensors`.
    """
    if not path.is_file():
        raise LowrankError(f"there is no file {path}; check the path")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its header, which may begin like a pickle; its header is JSON.
    is_json = start.endswith(b"{") and len(start) == 9
    found = None if is_json else next((text for magic, text in _MAGICS.items() if start.startswith(magic)), None)
    if path.suffix.lower() in _PICKLES or found:
        raise LowrankError(
            f"{path} is {found or f'a {path.suffix} file'}: opening a pickle can run code, so it is never opened here; "
            "convert it to safetensors with the program that wrote it"
        )
    size = path.stat().st_size
    if not size:
        raise LowrankError(f"{path} is empty; copy or download it again")
    header = int.from_bytes(start[:8], "little")
    if not is_json or header > _LARGEST_HEADER:
        raise LowrankError(f"{path} is not a safetensors file; give one, or a PEFT folder")
    if header + 8 > size:
        raise LowrankError(f"{path} is cut off: {size} bytes of at least {header + 8}; copy or download it again")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, without reading their numbers.

    Raises:
        LowrankError: as `read_tensors`.
    """
    with open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file in one step: a reader finds all of it or none."""
    content = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    # Tensors that share memory (tied weights) are refused by safetensors; a file holds each in full.
    seen: set[int] = set()
    for name, tensor in content.items():
        if tensor.data_ptr() in seen:
            content[name] = tensor.clone()
        seen.add(content[name].data_ptr())
    write_bytes(path, serialise(content, {"format": "pt", **metadata}))


def write_json(path: Path, value: object) -> None:
    """As PEFT writes adapter_config.json: two spaces, keys sorted."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step, through a temporary one beside it.

    Raises:
        LowrankError: the folder cannot be written to, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise LowrankError(f"cannot write to {path}: {error.strerror}; choose another place") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files for their owner alone; these are meant to be shared.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise LowrankError(f"cannot write {path}: {error.strerror}; free some space or choose another place") from None


def check_free(
    path: Path, overwrite: bool, *, adapters: Mapping[str, Path] = {}, models: Mapping[str, Path] = {}
) -> None:
    """Refuse to write over something that is there, and over what is read whatever `overwrite` says.

    adapters, models: what is read, by what the user calls it. Beside what is in an adapter's folder something new may
        be written, into a model's nothing.

    Raises:
        UsageError: the path is what is read, a part of it or a folder around it, also through symbolic links.
        LowrankError: there is something, and `overwrite` is not set.
    """
    for name, source in (*adapters.items(), *models.items()):
        if (found := _relation(path, source, name in models)) is not None:
            raise UsageError(
                f"{path} {found.format(name)}, and what is read is never written over; choose another name"
            )
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and not overwrite:
        raise LowrankError(
            f"{path} is there already; choose another name, or overwrite it (--overwrite, overwrite=True)"
        )


def _relation(path: Path, source: Path, is_model: bool) -> str | None:
    """What a place to write to has to do with a file or folder that is read; None where it has nothing."""
    places, own = _places(path), _places(source)
    # What a model's or an adapter's folder holds may be links to elsewhere, as in the hub's cache.
    parts = {place for pattern in ("*", "*/*") for each in source.glob(pattern) for place in _places(each)}
    if places & own:
        return "is {} itself"
    if places & parts or (is_model and any(place.is_relative_to(folder) for place in places for folder in own)):
        return "lies in {}"
    if any(each.is_relative_to(place) for place in places for each in own | parts):
        return "is a folder around {}"
    return None


def _places(path: Path) -> set[Path]:
    """A path with all links followed, and with all but its own."""
    return {Path(os.path.realpath(path)), Path(os.path.realpath(path.parent), path.name)}


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which products of a file's tensors are stored: never less than fp32, which products of bf16 fit."""
    return torch.promote_types(tensor.dtype, torch.float32)
