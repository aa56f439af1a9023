"""What the terminal's tables and the page's say, cell by cell."""

import math
from collections.abc import Sequence

from lowrank_fl.reporting.compare import ComparedRow
from lowrank_fl.reporting.groups import Group
from lowrank_fl.reporting.interval import Interval
from lowrank_fl.reporting.text import three_digits


def paper_value(row: ComparedRow) -> str:
    """As the paper printed it."""
    if row.paper is None:
        return "-"
    return "above" if row.paper.quantity == "above" else f"{row.paper.value:.{_decimals(row)}f}"


def our_value(row: ComparedRow) -> str:
    """The mean and half the interval with the paper's decimals; one number alone has no interval."""
    if row.ours is None:
        return "-" if row.group is None else "never"
    return with_interval(row.ours, _decimals(row))


def with_interval(found: Interval, decimals: int) -> str:
    """`82.31 ± 0.40`."""
    return f"{found.mean:.{decimals}f}" + (f" ± {found.half:.{decimals}f}" if found.half is not None else "")


def by_setting(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups by the names of their configurations, which are what can be compared."""
    settings: dict[str, list[Group]] = {}
    for group in groups:
        settings.setdefault(group.setting, []).append(group)
    return settings


def repeats(groups: Sequence[Group]) -> list[str]:
    """A sentence for each run that is left out because another of its configuration and seed counts."""
    kept = [(group, {run.config.seed: run.path for run in group.runs}) for group in groups]
    return [
        f"{run.path} is left out: {paths[run.config.seed]} has the same configuration and seed {run.config.seed}"
        for group, paths in kept
        for run in group.repeats
    ]


def measured(groups: Sequence[Group], rates: Sequence[float]) -> list[dict[str, str]]:
    """For each group of one setting, column to cell; all have the same columns."""
    target = common_target(groups)
    has_worst = any(group.worst_accuracy() is not None for group in groups)
    has_codec = any(_codec(group) != "none" for group in groups)
    has_gap = any(group.aggregation_gap() is not None for group in groups)
    has_epsilon = any(group.epsilon() is not None for group in groups)
    has_waits = any(group.simulated_seconds() is not None for group in groups)
    budget = common_budget(groups)
    rows: list[dict[str, str]] = []
    for group in groups:
        summary, worst = group.summary, group.worst_accuracy()
        cells = {
            "run": group.name,
            "seeds": str(len(group.runs)),
            "rounds": str(group.rounds),
            "accuracy, %": with_interval(group.accuracy().scaled(100), 2),
        }
        if has_worst:
            cells["worst tenth, %"] = with_interval(worst.scaled(100), 2) if worst else "-"
        cells["params"] = f"{summary.params:,}" if summary else "-"
        cells["sent, % of original"] = (
            f"{100 * summary.transferred_params / summary.original_params:.1f}" if summary else "-"
        )
        if has_codec:
            cells["codec up/down"] = _codec(group)
        if has_gap:
            gap = group.aggregation_gap()
            cells["gap, % of a step"] = f"{100 * gap.mean:.2f}" if gap else "-"
        if has_epsilon:
            spent = group.epsilon()
            cells["ε"] = "-" if spent is None else three_digits(spent)
        if has_waits:
            waits = group.simulated_seconds()
            cells["simulated s"] = three_digits(waits[0].mean) if waits else "-"
            cells["waiting for slow, s"] = three_digits(waits[1].mean) if waits else "-"
        reached, rounds = group.bytes_to(target / 100), group.rounds_to(target / 100)
        cells["MB total"] = three_digits(group.total_bytes() / 1e6)
        if budget is not None:
            within = group.accuracy_within(budget)
            name = f"accuracy at {three_digits(budget / 1e6)} MB, %"
            cells[name] = with_interval(within.scaled(100), 2) if within else "-"
        cells[f"MB to {target} %"] = three_digits(reached.mean / 1e6) if reached else "never"
        cells[f"rounds to {target} %"] = f"{rounds.mean:.4g}" if rounds else "never"
        for rate in rates:
            cells[f"s/round, {rate:g} Mbps"] = three_digits(group.seconds_at(rate).mean)
        rows.append(cells)
    return rows


def common_target(groups: Sequence[Group]) -> int:
    """The highest whole percent of accuracy that all these runs reached, those apart that trained for fewer rounds."""
    longest = max(group.rounds for group in groups)
    runs = [run for group in groups if group.rounds == longest for run in group.runs]
    # 0.29 * 100 is a little below 29.
    return math.floor(100 * min(max(row.accuracy for row in run.rows) for run in runs) + 1e-9)


def common_budget(groups: Sequence[Group]) -> int | None:
    """The bytes that the cheapest of these runs sent, rounded up to three digits; None where all sent as much or one
    sent nothing. Runs that trained for fewer rounds count too: they may have been meant to send as much.
    """
    totals = {three_digits(group.total_bytes() / 1e6) for group in groups if group.finished}
    least = min((group.total_bytes() for group in groups if group.finished), default=0)
    if len(totals) < 2 or not least:
        return None
    step = 10 ** (math.floor(math.log10(least)) - 2)
    return math.ceil(least / step) * step


def _codec(group: Group) -> str:
    up, down = group.essence["codec.up"], group.essence["codec.down"]
    return "none" if up == down == "none" else f"{up}/{down}"


def _decimals(row: ComparedRow) -> int:
    return 2 if row.paper is None else max(0, -round(math.log10(row.paper.unit)))
