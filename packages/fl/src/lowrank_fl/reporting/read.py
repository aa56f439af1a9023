"""Runs as their folders tell of them, those that are still under way or were cut off included."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_core.errors import LowrankError
from lowrank_fl.config import RunConfig
from lowrank_fl.folder import read_rows, read_summary
from lowrank_fl.load import load_config
from lowrank_fl.results import RoundRow, RunSummary


@dataclass(frozen=True)
class RunRecord:
    """One run's folder."""

    path: Path
    config: RunConfig
    rows: list[RoundRow]
    """Its finished rounds, at least one."""
    summary: RunSummary | None
    """None where the run was killed, or still goes on."""

    @property
    def finished(self) -> bool:
        """Whether it trained all the rounds of its configuration."""
        return len(self.rows) >= self.config.rounds

    @property
    def written(self) -> int:
        """When its last round was written, in nanoseconds."""
        return (self.path / "metrics.jsonl").stat().st_mtime_ns


@dataclass(frozen=True)
class Found:
    """What lies in some folders."""

    runs: list[RunRecord]
    empty: list[Path]
    """Folders of runs that have not finished a round."""


def find_runs(paths: Sequence[Path]) -> Found:
    """The runs in these folders, each of which is a run's, a sweep's, or holds such at any depth.

    A run that is reached twice is there once; runs come in the order of `paths`, then by name.

    Raises:
        LowrankError: a folder that is not there or holds no run, no run with a finished round, or a damaged file.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise LowrankError(f"there is no folder {path}; give the folder of a run or of a sweep")
        found = [path] if _is_run(path) else sorted(file.parent for file in path.rglob("config.yaml"))
        found = [folder for folder in found if _is_run(folder)]
        if not found:
            raise LowrankError(f"{path} holds no run: there is no config.yaml with a metrics.jsonl beside it")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    runs: list[RunRecord] = []
    empty: list[Path] = []
    for folder in folders.values():
        rows = read_rows(folder)
        if rows:
            runs.append(RunRecord(folder, _config(folder), rows, read_summary(folder)))
        else:
            empty.append(folder)
    if not runs:
        raise LowrankError(f"no run in {', '.join(map(str, paths))} has finished a round yet; report on it later")
    return Found(runs, empty)


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() and (folder / "config.yaml").exists()


def _config(folder: Path) -> RunConfig:
    file = folder / "config.yaml"
    try:
        return load_config(str(file))
    except LowrankError as error:
        raise LowrankError(f"{file} is not a run's configuration: {error}") from None
