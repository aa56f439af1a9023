"""`lowrank fl report`: runs beside each other and beside the paper's."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from lowrank_cli.tables import make_table, stdout
from lowrank_core.errors import UsageError
from lowrank_fl.reporting.compare import ComparedRow, compare
from lowrank_fl.reporting.groups import Group, group_runs
from lowrank_fl.reporting.page import Report, check_writable, summarise, write_page
from lowrank_fl.reporting.read import find_runs
from lowrank_fl.reporting.show import by_setting, measured, our_value, paper_value, repeats


def report_on(paths: Sequence[Path], out: Path, mbps: str, *, as_json: bool, quiet: bool) -> None:
    """Print what the runs below `paths` measured, and write the page `out` about them."""
    if not paths:
        raise UsageError("name the folder of a run or of a sweep, or one that holds such: lowrank fl report RUN...")
    rates = parse_rates(mbps)
    check_writable(out)
    found = find_runs(paths)
    if not quiet:
        for path in found.empty:
            typer.echo(f"{path} has not finished a round and is left out", err=True)
    groups = group_runs(found.runs)
    if not quiet:
        for text in repeats(groups):
            typer.echo(text, err=True)
    report = Report(groups, compare(groups), rates, found.empty)
    write_page(out, report)
    if as_json:
        rows = [row.as_tree() for row in report.rows]
        typer.echo(json.dumps({"rows": rows, "groups": [group.as_tree(rates) for group in groups], "report": str(out)}))
        return
    _print_rows([row for row in report.rows if row.group is not None and row.paper is not None])
    _print_groups(groups, rates)
    if not quiet:
        typer.echo(f"\nthe paper's numbers: {summarise(report.rows)}\nreport: {out}")


def parse_rates(text: str) -> tuple[float, ...]:
    """`2,10,50` as numbers.

    Raises:
        UsageError: one is no number above 0.
    """
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise UsageError(f"--mbps takes numbers above 0 such as 2,10,50, got {text!r}")
    return rates


def _print_rows(rows: Sequence[ComparedRow]) -> None:
    if not rows:
        return
    table = make_table(["source", "setting", "run", "quantity", "paper", "ours", "seeds", "status"], left=4)
    table.add_column("what differs", vertical="bottom", overflow="fold", min_width=24)
    for column in table.columns:
        column.vertical = "top"
    for row in rows:
        source = row.paper.source if row.paper else ""
        cells = [paper_value(row), our_value(row), str(len(row.seeds)), row.status or "", "; ".join(row.differs)]
        table.add_row(source, row.setting, row.run, row.quantity, *cells)
    stdout().print(table)


def _print_groups(groups: Sequence[Group], rates: Sequence[float]) -> None:
    for setting, members in by_setting(groups).items():
        rows = measured(members, rates)
        # The lines of the headers are cut so that the table stays narrow.
        table = make_table([name.replace(" ", "\n") for name in rows[0]])
        for row in rows:
            table.add_row(*row.values())
        typer.echo(f"\n{setting}")
        stdout().print(table)
