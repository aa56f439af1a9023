"""A run's folder: what is written, when, and that it is never half written."""

import dataclasses
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lowrank_core import LowrankError
from lowrank_fl.config import RunConfig
from lowrank_fl.data.examples import Examples
from lowrank_fl.results import RoundRow, RunSummary


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
        occupied = any(out.iterdir())
    except OSError as error:
        raise LowrankError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from None
    if occupied:
        raise LowrankError(f"{out} already holds files; choose another folder with --out, or remove it")
    return out


class RunFolder:
    """The files of one run: config.yaml first, a line of metrics.jsonl a round, then the model and the summary."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        tree = config.model_dump(mode="json", exclude={"sweep"})
        self._write("config.yaml", yaml.safe_dump(tree, sort_keys=False).encode())

    def add_round(self, row: RoundRow) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(dataclasses.asdict(row)) + "\n")

    def save_model(self, arrays: dict[str, np.ndarray], config: RunConfig, examples: Examples) -> None:
        """model.safetensors, and model.json with all it takes to build the network and feed it."""
        from safetensors.numpy import save

        self._write("model.safetensors", save(arrays))
        description: dict[str, Any] = {
            "model": config.model.model_dump(mode="json"),
            "seed": config.seed,
            "input_shape": list(examples.input_shape),
            "classes": list(examples.classes),
            "mean": list(examples.mean),
            "std": list(examples.std),
        }
        self._write("model.json", json.dumps(description, indent=2).encode())

    def save_summary(self, summary: RunSummary) -> None:
        self._write("summary.json", json.dumps(dataclasses.asdict(summary), indent=2).encode())

    def _write(self, name: str, content: bytes) -> None:
        # A reader, or the next start after a crash, finds the old file or the new one.
        temporary = self.path / f".{name}.part"
        temporary.write_bytes(content)
        os.replace(temporary, self.path / name)
