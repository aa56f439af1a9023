"""Tables on stdout."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 160


def stdout() -> Console:
    """A console that prints text as it is: brackets in a name are no markup."""
    # Where it is no terminal, rich would squeeze every table into 80 columns.
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def make_table(columns: Sequence[str], *, left: int = 1, title: str | None = None) -> Table:
    """A table whose first `left` columns are text; the others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", vertical="bottom", overflow="fold")
    return table
