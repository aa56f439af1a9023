"""What each client keeps from round to round, on disk: control variates, corrections, local parts of a model."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from lowrank_core import LowrankError
from lowrank_core.errors import shortened

_NAME = re.compile(r"round-(\d+)\.safetensors")


class ClientStates:
    """The tensors of every client, each version under the round that left it.

    The server says which version a client goes on from: that of the last round whose reply it used. So a reply that is
    lost, late or refused changes nothing, and a round that is run again starts from what it started from before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, client: int, round_number: int) -> dict[str, Tensor]:
        """The client's tensors as `round_number` left them; empty for 0, before the client's first round.

        Raises:
            LowrankError: they are missing or damaged.
        """
        if not round_number:
            return {}
        path = self._path(client, round_number)
        if not path.exists():
            raise LowrankError(
                f"what client {client} kept from round {round_number} is gone: there is no {path}; put it back, or "
                "start the run again in a new folder"
            )
        try:
            return load_file(path)
        except Exception as error:
            raise LowrankError(
                f"the state of client {client} in {path} cannot be read ({shortened(str(error))}); start the "
                "run again in a new folder"
            ) from None

    def save(self, client: int, round_number: int, tensors: Mapping[str, Tensor], *, keep: int) -> None:
        """Keep tensors as what this round left, beside the version of round `keep`, which a resumed run may need.

        Other versions of earlier rounds are removed. Later ones stay, because this round may be a late one.
        """
        path = self._path(client, round_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
        os.replace(temporary, path)
        for number in self.rounds(client):
            if number < round_number and number != keep:
                self._path(client, number).unlink(missing_ok=True)

    def rounds(self, client: int) -> list[int]:
        """The rounds whose versions are there, rising."""
        names = (_NAME.fullmatch(path.name) for path in (self.folder / str(client)).glob("round-*.safetensors"))
        return sorted(int(found[1]) for found in names if found)

    def _path(self, client: int, round_number: int) -> Path:
        return self.folder / str(client) / f"round-{round_number}.safetensors"
