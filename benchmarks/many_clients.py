"""Peak memory and seconds a round by the number of clients: a hundred take part in each round, six examples each.

Runs of `lowrank fl run mnist`, each in a process of its own, that differ in how many clients there are to choose from.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe, machine, spread
from rich.console import Console
from rich.table import Table

_EXAMPLES = 6
_COHORT = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", action="append", default=[], metavar="KEY=VALUE", help="of the run, such as data.path")
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    table = Table(caption=f"{_COHORT} clients a round, {_EXAMPLES} examples each, {arguments.rounds} rounds")
    for title in ("clients", "a round, s: median (min to max)", "peak memory, MB"):
        table.add_column(title, justify="right")
    for clients in arguments.clients:
        seconds, peak = run(clients, arguments.rounds, arguments.o)
        # The first round draws what later ones find ready.
        table.add_row(f"{clients:,}", spread(seconds[1:], 3), f"{peak / 1e6:,.0f}")
    print(describe(machine()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def run(clients: int, rounds: int, overrides: list[str]) -> tuple[list[float], int]:
    """The seconds of each round, and the most bytes that the process held."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data.max_examples": clients * _EXAMPLES,
            "partition.kind": "iid",
            "model.name": "mlp",
            "federation.clients": clients,
            "federation.clients_per_round": _COHORT,
            "federation.epochs": 1,
            "engine.workers": 1,
            "rounds": rounds,
        }
        options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
        options += [part for override in overrides for part in ("-o", override)]
        command = ["lowrank", "fl", "run", "mnist", *options, "--quiet", "--out", f"{folder}/run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"lowrank fl run ended with {os.waitstatus_to_exitcode(status)}")
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        # Linux counts in kibibytes, macOS in bytes.
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return [json.loads(line)["seconds"] for line in lines], peak


if __name__ == "__main__":
    main()
