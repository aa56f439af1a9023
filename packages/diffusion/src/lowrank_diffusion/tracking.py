"""Who else is told of a run: TensorBoard and Weights & Biases, both of the same numbers and pictures."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from lowrank_core.errors import LowrankError
from lowrank_diffusion.config import DiffusionConfig, TrackConfig
from lowrank_diffusion.results import StepRow
from lowrank_diffusion.weights_and_biases import check_login, imported, opened

_SCALARS = ("loss", "lr", "images_per_second", "peak_memory_bytes", "validation_loss")


class Tracker(Protocol):
    """One of those who are told."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def samples(self, step: int, grid: Image) -> None: ...


@dataclass(frozen=True)
class Trackers:
    """All of them; there may be none."""

    told: Sequence[Tracker]

    def row(self, row: StepRow) -> None:
        measured = {name: getattr(row, name) for name in _SCALARS}
        for tracker in self.told:
            tracker.numbers(row.step, {name: value for name, value in measured.items() if value is not None})

    def samples(self, step: int, grid: Image) -> None:
        for tracker in self.told:
            tracker.samples(step, grid)


def check_trackers(track: TrackConfig) -> None:
    """Find out, before anything is fetched, whether the packages are there, and a login.

    Raises:
        LowrankError: one is not.
    """
    if track.tensorboard:
        _summary_writer()
    if track.wandb:
        check_login(imported())


@contextmanager
def tracked(run: Path, config: DiffusionConfig, note: Callable[[str], None]) -> Generator[Trackers]:
    """Inside the block rows and grids go to those whom `config.track` asks for as well.

    Raises:
        LowrankError: a package is not installed.
    """
    with ExitStack() as stack:
        told: list[Tracker] = []
        if config.track.tensorboard:
            told.append(_TensorBoard(stack.enter_context(_summary_writer()(str(run / "tensorboard")))))
        if config.track.wandb:
            told.append(stack.enter_context(opened(run, config, note)))
        yield Trackers(told)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LowrankError(
            "track.tensorboard needs the package tensorboard, which is not installed; install it with "
            "pip install tensorboard, or leave the key out"
        ) from None
    return SummaryWriter


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, grid: Image) -> None:
        self._writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")
