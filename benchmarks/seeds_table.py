"""Mean and 95 % interval over seeds of the runs of a sweep, and each method's lead over `lowrank` seed by seed.

Run: python benchmarks/seeds_table.py SWEEP_FOLDER..., folders that `lowrank fl run ... --sweep seed=0,1,2` wrote.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import t as student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        summaries = [json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))]
        groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        for summary in summaries:
            groups.setdefault((_setting(summary), summary["method"]), {})[summary["seed"]] = summary
        table = Table(
            "setting", "method", "params", "MB up", "MB down", "accuracy, %", "lead over lowrank", title=folder.name
        )
        for (setting, method), seeds in sorted(groups.items()):
            rival = groups.get((setting, "lowrank"), {})
            leads = [100 * (seeds[s]["accuracy"] - rival[s]["accuracy"]) for s in seeds if s in rival]
            one = next(iter(seeds.values()))
            table.add_row(
                setting,
                method,
                f"{one['params']:,}",
                f"{one['uplink_bytes'] / 1e6:.3g}",
                f"{one['downlink_bytes'] / 1e6:.3g}",
                _interval([100 * summary["accuracy"] for summary in seeds.values()]),
                _interval(leads) if leads and method != "lowrank" else "",
            )
        Console().print(table)


def _setting(summary: dict[str, Any]) -> str:
    """What is swept besides the method and the seed."""
    swept = {key.rpartition(".")[2]: value for key, value in summary["swept"].items()}
    return ", ".join(f"{key} {value}" for key, value in swept.items() if key not in ("method", "seed"))


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.1f} ± {half:.1f}"


if __name__ == "__main__":
    main()
