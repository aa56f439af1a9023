"""The page that `lowrank fl report` writes: it needs nothing beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lowrank_core.errors import LowrankError
from lowrank_fl.paper.judge import ACCURACY_MARGIN, COST_MARGIN
from lowrank_fl.reporting.compare import ComparedRow
from lowrank_fl.reporting.figures import draw_all
from lowrank_fl.reporting.groups import Group
from lowrank_fl.reporting.show import by_setting, measured, our_value, paper_value, repeats

_MARK = '<meta name="generator" content="lowrank fl report">'


@dataclass(frozen=True)
class Report:
    """Everything about some runs."""

    groups: list[Group]
    rows: list[ComparedRow]
    rates: tuple[float, ...]
    """Speeds of links, megabits a second."""
    empty: list[Path]


def check_writable(path: Path) -> None:
    """Refuse to replace a file that `lowrank fl report` did not write.

    Raises:
        LowrankError: it is such a file, or its folder is missing.
    """
    if not path.resolve().parent.is_dir():
        raise LowrankError(
            f"there is no folder {path.resolve().parent} to write {path.name} to; make it, or change --out"
        )
    if path.is_dir():
        raise LowrankError(f"{path} is a folder; name a file with --out")
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise LowrankError(f"{path} exists and lowrank fl report did not write it; choose another file with --out")


def write_page(path: Path, report: Report) -> None:
    """Write the page about these runs, in place of an older one."""
    check_writable(path)
    # jinja2 and matplotlib take a second together.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"paper_value": paper_value, "our_value": our_value}
    text = (files("lowrank_fl.reporting") / "templates" / "comparison.html").read_text(encoding="utf-8")
    page = environment.from_string(text).render(
        mark=_MARK,
        compared=[row for row in report.rows if row.group is not None and row.paper is not None],
        missing=[row for row in report.rows if row.group is None],
        verdict=summarise(report.rows),
        count=len(report.groups),
        settings=[(name, measured(groups, report.rates)) for name, groups in by_setting(report.groups).items()],
        drawings=draw_all(report.groups, report.rates),
        empty=report.empty,
        repeats=repeats(report.groups),
        accuracy_margin=ACCURACY_MARGIN,
        cost_margin=100 * COST_MARGIN,
        configs=[(group, (group.runs[0].path / "config.yaml").read_text(encoding="utf-8")) for group in report.groups],
    )
    path.write_text(page, encoding="utf-8")


def summarise(rows: Sequence[ComparedRow]) -> str:
    """`2 pass, 1 fail, 3 partial, 96 not run`."""
    counts = [(status, sum(row.status == status for row in rows)) for status in ("pass", "fail", "partial", "not run")]
    return ", ".join(f"{count} {status}" for status, count in counts)
