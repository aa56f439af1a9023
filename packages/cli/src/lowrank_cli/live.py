"""A bar on stderr while a command works."""

import sys
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn


def live_console() -> Console | None:
    """Where a bar can be shown; None where stderr is no terminal."""
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    # isatty too, because rich takes FORCE_COLOR for a terminal.
    return console if console.is_interactive and sys.stderr.isatty() else None


class Bar:
    """A bar that is gone when the work is done; what is printed stays above it."""

    def __init__(self, console: Console, description: str, *columns: ProgressColumn, **fields: Any) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[quality]}"),
            *columns,
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(description, total=None, quality="", **fields)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, description: str, total: int, completed: int = 0, **fields: Any) -> None:
        """Start anew, with the clock at zero."""
        self._progress.reset(
            self._task, description=description, total=total, completed=completed, quality="", **fields
        )

    def update(self, **changed: Any) -> None:
        """Any of description, total, completed, quality and the fields of the other columns."""
        self._progress.update(self._task, **changed)

    def print(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(text)
