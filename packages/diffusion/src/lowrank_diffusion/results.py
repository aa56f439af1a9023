"""What a run reports: a row a step, a summary at the end; the shapes of metrics.jsonl and summary.json."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepRow:
    """One line of metrics.jsonl, in which `validation_loss` stands only where it was measured."""

    step: int
    """Optimizer steps done, from 1."""
    loss: float
    """Mean over the global batch."""
    lr: float
    """The UNet's."""
    images_per_second: float
    peak_memory_bytes: int
    """On a GPU the most that tensors held so far, of all processes; on a CPU the process's largest resident size."""
    seconds: float
    """Of the step alone, without validation, samples and checkpoints."""
    validation_loss: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """summary.json."""

    name: str
    run_dir: str
    method: str
    seed: int
    steps: int
    """Finished optimizer steps."""
    loss: float
    """Mean over the last twenty steps."""
    validation_loss: float | None
    """The last one measured."""
    base_validation_loss: float | None
    """Of the base without the adapter."""
    images_per_second: float
    """Median over the steps."""
    peak_memory_bytes: int
    trainable_params: int
    seconds: float
    """Of all steps."""
    interrupted: bool = False


@dataclass(frozen=True)
class RunStart:
    """What is known as training begins."""

    name: str
    method: str
    steps: int
    done: int
    """Steps that a checkpoint brought."""
    trainable_params: int
    pictures: int
    device: str


class Observer(Protocol):
    """Who watches a run: the command line's progress display, or nobody."""

    def note(self, text: str) -> None:
        """Something the user should know, such as a picture that was left out."""
        ...

    def stage(self, text: str, done: int, total: int) -> None:
        """How far something before or between the steps is."""
        ...

    def run_started(self, start: RunStart) -> None: ...

    def step_ended(self, row: StepRow) -> None: ...

    def run_ended(self, summary: RunSummary) -> None: ...


class Silent:
    """An observer who looks away."""

    def note(self, text: str) -> None: ...

    def stage(self, text: str, done: int, total: int) -> None: ...

    def run_started(self, start: RunStart) -> None: ...

    def step_ended(self, row: StepRow) -> None: ...

    def run_ended(self, summary: RunSummary) -> None: ...
