"""What each client keeps from round to round, on disk: control variates, corrections, local parts of a model."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from lowrank_core import LowrankError

_NAME = re.compile(r"round-(\d+)\.safetensors")


class ClientStates:
    """The tensors of every client, each version under the round that left it.

    A round that is cut short and run again must find what the round before it left, not what it began to write. So a
    client reads its newest version from before the round, and keeps that version beside the new one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, client: int, round_number: int) -> dict[str, Tensor]:
        """The client's tensors as the last of its rounds before `round_number` left them; empty if there was none.

        Raises:
            LowrankError: the file is damaged.
        """
        before = [number for number in self._rounds(client) if number < round_number]
        if not before:
            return {}
        path = self._path(client, before[-1])
        try:
            return load_file(path)
        except Exception as error:
            raise LowrankError(
                f"the state of client {client} in {path} cannot be read ({error}); start the run again in a new folder"
            ) from None

    def save(self, client: int, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors as what this round left; versions that no resumed run can need are removed."""
        path = self._path(client, round_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
        os.replace(temporary, path)
        earlier = [number for number in self._rounds(client) if number < round_number]
        for number in earlier[:-1]:
            self._path(client, number).unlink(missing_ok=True)

    def _path(self, client: int, round_number: int) -> Path:
        return self.folder / str(client) / f"round-{round_number}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        names = (_NAME.fullmatch(path.name) for path in (self.folder / str(client)).glob("round-*.safetensors"))
        return sorted(int(found[1]) for found in names if found)
