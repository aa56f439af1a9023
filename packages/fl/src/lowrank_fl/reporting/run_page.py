"""A run's or a sweep's result as files for people: a picture and a page that needs nothing beside it."""

import base64
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lowrank_fl.folder import read_rows
from lowrank_fl.reporting.text import METHODS, label_of, three_digits
from lowrank_fl.results import RoundRow, RunSummary, bytes_to_reach

MARGIN = 0.02
"""Runs are compared by the bytes they take to within so much of the original's final accuracy."""


def write_report(out: Path, summaries: Sequence[RunSummary]) -> None:
    """Write `accuracy_vs_bytes.png` and `report.html` about these runs, whose folders exist, into `out`."""
    # jinja2 and matplotlib take a second together.
    from jinja2 import Environment, StrictUndefined

    from lowrank_fl.reporting.plots import plot_accuracy_vs_bytes

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
    template = environment.from_string(
        (files("lowrank_fl.reporting") / "templates" / "run.html").read_text(encoding="utf-8")
    )
    reached = bytes_to_originals(summaries)
    page = template.render(
        name=name,
        margin=round(100 * MARGIN),
        compared=reached is not None,
        private=any(summary.epsilon is not None for summary in summaries),
        simulated=any(summary.simulated_seconds is not None for summary in summaries),
        runs=[
            {
                "label": label_of(summary.method, summary.swept),
                "summary": summary,
                "reached": reached[index] if reached else None,
                **_gaps(lines[index][1]),
                "config": (Path(summary.run_dir) / "config.yaml").read_text(encoding="utf-8"),
            }
            for index, summary in enumerate(summaries)
        ],
        picture=base64.b64encode(picture.read_bytes()).decode(),
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def _gaps(rows: Sequence[RoundRow]) -> dict[str, list[RoundRow]]:
    """The rounds whose aggregation gap was measured, where there are such."""
    measured = [row for row in rows if row.aggregation_gap is not None]
    return {"gaps": measured} if measured else {}


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
    return json.dumps({key: value for key, value in summary.swept.items() if key not in METHODS})
