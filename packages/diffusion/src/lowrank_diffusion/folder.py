"""A run's folder: what is written, when, and that it is never half written."""

import dataclasses
import json
from pathlib import Path

import yaml

from lowrank_core import run_folder
from lowrank_core.errors import LowrankError, shortened
from lowrank_core.files.peft import CONFIG_NAME
from lowrank_core.files.tensors import write_bytes
from lowrank_core.parsing import parse_json, record_of
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


def adapter_of(folder: Path, config: DiffusionConfig) -> Path | None:
    """Where a run's adapter is read from: its own folder, which holds PEFT's, or the single file where PEFT has no form
    for it; None as long as it has none.
    """
    if config.adapter.in_peft:
        return folder if (folder / "unet" / CONFIG_NAME).is_file() else None
    file = folder / f"{config.name}.safetensors"
    return file if file.is_file() else None


def missing_forms(config: DiffusionConfig) -> str | None:
    """What to say before the first step of a run whose adapter PEFT has no form for; None for other runs."""
    method, name = config.adapter.method, config.name
    if config.adapter.in_peft:
        return None
    equal = "" if method == "lokr" else f", and the equal LoRA with DoRA in {name}_lora.safetensors, for diffusers"
    return (
        f"PEFT has no DoRA for {method}, so this run writes no PEFT folders: its adapter will be in {name}.safetensors,"
        f" for lowrank infer, ComfyUI and LyCORIS{equal}; for PEFT folders set adapter.method: lora, or "
        f"write the equal LoRA with DoRA by lowrank convert {name}.safetensors FOLDER --to lora"
    )


def read_summary(folder: Path) -> RunSummary | None:
    """The summary of a run that has ended, or was interrupted.

    Raises:
        LowrankError: it is damaged.
    """
    return run_folder.read_summary(folder, RunSummary, "lowrank diffusion train")


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
        """All rows; a last line that a killed run has left half written is none.

        Raises:
            LowrankError: a line that is no step.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        rows: list[StepRow] = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(record_of(StepRow, parse_json(line)))
            except ValueError as error:
                raise LowrankError(
                    f"{self.path} is damaged at line {number}: it is not a step's numbers as JSON "
                    f"({shortened(str(error))}); put the line back, or start the run again in a new folder"
                ) from None
        return rows

    def add(self, row: StepRow) -> None:
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(_line(row))


def _line(row: StepRow) -> str:
    tree = dataclasses.asdict(row)
    if row.validation_loss is None:
        del tree["validation_loss"]
    return json.dumps(tree) + "\n"
