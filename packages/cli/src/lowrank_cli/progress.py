"""What is shown on stderr while a command works."""

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from lowrank_cli.live import Bar, live_console
from lowrank_fl.reporting.text import label_of, three_digits
from lowrank_fl.results import Observer, RoundRow, RunStart, RunSummary


@contextmanager
def watch(*, quiet: bool) -> Generator[Observer]:
    """An observer to run under: silent, live on a terminal, or a line at each run's end where stderr is a file."""
    if quiet:
        yield _Silent()
        return
    console = live_console()
    if console is None:
        lines = _Lines()
        with _logged_by(lines):
            yield lines
        return
    with _bar(console) as bar:
        live = _Live(bar)
        with _logged_by(live):
            yield live


def _bar(console: Console) -> Bar:
    return Bar(console, "loading libraries and data", _Remaining(Column(no_wrap=True)), until=None)


class _Silent:
    def note(self, text: str) -> None: ...

    def run_started(self, start: RunStart) -> None: ...

    def round_ended(self, row: RoundRow) -> None: ...

    def run_ended(self, summary: RunSummary) -> None: ...


class _Lines(_Silent):
    """Plain lines for a log file."""

    def __init__(self) -> None:
        self._noted: set[str] = set()
        self._title = ""

    def note(self, text: str) -> None:
        # The runs of a sweep mostly have the same to say.
        if text not in self._noted:
            self._noted.add(text)
            self._print(text)

    def run_started(self, start: RunStart) -> None:
        self._title = _title(start)

    def run_ended(self, summary: RunSummary) -> None:
        sent = f"{three_digits(summary.total_bytes / 1e6)} MB in {summary.seconds:.1f} s"
        accuracy = f"accuracy {summary.accuracy:.2%}"
        if summary.worst_accuracy is not None:
            accuracy = f"mean accuracy over clients {summary.accuracy:.2%} (worst tenth {summary.worst_accuracy:.2%})"
        rounds = "1 round" if summary.rounds == 1 else f"{summary.rounds} rounds"
        private = "" if summary.epsilon is None else f", ε {three_digits(summary.epsilon)}"
        waits = ""
        if summary.simulated_seconds is not None and summary.waited_seconds is not None:
            whole, waited = three_digits(summary.simulated_seconds), three_digits(summary.waited_seconds)
            waits = f"; simulated {whole} s, {waited} s of them waiting for slow clients"
        self._print(f"{self._title}: {accuracy}{private} after {rounds}, {sent}{waits}")

    def _print(self, text: str) -> None:
        typer.echo(text, err=True)


class _Live(_Lines):
    """A bar of rounds, with the notes above it."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar
        self._rounds = self._sent = 0
        self._seconds = 0.0

    def run_started(self, start: RunStart) -> None:
        super().run_started(start)
        self._rounds, self._sent, self._seconds = start.rounds, 0, 0.0
        self._bar.begin(self._title, start.rounds, until=None)

    def round_ended(self, row: RoundRow) -> None:
        self._sent += row.total_bytes
        self._seconds += row.seconds
        rounds_left = self._rounds - row.round
        until = time.monotonic() + self._seconds / row.round * rounds_left if rounds_left else None
        worst = "" if row.worst_accuracy is None else f" (worst tenth {row.worst_accuracy:.1%})"
        private = "" if row.epsilon is None else f"  ε {three_digits(row.epsilon)}"
        sent = f"{three_digits(self._sent / 1e6)} MB"
        quality = f"round {row.round}/{self._rounds}  {row.accuracy:.1%}{worst}{private}  {sent}"
        self._bar.update(completed=row.round, quality=quality, until=until)

    def _print(self, text: str) -> None:
        self._bar.print(text)


class _Remaining(ProgressColumn):
    """Time left, counting down; rich's own knows nothing until two rounds are done, and forgets rounds of over 30 s."""

    def render(self, task: Task) -> Text:
        until = task.fields["until"]
        if until is None:
            return Text()
        seconds = max(0, round(until - time.monotonic()))
        return Text(f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left", style="cyan")


class _Notes(logging.Handler):
    def __init__(self, observer: Observer) -> None:
        super().__init__(logging.INFO)
        self._observer = observer

    def emit(self, record: logging.LogRecord) -> None:
        self._observer.note(record.getMessage())


@contextmanager
def _logged_by(observer: Observer) -> Generator[None]:
    """Pass what lowrank_fl logs to the observer, so that it does not tear the bar."""
    logger = logging.getLogger("lowrank_fl")
    handler, level, propagate = _Notes(observer), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _title(start: RunStart) -> str:
    number = f"run {start.index + 1}/{start.count} " if start.count > 1 else ""
    return f"{number}{start.name}: {label_of(start.method, start.swept)}"
