"""Weights & Biases, for who wants it: one run there for one folder here, which resuming goes on with."""

import os
import secrets
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL.Image import Image

from lowrank_core.errors import LowrankError, shortened
from lowrank_core.files.tensors import write_bytes
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.published import published

ID = "wandb-id"
"""The file in a run's folder that names the run there."""
_PATIENCE = 30
"""Seconds to wait for the server as a run begins."""


def imported() -> Any:
    """The package.

    Raises:
        LowrankError: it is not installed.
    """
    # Its reports of its own faults go to another server, and are on unless one says so before the import.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError:
        raise LowrankError(
            "track.wandb needs the package wandb, which is not installed; install it with pip install wandb, or "
            "leave the key out"
        ) from None
    return wandb


def check_login(wandb: Any) -> None:
    """Look for a key of the service where wandb does, unless its mode needs none; nobody is asked, nothing is called.

    Raises:
        LowrankError: there is none, or it cannot be one.
    """
    if wandb.setup().settings.mode != "online":
        return
    try:
        found, why = wandb.login(prompt=False), "there is no key"
    except (wandb.Error, ValueError) as error:
        found, why = False, shortened(str(error))
    if not found:
        raise LowrankError(
            f"track.wandb needs a login to Weights & Biases ({why}); run wandb login, set WANDB_API_KEY, or track "
            "without the network by WANDB_MODE=offline"
        )


@contextmanager
def opened(run: Path, config: DiffusionConfig, note: Callable[[str], None]) -> Generator["WandB"]:
    """The run there, which ends with the block; its files are in RUN/wandb, its name in RUN/wandb-id.

    A server that does not answer costs no training: the run is then kept offline, with a note.
    """
    wandb = imported()
    file = run / ID
    known = file.read_text(encoding="utf-8").strip() if file.exists() else secrets.token_hex(8)
    about = {
        "project": config.track.project,
        "entity": config.track.entity,
        "name": config.name,
        "config": published(config),
        "id": known,
        "resume": "allow",
        "dir": str(run),
        # What is printed belongs to the command's own display.
        "settings": wandb.Settings(silent=True, console="off", init_timeout=_PATIENCE),
    }
    try:
        there = wandb.init(**about)
    except wandb.Error as error:
        note(
            f"Weights & Biases cannot be reached ({shortened(str(error))}); the run is kept offline, and wandb sync "
            f"on the folder in {run / 'wandb'} uploads it later"
        )
        # Else its service would take the name to be in use.
        wandb.teardown()
        there = wandb.init(**about, mode="offline")
    write_bytes(file, f"{known}\n".encode())
    if not there.disabled and not there.offline:
        note(f"Weights & Biases: {there.url}")
    with there:
        yield WandB(wandb, there)


class WandB:
    """Tells the run there. Steps that it has already, because a killed run went on from before them, it leaves out."""

    def __init__(self, wandb: Any, there: Any) -> None:
        self._wandb, self._there = wandb, there

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._there.log(dict(values), step=step)

    def samples(self, step: int, grid: Image) -> None:
        self._there.log({"samples": self._wandb.Image(grid)}, step=step)
