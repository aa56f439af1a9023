"""`lowrank fl partition`: how many examples of each class the clients hold."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from lowrank_cli.progress import watch
from lowrank_cli.tables import make_table, stdout
from lowrank_core.errors import LowrankError, UsageError
from lowrank_fl.config import RunConfig

_PICTURES = (".png", ".svg", ".pdf")
_DECIDING = ("data.", "partition.", "seed")
"""What the keys that decide on the counts begin with, the number of clients aside."""
_ROWS = 30
"""Of more clients the first so many have a row."""
_LARGEST = 5
"""Where there are too many classes for a column each, a client's so many largest are named."""
_OTHER_COLUMNS = 20
"""The width of the columns beside the classes."""


def count_labels(config: RunConfig, plot: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Print the counts, and draw them into `plot`; the partition is that of a run of `config`."""
    if plot is not None:
        _check(plot)
    with watch(quiet=quiet) as observer:
        for key, values in config.sweep.items():
            if key == "federation.clients" or key.startswith(_DECIDING):
                observer.note(f"{key} is swept; these are the counts for its first value, {values[0]}")
        from lowrank_fl.clients import examples_of, parts_of
        from lowrank_fl.data import label_counts, plot_label_counts

        examples = examples_of(config)
        counts = label_counts(examples, parts_of(config, examples).train)
        if plot is not None:
            plot_label_counts(counts, examples.classes, plot)
    if as_json:
        typer.echo(json.dumps({"clients": counts.tolist(), "classes": list(examples.classes)}))
        return
    _print_table(counts.tolist(), examples.classes)
    if plot is not None:
        typer.echo(f"picture: {plot}")


def _check(plot: Path) -> None:
    """Before the data is loaded, which may take minutes."""
    if plot.suffix.lower() not in _PICTURES:
        raise UsageError(f"--plot writes {', '.join(_PICTURES)}, got {plot.name!r}; give the file one of these endings")
    if not plot.parent.is_dir():
        raise LowrankError(f"--plot cannot write to {plot}: there is no folder {plot.parent}; make it first")


def _print_table(counts: list[list[int]], classes: Sequence[str]) -> None:
    """A row a client; where the classes do not fit side by side, each client's largest stand in their place."""
    console = stdout()
    totals = [sum(column) for column in zip(*counts, strict=True)]
    widths = [max(len(name), len(f"{total:,}")) + 2 for name, total in zip(classes, totals, strict=True)]
    if sum(widths) + _OTHER_COLUMNS <= console.width:
        table = make_table(["client", "examples", *classes], left=0)
        cells = [[f"{count:,}" for count in row] for row in [*counts, totals]]
    else:
        table = make_table(["client", "examples", "classes", "largest"], left=0)
        table.columns[-1].justify = "left"
        cells = [[str(sum(map(bool, row))), _largest(row, classes)] for row in [*counts, totals]]
    rows = [[str(client), f"{sum(row):,}", *cells[client]] for client, row in enumerate(counts)]
    for row in rows[:_ROWS]:
        table.add_row(*row)
    if len(rows) > _ROWS:
        table.add_row("...", *[""] * (len(rows[0]) - 1))
    table.add_section()
    table.add_row("all", f"{sum(totals):,}", *cells[-1])
    console.print(table)
    typer.echo()
    sizes, kinds = sorted(map(sum, counts)), sorted(sum(map(bool, row)) for row in counts)
    typer.echo(
        f"{sum(totals):,} examples among {len(counts)} clients: {sizes[0]:,} to {sizes[-1]:,} examples "
        f"and {kinds[0]} to {kinds[-1]} of {len(classes)} classes each"
    )


def _largest(row: Sequence[int], classes: Sequence[str]) -> str:
    order = sorted(range(len(row)), key=lambda label: -row[label])
    held = [f"{classes[label]} {row[label]:,}" for label in order if row[label]]
    return ", ".join(held[:_LARGEST]) + (", ..." if len(held) > _LARGEST else "")
