"""A run's folder: what is written, when, and that it is never half written."""

import dataclasses
import json
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from lowrank_core.errors import LowrankError
from lowrank_core.files.tensors import write_bytes
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.load import load_config
from lowrank_diffusion.results import RunSummary, StepRow

_LOCK = ".lock"


def prepare(out: Path | None, config: DiffusionConfig) -> Path:
    """The folder to write to, made, with config.yaml in it.

    Raises:
        LowrankError: it exists and holds something, or cannot be made.
    """
    if out is None:
        stem = Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
        numbered = (stem.with_name(f"{stem.name}-{number}") for number in range(2, 1000))
        out = stem if not stem.exists() else next(path for path in numbered if not path.exists())
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A run that was killed at once has its lock there.
        occupied = any(path.name != _LOCK for path in out.iterdir())
    except OSError as error:
        raise LowrankError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from None
    if occupied:
        raise LowrankError(f"{out} already holds files; choose another folder with --out, or remove it")
    tree = config.model_dump(mode="json")
    write_bytes(out / "config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode())
    return out


def take_back(folder: Path) -> None:
    """Remove config.yaml where nothing came after it, so that the folder is free for another try."""
    if {file.name for file in folder.iterdir()} <= {"config.yaml", _LOCK}:
        (folder / "config.yaml").unlink(missing_ok=True)


def configured(folder: Path) -> DiffusionConfig:
    """The configuration that a run's folder holds.

    Raises:
        LowrankError: it holds none.
    """
    file = folder / "config.yaml"
    if not file.exists():
        raise LowrankError(f"{folder} holds no run to resume: there is no config.yaml in it")
    return load_config(str(file))


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


def read_summary(folder: Path) -> RunSummary | None:
    """The summary of a run that has ended, or was interrupted."""
    file = folder / "summary.json"
    return RunSummary(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def write_summary(folder: Path, summary: RunSummary) -> None:
    """summary.json."""
    write_bytes(folder / "summary.json", (json.dumps(dataclasses.asdict(summary), indent=2) + "\n").encode())


class Metrics:
    """metrics.jsonl: a line a step."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def keep(self, count: int) -> list[StepRow]:
        """The first `count` rows; later ones, which a killed run may have left, are removed.

        Raises:
            LowrankError: there are fewer.
        """
        rows = self.read()[:count]
        if len(rows) < count:
            raise LowrankError(
                f"{self.path} has {len(rows)} steps, and the checkpoint {count}; start the run again in a new folder"
            )
        if self.path.exists():
            write_bytes(self.path, "".join(map(_line, rows)).encode())
        return rows

    def read(self) -> list[StepRow]:
        """All rows; a last line that a killed run has left half written is none."""
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.exists() else []
        return [StepRow(**json.loads(line)) for line in lines]

    def add(self, row: StepRow) -> None:
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(_line(row))


def _line(row: StepRow) -> str:
    tree = dataclasses.asdict(row)
    if row.validation_loss is None:
        del tree["validation_loss"]
    return json.dumps(tree) + "\n"
