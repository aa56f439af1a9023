"""Runs that differ in their seed alone, and what they measured together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from lowrank_fl.paper.match import essence
from lowrank_fl.reporting.interval import Interval, interval_of
from lowrank_fl.reporting.read import RunRecord
from lowrank_fl.results import RoundRow, RunSummary, bytes_to_reach, round_seconds, total_of

# The method and who keeps what stand first in a label; data are the setting's.
_UNNAMED = ("data.", "model.method", "adapter.method", "adapter.rank", "adapter.target_rank", "update.kind")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration and different seeds, that have all finished or stopped at the same round."""

    runs: tuple[RunRecord, ...]
    essence: Mapping[str, Any]
    label: str
    repeats: tuple[RunRecord, ...] = ()
    """Further runs of the same seeds, left out because they are no independent results."""

    @property
    def setting(self) -> str:
        """The name of the configuration."""
        return self.runs[0].config.name

    @property
    def name(self) -> str:
        """The label, and how far the runs came where they did not finish."""
        return self.label if self.finished else f"{self.label} (unfinished: {self.rounds} of {self.planned} rounds)"

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    @property
    def rounds(self) -> int:
        return len(self.runs[0].rows)

    @property
    def planned(self) -> int:
        return self.runs[0].config.rounds

    @property
    def finished(self) -> bool:
        return self.runs[0].finished

    def as_tree(self, rates: Sequence[float]) -> dict[str, Any]:
        """For JSON."""
        summary, worst = self.summary, self.worst_accuracy()
        return {
            "setting": self.setting,
            "run": self.label,
            "seeds": self.seeds,
            "rounds": self.rounds,
            "finished": self.finished,
            "accuracy": self.accuracy().as_tree(),
            "worst_accuracy": worst.as_tree() if worst else None,
            "params": summary.params if summary else None,
            "transferred_params": summary.transferred_params if summary else None,
            "original_params": summary.original_params if summary else None,
            "total_bytes": self.total_bytes(),
            "aggregation_gap": gap.as_tree() if (gap := self.aggregation_gap()) else None,
            "epsilon": self.epsilon(),
            "simulated_seconds": waits[0].mean if (waits := self.simulated_seconds()) else None,
            "waited_seconds": waits[1].mean if waits else None,
            "codec": {way: self.essence[f"codec.{way}"] for way in ("up", "down")},
            "seconds_at_mbps": {f"{rate:g}": self.seconds_at(rate).mean for rate in rates},
            "run_dirs": [str(run.path) for run in self.runs],
            "left_out": [str(run.path) for run in self.repeats],
        }

    @property
    def summary(self) -> RunSummary | None:
        """Of any run that has one: sizes are the same in all."""
        return next((run.summary for run in self.runs if run.summary is not None), None)

    def accuracy(self) -> Interval:
        """After the last round, 0 to 1."""
        return interval_of([run.rows[-1].accuracy for run in self.runs])

    def worst_accuracy(self) -> Interval | None:
        """Of the worst tenth of the clients, 0 to 1; None where the server tested."""
        worst = [run.rows[-1].worst_accuracy for run in self.runs]
        known = [value for value in worst if value is not None]
        return interval_of(known) if len(known) == len(worst) else None

    def epsilon(self) -> float | None:
        """After the last round, the same for all seeds; None without privacy or without noise."""
        return self.runs[0].rows[-1].epsilon

    def simulated_seconds(self) -> tuple[Interval, Interval] | None:
        """That the server waited in all rounds where failures are simulated, and how many of them for slow clients."""
        rows = [run.rows for run in self.runs]
        whole = _all([total_of(row.simulated_seconds for row in each) for each in rows])
        waited = _all([total_of(row.waited_seconds for row in each) for each in rows])
        return (whole, waited) if whole and waited else None

    def total_bytes(self) -> int:
        """Of a run, both ways, all clients; the mean over seeds."""
        return round(fmean(sum(row.total_bytes for row in run.rows) for run in self.runs))

    def bytes_to(self, accuracy: float) -> Interval | None:
        """Until a round is first that accurate; None where a seed never is."""
        return _all([bytes_to_reach(run.rows, accuracy) for run in self.runs])

    def accuracy_within(self, budget: int) -> Interval | None:
        """After the last round that ends within so many bytes; None where a seed has no such round or ends before it
        has sent nearly as much, one more round of its last one's size.
        """
        return _all([_accuracy_within(run.rows, budget) for run in self.runs])

    def aggregation_gap(self) -> Interval | None:
        """What the server's mean was off by in a round, after a refit if there was one; the mean over rounds."""
        left = [
            [row.refit_residual if row.refit_residual is not None else row.aggregation_gap for row in run.rows]
            for run in self.runs
        ]
        return _all([fmean(known) if (known := [gap for gap in gaps if gap is not None]) else None for gaps in left])

    def rounds_to(self, accuracy: float) -> Interval | None:
        """Likewise in rounds."""
        return _all([next((r.round for r in run.rows if r.accuracy >= accuracy), None) for run in self.runs])

    def client_bytes(self) -> Interval:
        """That one client receives and sends in a round; the mean over rounds."""
        return interval_of([fmean(_share(row, row.total_bytes) for row in run.rows) for run in self.runs])

    def client_seconds(self) -> Interval:
        """One client's share of the measured seconds of a round, testing included; the mean over rounds."""
        return interval_of([fmean(_share(row, row.seconds) for row in run.rows) for run in self.runs])

    def seconds_at(self, mbps: float) -> Interval:
        """A round's seconds over a link of that speed, as the paper's Table 7 counts them."""
        sent, trained = self.client_bytes(), self.client_seconds()
        return Interval(round_seconds(trained.mean, sent.mean, mbps), trained.half)

    def bytes_so_far(self) -> list[list[int]]:
        """For each seed, the bytes up to the end of each round."""
        return [list(accumulate(row.total_bytes for row in run.rows)) for run in self.runs]


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """The runs by configuration, in the order of their first; each labelled by what sets it apart from the others.

    Of several runs of one configuration and seed, as under two engines, a group has the one with the most rounds; of
    equally many, one with a summary, then the newest.
    """
    repeated: dict[tuple[Any, ...], list[RunRecord]] = {}
    for run in runs:
        repeated.setdefault((*_configuration(run), run.config.seed), []).append(run)
    grouped: dict[tuple[Any, ...], list[RunRecord]] = {}
    left_out: dict[tuple[Any, ...], list[RunRecord]] = {}
    for alike in repeated.values():
        kept = max(alike, key=lambda run: (len(run.rows), run.summary is not None, run.written))
        key = (*_configuration(kept), None if kept.finished else len(kept.rows))
        grouped.setdefault(key, []).append(kept)
        left_out.setdefault(key, []).extend(run for run in alike if run is not kept)
    essences = [essence(members[0].config) for members in grouped.values()]
    names = [members[0].config.name for members in grouped.values()]
    groups: list[Group] = []
    for (key, members), name, parts in zip(grouped.items(), names, essences, strict=True):
        alike = [other for other, others_name in zip(essences, names, strict=True) if others_name == name]
        by_seed = tuple(sorted(members, key=lambda run: run.config.seed))
        groups.append(Group(by_seed, parts, _label(parts, alike), tuple(left_out[key])))
    return groups


def _configuration(run: RunRecord) -> tuple[Any, ...]:
    return run.config.name, *sorted(essence(run.config).items(), key=lambda item: item[0])


def _label(own: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> str:
    """`fedpara, gamma 0.1`: the method, who keeps what, and the keys in which others of the setting differ."""
    kind, method = str(own["personalization"]), str(own["model.method"])
    if "adapter.method" in own:
        ranks = [own[key] for key in ("adapter.rank", "adapter.target_rank") if key in own]
        method = f"{own['adapter.method']}, rank {' to '.join(map(str, ranks))}"
    if "update.kind" in own:
        method = f"{own['update.kind']} update"
    names = [method] if kind in ("none", method) else [kind] if method == "original" else [method, kind]
    for key, value in own.items():
        differs = any(key in other and other[key] != value for other in alike)
        if differs and value is not None and key != "personalization" and not key.startswith(_UNNAMED):
            section, _, last = key.rpartition(".")
            said = f"{section} {last}" if section in ("codec", "adapter") else last
            if section == "attack" and last == "kind":
                names.append("no attack" if value == "none" else f"{value} attack")
            else:
                names.append(str(value) if last in ("name", "kind") else f"{said} {value}")
    return ", ".join(names)


def _accuracy_within(rows: Sequence[RoundRow], budget: int) -> float | None:
    spent = list(accumulate(row.total_bytes for row in rows))
    inside = [row.accuracy for row, sent in zip(rows, spent, strict=True) if sent <= budget]
    enough = spent[-1] + rows[-1].total_bytes > budget
    return inside[-1] if inside and enough else None


def _all(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return interval_of(known) if len(known) == len(values) else None


def _share(row: RoundRow, amount: float) -> float:
    return amount / max(1, len(row.clients))
