"""Seconds a round of a federated simulation: lowrank, a loop by hand, pfl-research and Flower on Ray, side by side.

Every competitor runs in fresh processes, is handed the same images, clients and initial weights in one file, and
trains as many rounds; they take turns, so that a slow minute of the machine hits all of them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cells import CELLS, Cell
from machine import cores, describe, machine, spread
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

HERE = Path(__file__).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PFL_PYTORCH_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Competitor:
    """Who runs, and on how many cores."""

    script: str
    processes: int
    threads: int
    own_environment: bool = False
    execution: str = "sequential"

    @property
    def name(self) -> str:
        how = "" if self.execution == "sequential" else f" {self.execution}"
        return f"{self.script}{how}, {self.processes} x {self.threads} thread{'s' if self.threads > 1 else ''}"

    def command(self) -> list[str]:
        script = str(HERE / "peers" / f"{self.script}_round.py")
        return ["uv", "run", "--quiet", "--script", script] if self.own_environment else [sys.executable, script]


def competitors(cell: str, count: int) -> dict[str, Competitor]:
    """By the names `--only` takes; `count` cores for each."""
    every = {
        "lowrank": Competitor("lowrank", count, 1),
        "lowrank-batched": Competitor("lowrank", count, 1, execution="batched"),
        "loop-processes": Competitor("loop", count, 1),
        "loop-threads": Competitor("loop", 1, count),
        "pfl-processes": Competitor("pfl", count, 1, own_environment=True),
        "pfl-threads": Competitor("pfl", 1, count, own_environment=True),
        "ray": Competitor("ray", count, 1),
    }
    runs = {"pfl": cell == "pfl", "batched": CELLS[cell].linear}
    return {key: who for key, who in every.items() if runs.get(who.script, True) and runs.get(who.execution, True)}


def main() -> None:
    arguments = _arguments()
    console = Console(stderr=True)
    about = machine()
    print(describe(about))
    chosen = competitors(arguments.cell, arguments.cores)
    chosen = {key: who for key, who in chosen.items() if not arguments.only or key in arguments.only}
    results: dict[str, list[dict[str, Any]]] = {key: [] for key in chosen}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        federation = Path(folder, "federation.safetensors")
        data = hand_over(CELLS[arguments.cell], arguments.cell, arguments.data, federation)
        print(data)
        for repeat in range(1, arguments.repeats + 1):
            for key, who in chosen.items():
                if key in skipped:
                    continue
                console.print(f"repeat {repeat} of {arguments.repeats}: {who.name} ...")
                try:
                    results[key].append(run(who, federation, arguments.rounds, Path(folder)))
                except RuntimeError as error:
                    skipped[key] = str(error)
                    console.print(f"{who.name} is skipped: {error}", markup=False)
                if arguments.json:
                    record = {
                        "machine": about,
                        "data": data,
                        "cell": arguments.cell,
                        "rounds": arguments.rounds,
                        "repeats": arguments.repeats,
                        "results": {other.name: results[name] for name, other in chosen.items()},
                        "skipped": {chosen[name].name: reason for name, reason in skipped.items()},
                    }
                    Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    print_table(arguments, chosen, results, skipped)


def hand_over(cell: Cell, name: str, path: str | None, file: Path) -> str:
    """Write the federation to `file`; say what data it holds."""
    count = cell.clients * cell.images
    generator = torch.Generator().manual_seed(0)
    if path is None or cell.shape != (3, 32, 32):
        data = {
            "images": torch.randint(0, 256, (count, *cell.shape), dtype=torch.uint8, generator=generator),
            "labels": torch.randint(0, 10, (count,), generator=generator),
            "test_images": torch.randint(0, 256, (1000, *cell.shape), dtype=torch.uint8, generator=generator),
            "test_labels": torch.randint(0, 10, (1000,), generator=generator),
        }
        mean, std = (127.5,) * cell.shape[0], (73.9,) * cell.shape[0]
        said = "data: random images, so every accuracy is chance"
    else:
        from lowrank_fl.config import DataConfig, PartitionConfig
        from lowrank_fl.data import load_examples

        examples = load_examples(DataConfig(name="cifar10", path=path), PartitionConfig(), 0)
        data = {
            "images": examples.inputs,
            "labels": examples.labels,
            "test_images": examples.test_inputs,
            "test_labels": examples.test_labels,
        }
        mean, std = examples.mean, examples.std
        said = f"data: {path}"
    parts = torch.randperm(len(data["images"]), generator=generator)[:count].view(cell.clients, cell.images)
    torch.manual_seed(0)
    network = cell.network()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == cell.parameters, f"the {name} network has {parameters} parameters"
    initial = {f"initial.{key}": tensor for key, tensor in network.state_dict().items()}
    about = {"cell": name, "mean": json.dumps(mean), "std": json.dumps(std)}
    save_file({**data, "parts": parts, **initial}, file, metadata=about)
    return (
        f"{said}\ncell {name}: {parameters:,} parameters, {cell.clients} clients of {cell.images} images, "
        f"cohort {cell.cohort}, one epoch, batch {cell.batch}, lr {cell.lr:g}"
    )


def run(who: Competitor, federation: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """One run of one competitor.

    Raises:
        RuntimeError: it is not there, or it failed; its last words.
    """
    if who.own_environment and shutil.which("uv") is None:
        raise RuntimeError("uv, which makes its environment, is not on the PATH")
    out = folder / "timing.json"
    out.unlink(missing_ok=True)
    options = {"--federation": federation, "--rounds": rounds, "--processes": who.processes, "--threads": who.threads}
    options |= {"--execution": who.execution}
    command = [*who.command(), *(str(part) for pair in options.items() for part in pair), "--out", str(out)]
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if not out.exists():
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"exit status {done.returncode}: {last}")
    return json.loads(out.read_text())


def print_table(
    arguments: argparse.Namespace,
    chosen: dict[str, Competitor],
    results: dict[str, list[dict[str, Any]]],
    skipped: dict[str, str],
) -> None:
    table = Table(
        caption=f"{arguments.rounds} rounds after the first, {arguments.repeats} repeats: median (min to max)"
    )
    table.add_column("")
    # With one process its own time is the round's, and other programs do not add to it.
    seconds_of = "own" if arguments.cores == 1 else "rounds"
    unit = "CPU s" if arguments.cores == 1 else "s"
    for title in ("first round, s", f"a round, {unit}", "times lowrank", "accuracy, %", "test loss"):
        table.add_column(title, justify="right")
    ours = [median(timing[seconds_of]) for timing in results.get("lowrank", [])]
    for key, who in chosen.items():
        timings = results[key]
        if key in skipped or not timings:
            table.add_row(who.name, "skipped")
            continue
        seconds = [second for timing in timings for second in timing[seconds_of]]
        table.add_row(
            who.name,
            spread([timing["first"] for timing in timings]),
            spread(seconds, 4),
            _ratios([median(timing[seconds_of]) for timing in timings], ours),
            spread([100 * timing["accuracy"] for timing in timings], 1),
            spread([timing["loss"] for timing in timings]),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for key, reason in skipped.items():
        print(f"skipped {chosen[key].name}: {reason}")
    versions = {timing["torch"] for timings in results.values() for timing in timings}
    if len(versions) > 1:
        print(f"not all ran the same torch: {', '.join(sorted(versions))}")


def _ratios(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """Of the repeats, each against ours of the same repeat: the machine may change between repeats."""
    pairs = list(zip(theirs, ours, strict=False))
    return spread([their / our for their, our in pairs]) if pairs else "-"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=sorted(CELLS), default="pfl", help="default: pfl")
    parser.add_argument("--data", metavar="PATH", help="CIFAR-10 in the layout of uoft-cs/cifar10; default: noise")
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds after the first; default: 21")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--cores", type=int, default=cores(), help="processes or threads of each; default: all")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=sorted({*competitors("pfl", 1), *competitors("mlp", 1)})
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured, run by run as it ends")
    return parser.parse_args()


if __name__ == "__main__":
    main()
