"""Tables on stdout."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 160
_TEXT_WIDTH = 8


def stdout() -> Console:
    """A console that prints text as it is: brackets in a name are no markup."""
    # Where it is no terminal, rich would squeeze every table into 80 columns.
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def make_table(columns: Sequence[str], *, left: int = 1) -> Table:
    """A table whose first `left` columns are text, which wraps where a line is short; the others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        if number < left:
            width = max(len(column), _TEXT_WIDTH)
            table.add_column(
                column, vertical="bottom" if left < len(columns) else "top", overflow="fold", min_width=width
            )
        else:
            table.add_column(column, justify="right", vertical="bottom", no_wrap=True)
    return table
