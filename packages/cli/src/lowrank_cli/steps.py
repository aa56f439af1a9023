"""What is shown on stderr while an adapter is trained."""

import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

import typer

from lowrank_cli.live import Bar, live_console
from lowrank_diffusion.results import Observer, RunStart, RunSummary, Silent, StepRow

_RECENT = 20
"""Steps over which loss and speed are averaged."""


@contextmanager
def watch_steps(*, quiet: bool) -> Generator[Observer]:
    """An observer to run under: silent, live on a terminal, or a line now and then where stderr is a file."""
    if quiet:
        yield Silent()
        return
    console = live_console()
    if console is None:
        yield _Lines()
        return
    with Bar(console, "loading libraries, data and base") as bar:
        yield _Live(bar)


class _Lines(Silent):
    """Plain lines for a log file, twenty for a run."""

    def __init__(self) -> None:
        self._steps = self._done = 0
        self._recent: deque[StepRow] = deque(maxlen=_RECENT)
        self._validation: float | None = None

    def note(self, text: str) -> None:
        self._print(text)

    def run_started(self, start: RunStart) -> None:
        self._steps, self._done = start.steps, start.done
        before = f", after {start.done} finished ones" if start.done else ""
        self._print(
            f"{start.name}: {start.method}, {start.trainable_params:,} parameters, {start.pictures} pictures, "
            f"{start.steps} steps on {start.device}{before}"
        )

    def step_ended(self, row: StepRow) -> None:
        self._add(row)
        if row.step % max(1, self._steps // 20) == 0 or row.step == self._steps:
            self._print(f"step {row.step}/{self._steps}  {self._quality(row)}")

    def _add(self, row: StepRow) -> None:
        self._recent.append(row)
        self._validation = self._validation if row.validation_loss is None else row.validation_loss

    def _quality(self, row: StepRow) -> str:
        loss = sum(each.loss for each in self._recent) / len(self._recent)
        rate = sum(each.images_per_second for each in self._recent) / len(self._recent)
        validation = "" if self._validation is None else f" (validation {self._validation:.4f})"
        return f"loss {loss:.4f}{validation}  {rate:.3g} images/s  {memory(row.peak_memory_bytes)}"

    def _print(self, text: str) -> None:
        typer.echo(text, err=True)


class _Live(_Lines):
    """A bar of steps, with the notes above it."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar
        self._began = 0.0

    def stage(self, text: str, done: int, total: int) -> None:
        self._bar.update(description=text, completed=done, total=total, quality=f"{done}/{total}")

    def run_started(self, start: RunStart) -> None:
        super().run_started(start)
        self._began = time.monotonic()
        self._bar.begin(start.name, start.steps, start.done)

    def step_ended(self, row: StepRow) -> None:
        self._add(row)
        a_step = (time.monotonic() - self._began) / (row.step - self._done)
        left = max(0, round(a_step * (self._steps - row.step)))
        quality = f"step {row.step}/{self._steps}  {self._quality(row)}  {_clock(left)} left"
        self._bar.update(completed=row.step, quality=quality)

    def run_ended(self, summary: RunSummary) -> None:
        self._bar.update(quality="writing files")

    def _print(self, text: str) -> None:
        self._bar.print(text)


def memory(count: int) -> str:
    """Bytes as `512 MB` or `11.2 GB`, in powers of ten."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
