"""Ours against the paper's, row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_fl.paper.judge import Status, judge
from lowrank_fl.paper.match import differences, in_words, of_preset
from lowrank_fl.paper.rows import PaperRow, paper_rows
from lowrank_fl.reporting.groups import Group
from lowrank_fl.reporting.interval import Interval, interval_of


@dataclass(frozen=True)
class ComparedRow:
    """A number of the paper beside ours; either may be missing, not both."""

    paper: PaperRow | None
    group: Group | None
    ours: Interval | None
    """In the paper's unit; None where nothing was run or the target was never reached."""
    status: Status | None
    """None where the paper has no such run."""
    differs: tuple[str, ...] = ()
    paired: tuple[int, ...] | None = None
    """Of `points above`: the seeds that both groups have, from which `ours` follows."""

    @property
    def seeds(self) -> list[int]:
        """Those that `ours` is of."""
        if self.paired is not None:
            return list(self.paired)
        return self.group.seeds if self.group else []

    @property
    def setting(self) -> str:
        return self.group.setting if self.group else self.paper.preset if self.paper else ""

    @property
    def quantity(self) -> str:
        return self.paper.what if self.paper else "accuracy, %"

    @property
    def run(self) -> str:
        """Which run it is: ours by its label, one that was not run by its keys."""
        if self.group is not None:
            return self.group.label
        changes = self.paper.set if self.paper else {}
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in changes.items()) or "as the preset"

    def as_tree(self) -> dict[str, Any]:
        """For JSON."""
        paper, group, ours = self.paper, self.group, self.ours
        return {
            "source": paper.source if paper else None,
            "setting": self.setting,
            "run": self.run,
            "quantity": self.quantity,
            "paper": paper.value if paper else None,
            "ours": ours.mean if ours else None,
            "interval": [ours.low, ours.high] if ours and ours.half is not None else None,
            "seeds": self.seeds,
            "status": self.status,
            "differs": list(self.differs),
            "run_dirs": [str(run.path) for run in group.runs] if group else [],
        }


def compare(groups: Sequence[Group]) -> list[ComparedRow]:
    """A row for each number of the paper and group it can be held against, then each group that has none.

    Where several numbers of the paper ask the same of a group (Table 9 has 200 and 1000 rounds), the one that the
    group's configuration is nearest to is taken. Numbers that no group gives are `not run`.
    """
    found: list[list[ComparedRow]] = [[] for _ in paper_rows()]
    without: list[ComparedRow] = []
    for group in groups:
        nearest: dict[tuple[Any, ...], tuple[int, list[str]]] = {}
        for number, row in enumerate(paper_rows()):
            differs = differences(row, group.essence)
            asked = (row.quantity, row.target, row.mbps, str(row.other))
            if differs is not None and (asked not in nearest or len(differs) < len(nearest[asked][1])):
                nearest[asked] = number, differs
        held = [(number, _hold(paper_rows()[number], group, differs, groups)) for number, differs in nearest.values()]
        for number, compared in held:
            if compared is not None:
                found[number].append(compared)
        if not any(compared for _, compared in held):
            without.append(ComparedRow(None, group, group.accuracy().scaled(100), None))
    rows = zip(paper_rows(), found, strict=True)
    return [each for row, ours in rows for each in ours or [ComparedRow(row, None, None, "not run")]] + without


def _hold(row: PaperRow, group: Group, differs: list[str], groups: Sequence[Group]) -> ComparedRow | None:
    """One number against one group; None where the group cannot tell it."""
    if row.quantity == "above":
        return _above(row, group, differs, groups)
    ours = _ours(row, group)
    summary_is_needed = row.quantity in ("params", "transfer_ratio")
    if ours is None and (summary_is_needed or row.target is None):
        return None
    differs = list(_with_rounds(row, group, ours, differs))
    if row.quantity == "seconds_at" and row.computing is not None:
        differs.append(in_words("seconds computing", row.computing, round(group.client_seconds().mean, 2)))
    return ComparedRow(row, group, ours, judge(row, ours, differs), tuple(differs))


def _ours(row: PaperRow, group: Group) -> Interval | None:
    summary = group.summary
    if row.quantity == "accuracy":
        return group.accuracy().scaled(100)
    if row.target is not None and row.quantity == "rounds_to":
        return group.rounds_to(row.target / 100)
    if row.target is not None:
        reached = group.bytes_to(row.target / 100)
        return reached.scaled(1 / 2**30) if reached else None
    if row.mbps is not None:
        return group.seconds_at(row.mbps)
    if row.quantity == "megabytes_a_round":
        return group.client_bytes().scaled(1e-6)
    if summary is None:
        return None
    if row.quantity == "params":
        return Interval(summary.params / 1e6)
    # Where nothing is shared nothing travels, and there is no ratio.
    return Interval(summary.original_params / summary.transferred_params) if summary.transferred_params else None


def _with_rounds(row: PaperRow, group: Group, ours: Interval | None, differs: list[str]) -> Iterator[str]:
    """What differs, the rounds as they were really finished, and only where they matter."""
    rounds_matter = row.quantity == "accuracy" or (row.target is not None and ours is None)
    paper = of_preset(row.preset, tuple(row.set.items()))["rounds"]
    for text in differs:
        if not text.startswith("rounds: "):
            yield text
    short = group.rounds != paper if row.quantity == "accuracy" else group.rounds < paper
    if rounds_matter and short:
        yield in_words("rounds", paper, f"{group.rounds}{'' if group.finished else ' so far'}")


def _above(row: PaperRow, group: Group, differs: list[str], groups: Sequence[Group]) -> ComparedRow | None:
    """By how many points the group is above the other run that the row names, seed by seed.

    The other may lie in another sweep and go by another name; of several, the one that shares the most seeds is taken.
    """
    wanted = PaperRow(row.source, row.preset, row.quantity, row.value, row.unit, row.other)
    own = {run.config.seed: run.rows[-1].accuracy for run in group.runs}
    points: dict[int, float] = {}
    for other in groups:
        others = differences(wanted, other.essence)
        if others != differs or other.rounds != group.rounds or _federation(other) != _federation(group):
            continue
        theirs = {run.config.seed: run.rows[-1].accuracy for run in other.runs}
        shared = {seed: 100 * (own[seed] - theirs[seed]) for seed in own if seed in theirs}
        points = max(points, shared, key=len)
    if not points:
        return None
    ours = interval_of(list(points.values()))
    said = list(_with_rounds(PaperRow(row.source, row.preset, "accuracy", 0, 1), group, ours, differs))
    return ComparedRow(row, group, ours, judge(row, ours, said), tuple(said), tuple(points))


def _federation(group: Group) -> dict[str, Any]:
    return {key: value for key, value in group.essence.items() if key.startswith("federation.")}
