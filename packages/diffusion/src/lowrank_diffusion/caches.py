"""Stores of tensors under keys, in memory or on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from lowrank_core.errors import LowrankError
from lowrank_core.files.tensors import read_shapes, read_tensors, write_tensors

T = TypeVar("T")
_FORMAT = 1
"""Counted up when the same parts no longer mean the same tensors."""


def key_of(**parts: object) -> str:
    """A SHA-256 over everything that decides an entry's tensors. The parts are what JSON can hold."""
    described = json.dumps({"format": _FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


class Cache(Protocol):
    """Tensors by key, on the CPU."""

    shared: bool
    """Whether other processes see what this one puts in."""

    def has(self, key: str) -> bool: ...
    def get(self, key: str) -> dict[str, Tensor] | None: ...
    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None: ...


class MemoryCache:
    """Lasts as long as the process."""

    shared = False

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Tensor]] = {}

    def has(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> dict[str, Tensor] | None:
        return self._entries.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._entries[key] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


class DiskCache:
    """One safetensors file for each entry, written whole; runs and processes may share the folder.

    A file that cannot be read, such as one cut off by a crash of the machine, counts as missing.
    """

    shared = True

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self._note = folder, note

    def has(self, key: str) -> bool:
        # Opening compares the header with the file's length.
        return self._read(key, read_shapes) is not None

    def get(self, key: str) -> dict[str, Tensor] | None:
        read = self._read(key, read_tensors)
        return read[0] if read else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the entry's file.

        Raises:
            LowrankError: the folder cannot be written to, or the disk is full; nothing is left half written.
        """
        try:
            write_tensors(self._path(key), tensors, {})
        except LowrankError as error:
            raise LowrankError(
                f"{error}; cache.folder names another folder, and cache.text or cache.latents: memory needs none"
            ) from None

    def _read(self, key: str, read: Callable[[Path], T]) -> T | None:
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return read(path)
        except (LowrankError, OSError) as error:
            self._note(f"A file of the cache is made again: {error}")
            return None

    def _path(self, key: str) -> Path:
        # Folders of a hundred thousand files are slow on some file systems.
        return self.folder / key[:2] / f"{key}.safetensors"


def open_cache(
    kind: Literal["none", "memory", "disk"], folder: str | None, note: Callable[[str], None]
) -> Cache | None:
    """What `cache.text` or `cache.latents` asks for.

    Args:
        kind: the setting.
        folder: `cache.folder`; if not given, `diffusion` in `~/.cache/lowrank` or what LOWRANK_CACHE names instead.
        note: told of files that are made again.
    """
    if kind == "disk":
        default = Path(os.environ.get("LOWRANK_CACHE") or "~/.cache/lowrank") / "diffusion"
        return DiskCache(Path(folder or default).expanduser(), note)
    return MemoryCache() if kind == "memory" else None
