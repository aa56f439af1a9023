"""`lowrank fl run`: carry runs out and show what came of them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from lowrank_cli.progress import watch
from lowrank_cli.tables import make_table, stdout
from lowrank_fl.config import RunConfig
from lowrank_fl.reporting.run_page import MARGIN, bytes_to_originals
from lowrank_fl.reporting.text import label_of, three_digits
from lowrank_fl.results import Observer, RunSummary


def carry_out(config: RunConfig, out: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Run `config` and print the summaries, after Ctrl-C too."""

    def work(observer: Observer) -> list[RunSummary]:
        from lowrank_fl.run import run

        return run(config, out, observer)

    _show(work, as_json=as_json, quiet=quiet)


def go_on(folder: Path, overrides: Sequence[str], *, as_json: bool, quiet: bool) -> None:
    """Resume what `folder` holds and print the summaries, after Ctrl-C too."""

    def work(observer: Observer) -> list[RunSummary]:
        from lowrank_fl.run import resume

        return resume(folder, observer, overrides)

    _show(work, as_json=as_json, quiet=quiet)


def _show(work: Callable[[Observer], list[RunSummary]], *, as_json: bool, quiet: bool) -> None:
    with watch(quiet=quiet) as observer:
        from lowrank_fl.run import Interrupted

        interruption = None
        try:
            summaries = work(observer)
        except Interrupted as stop:
            interruption, summaries = stop, stop.summaries
    is_sweep = any(summary.swept for summary in summaries)
    if summaries and as_json:
        typer.echo(json.dumps(_as_tree(summaries, is_sweep=is_sweep)))
    elif summaries:
        _print_table(summaries)
        if not quiet:
            where = _folder(summaries, is_sweep=is_sweep)
            report = where / "report.html"
            # A sweep that was interrupted has none for all its runs.
            typer.echo(f"\nfiles: {where}" + (f", report: {report}" if report.exists() else ""))
    if interruption is not None:
        raise interruption


def _folder(summaries: Sequence[RunSummary], *, is_sweep: bool) -> Path:
    first = Path(summaries[0].run_dir)
    return first.parent if is_sweep else first


def _as_tree(summaries: Sequence[RunSummary], *, is_sweep: bool) -> dict[str, Any]:
    trees = [dataclasses.asdict(summary) for summary in summaries]
    return {"runs": trees, "out": str(_folder(summaries, is_sweep=True))} if is_sweep else trees[0]


def _print_table(summaries: Sequence[RunSummary]) -> None:
    reached = bytes_to_originals(summaries)
    # The lines of the headers are cut so that a sweep fits into 80 columns.
    by_clients = any(summary.worst_accuracy is not None for summary in summaries)
    quality = ["clients'\naccuracy", "worst\ntenth"] if by_clients else ["accuracy"]
    columns = ["run", "params", "of\noriginal", *quality, "loss", "MB\nup", "MB\ndown", "MB\ntotal"]
    if reached is not None:
        columns.append(f"MB to\noriginal\n- {100 * MARGIN:.0f} pts")
    table = make_table([*columns, "s"])
    for index, summary in enumerate(summaries):
        cells = [
            label_of(summary.method, summary.swept)
            + (f" (interrupted, {summary.rounds} rounds)" if summary.interrupted else ""),
            # In the paper's tables millions have two decimals.
            f"{summary.params / 1e6:.2f}M" if summary.params >= 1e6 else f"{summary.params:,}",
            f"{summary.params / summary.original_params:.1%}",
            f"{summary.accuracy:.2%}",
            *([f"{summary.worst_accuracy:.2%}" if summary.worst_accuracy is not None else ""] if by_clients else []),
            f"{summary.loss:.3f}",
            *(three_digits(sent / 1e6) for sent in (summary.uplink_bytes, summary.downlink_bytes, summary.total_bytes)),
        ]
        if reached is not None:
            spent = reached[index]
            cells.append("never" if spent is None else three_digits(spent / 1e6))
        table.add_row(*cells, f"{summary.seconds:.1f}")
    stdout().print(table)
