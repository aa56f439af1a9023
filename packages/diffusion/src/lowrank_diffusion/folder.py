"""A run's folder: what is written, when, and that it is never half written."""

import dataclasses
import json
from pathlib import Path

import yaml

from lowrank_core.errors import LowrankError
from lowrank_core.files.tensors import write_bytes
from lowrank_core.run_folder import prepare
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.results import RunSummary, StepRow


def begin(out: Path | None, config: DiffusionConfig) -> Path:
    """The folder to write to, made, with config.yaml in it.

    Raises:
        LowrankError: it exists and holds something, or cannot be made.
    """
    folder = prepare(out, config.name)
    tree = config.model_dump(mode="json")
    write_bytes(folder / "config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode())
    return folder


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
