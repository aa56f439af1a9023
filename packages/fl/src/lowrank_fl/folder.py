"""A run's folder: what is written, when, and that it is never half written."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lowrank_core import LowrankError, run_folder
from lowrank_core.parsing import parse_json, record_of
from lowrank_fl.config import RunConfig
from lowrank_fl.results import RoundRow, RunSummary

if TYPE_CHECKING:
    # Reports read a run without torch.
    from lowrank_fl.data.examples import Examples


def run_name(swept: Mapping[str, Any]) -> str:
    """The swept values as a folder name, `fedpara-0.1`; nothing outside a sweep.

    Whatever the values are, it is the name of one folder, which `..` would not be.
    """
    texts = ("none" if value is None else str(value) or "empty" for value in swept.values())
    name = "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in text) for text in texts)
    return name if name.strip(".") else name.replace(".", "_")


def read_summary(folder: Path) -> RunSummary | None:
    """The summary of a run that has ended, or was interrupted.

    Raises:
        LowrankError: it is damaged.
    """
    return run_folder.read_summary(folder, RunSummary, "lowrank fl run")


def read_rows(folder: Path | str) -> list[RoundRow]:
    """The rounds that a run's folder holds, in order; none where it has not finished one.

    Raises:
        LowrankError: a line that is no round. The last may be half written, and is then left out.
    """
    file = Path(folder) / "metrics.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    rows: list[RoundRow] = []
    for number, line in enumerate(lines, 1):
        try:
            tree = parse_json(line)
        except ValueError:
            if number == len(lines):
                break
            tree = None
        try:
            rows.append(record_of(RoundRow, tree))
        except ValueError:
            raise LowrankError(
                f"{file} is damaged at line {number}: it is not a round's numbers as JSON; put the line back, or start "
                "the run again in a new folder"
            ) from None
    return rows


def finished_rounds(folder: Path) -> int:
    """The rounds in a run's metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def write_config(path: Path, config: RunConfig) -> None:
    """config.yaml: everything it takes to run this again, or to go on with it."""
    tree = config.model_dump(mode="json", exclude=None if config.sweep else {"sweep"})
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / "config.yaml", yaml.safe_dump(tree, sort_keys=False).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or the next start after a crash, finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class RunFolder:
    """The files of one run: config.yaml first, a line of metrics.jsonl a round, then the model and the summary."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        write_config(path, config)

    def keep_rounds(self, count: int) -> list[RoundRow]:
        """The first `count` rows of metrics.jsonl; later ones, which a killed run may have left, are removed."""
        file = self.path / "metrics.jsonl"
        rows = read_rows(self.path)[:count]
        if len(rows) < count:
            raise LowrankError(
                f"{file} has {len(rows)} rounds, and the checkpoint {count}; start the run again in a new folder"
            )
        lines = file.read_bytes().splitlines(keepends=True)[:count] if count else []
        write_whole(file, b"".join(lines))
        return rows

    def add_round(self, row: RoundRow) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(dataclasses.asdict(row)) + "\n")

    def save_model(self, arrays: dict[str, np.ndarray], config: RunConfig, examples: "Examples") -> None:
        """model.safetensors, and model.json with all it takes to build the network and feed it."""
        from safetensors.numpy import save

        write_whole(self.path / "model.safetensors", save(arrays))
        description: dict[str, Any] = {
            "model": config.model.model_dump(mode="json", exclude={"start"}),
            "adapter": config.adapter.model_dump(mode="json") if config.adapter.method else None,
            "seed": config.seed,
            "input_shape": list(examples.input_shape),
            "classes": list(examples.classes),
            "mean": list(examples.mean),
            "std": list(examples.std),
            "white": examples.white,
        }
        write_whole(self.path / "model.json", json.dumps(description, indent=2).encode())

    def save_summary(self, summary: RunSummary) -> None:
        write_whole(self.path / "summary.json", json.dumps(dataclasses.asdict(summary), indent=2).encode())
