"""A run's folder, whatever is run: found free, locked while a run writes to it, and given back.

filelock and pydantic come with `lowrank-core[config]`.
"""

from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from lowrank_core.errors import LowrankError, shortened
from lowrank_core.parsing import parse_json, record_of

T = TypeVar("T")
_LOCK = ".lock"


def prepare(out: Path | None, name: str) -> Path:
    """The folder to write to, made and empty.

    Raises:
        LowrankError: it exists and holds something, or cannot be made.
    """
    if out is None:
        stem = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        numbered = (stem.with_name(f"{stem.name}-{number}") for number in range(2, 1000))
        out = stem if not stem.exists() else next(path for path in numbered if not path.exists())
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A run that was killed at once, or is only beginning, has its lock there.
        occupied = any(path.name != _LOCK for path in out.iterdir())
    except OSError as error:
        raise LowrankError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from None
    if occupied:
        raise LowrankError(f"{out} already holds files; choose another folder with --out, or remove it")
    return out


def read_summary(folder: Path, kind: type[T], command: str) -> T | None:
    """summary.json of a run, a dataclass `kind`; None where there is none.

    Raises:
        LowrankError: it is damaged; `command` with --resume writes it again.
    """
    file = folder / "summary.json"
    if not file.exists():
        return None
    try:
        return record_of(kind, parse_json(file.read_bytes()))
    except ValueError as error:
        raise LowrankError(
            f"{file} is damaged: it is not a run's summary as JSON ({shortened(str(error))}); remove it, and "
            f"{command} --resume {folder} writes it again"
        ) from None


def take_back_config(path: Path) -> None:
    """Remove config.yaml where nothing came after it, so that the folder is free for another try."""
    if {file.name for file in path.iterdir()} <= {"config.yaml", _LOCK}:
        (path / "config.yaml").unlink(missing_ok=True)


def config_file(folder: Path) -> Path:
    """config.yaml of a run to resume.

    Raises:
        LowrankError: there is none.
    """
    file = folder / "config.yaml"
    if not file.exists():
        raise LowrankError(f"{folder} holds no run to resume: there is no config.yaml in it")
    return file


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Inside the block no other run writes to this folder.

    Raises:
        LowrankError: one does already.
    """
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LowrankError(f"another run is writing to {folder}; wait for it, or choose another folder") from None
    try:
        yield
    finally:
        # The file stays: somebody may wait for this one, and a new one would be another lock.
        lock.release()
