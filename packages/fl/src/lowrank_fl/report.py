"""A run's or a sweep's result as files for people: a picture and a page that needs nothing beside it."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowrank_fl.results import RoundRow, RunSummary, bytes_to_reach

MARGIN = 0.02
"""Runs are compared by the bytes they take to within so much of the original's final accuracy."""


def read_rows(run_dir: Path | str) -> list[RoundRow]:
    """The rounds that a run's folder holds, in order; none where it has not finished one."""
    metrics = Path(run_dir) / "metrics.jsonl"
    if not metrics.exists():
        return []
    return [RoundRow(**json.loads(line)) for line in metrics.read_text(encoding="utf-8").splitlines()]


def write_report(out: Path, summaries: Sequence[RunSummary]) -> None:
    """Write `accuracy_vs_bytes.png` and `report.html` about these runs, whose folders exist, into `out`."""
    # jinja2 and matplotlib take a second together.
    from jinja2 import Environment, StrictUndefined

    from lowrank_fl.plots import plot_accuracy_vs_bytes

    name = summaries[0].name
    picture = out / "accuracy_vs_bytes.png"
    lines: list[tuple[str, list[RoundRow]]] = []
    for summary in summaries:
        # Without the seed, so that seeds share a line.
        swept = {key: value for key, value in summary.swept.items() if key != "seed"}
        lines.append((label_of(summary.method, swept), read_rows(summary.run_dir)))
    plot_accuracy_vs_bytes(lines, picture, name)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["digits"] = three_digits
    template = environment.from_string((files("lowrank_fl") / "templates" / "report.html").read_text(encoding="utf-8"))
    reached = bytes_to_originals(summaries)
    page = template.render(
        name=name,
        margin=round(100 * MARGIN),
        compared=reached is not None,
        runs=[
            {
                "label": label_of(summary.method, summary.swept),
                "summary": summary,
                "reached": reached[index] if reached else None,
                "config": (Path(summary.run_dir) / "config.yaml").read_text(encoding="utf-8"),
            }
            for index, summary in enumerate(summaries)
        ],
        picture=base64.b64encode(picture.read_bytes()).decode(),
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def label_of(method: str, swept: Mapping[str, Any]) -> str:
    """A run among others: its method and what else is swept, `fedpara, gamma 0.1`."""
    others = (f"{key.rpartition('.')[2]} {value}" for key, value in swept.items() if key != "model.method")
    return ", ".join([method, *others])


def bytes_to_originals(summaries: Sequence[RunSummary]) -> list[int | None] | None:
    """For each run the bytes until its accuracy was first within `MARGIN` of its original's last; None if never.

    A run's original is the one with method `original` and the same values of every other swept key. None in place
    of the list where nothing can be compared: no run is an original, or all of them are.
    """
    if len({summary.method == "original" for summary in summaries}) < 2:
        return None
    goals = {_others(summary): summary.accuracy - MARGIN for summary in summaries if summary.method == "original"}
    reached: list[int | None] = []
    for summary in summaries:
        goal = goals.get(_others(summary))
        reached.append(None if goal is None else bytes_to_reach(read_rows(summary.run_dir), goal))
    return reached


def _others(summary: RunSummary) -> str:
    """The swept values but the method's, as text, because a value may be a list."""
    return json.dumps({key: value for key, value in summary.swept.items() if key != "model.method"})


def three_digits(value: float) -> str:
    """A number of any size to three significant digits, never with an exponent: `0.0341`, `7.20`, `118`, `48,300`."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"
