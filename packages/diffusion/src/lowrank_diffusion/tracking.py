"""TensorBoard, for who wants it."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from lowrank_core.errors import LowrankError
from lowrank_diffusion.config import TrackConfig
from lowrank_diffusion.results import StepRow

_SCALARS = ("loss", "lr", "images_per_second", "peak_memory_bytes", "validation_loss")


@contextmanager
def track_with_tensorboard(run: Path, track: TrackConfig, main: bool) -> Generator[Callable[[StepRow], None]]:
    """Inside the block rows go to RUN/tensorboard as well, if `track.tensorboard` asks for it.

    Raises:
        LowrankError: the package is not installed.
    """
    if not (track.tensorboard and main):
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LowrankError(
            "track.tensorboard needs the package tensorboard, which is not installed; install it with "
            "pip install tensorboard, or leave the key out"
        ) from None
    with SummaryWriter(str(run / "tensorboard")) as writer:

        def tell(row: StepRow) -> None:
            for name in _SCALARS:
                value = getattr(row, name)
                if value is not None:
                    writer.add_scalar(name, value, row.step)

        yield tell
