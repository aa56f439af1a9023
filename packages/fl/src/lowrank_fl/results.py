"""What a run reports: a row a round, a summary at the end; the shapes of metrics.jsonl and summary.json."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Evaluation:
    """How good a model is, found by the server on its test set, or by all clients on what they hold out.

    Means over clients count every client the same.
    """

    accuracy: float
    loss: float
    worst_accuracy: float | None = None
    client_accuracies: list[float | None] = field(default_factory=list[float | None])
    sent_bytes: int = 0
    """Both ways; the server's own costs none."""
    dropped: dict[int, str] = field(default_factory=dict[int, str])
    """Clients whose replies cannot be used, and why."""


@dataclass(frozen=True)
class RoundRow:
    """One line of metrics.jsonl. Bytes and seconds are those of this round alone."""

    round: int
    accuracy: float
    """Fraction answered rightly, 0 to 1: of the server's test set, or, where clients test, the mean over all clients
    of each one's own held-out examples."""
    loss: float
    """Mean cross-entropy, likewise."""
    train_loss: float | None
    """Mean over the round's clients, weighted by their examples, in their last epoch; None where every one of them was
    made to fail (`failures`), and the model stays as it was."""
    uplink_bytes: int
    downlink_bytes: int
    total_bytes: int
    seconds: float
    """Training, aggregation and evaluation."""
    clients: list[int]
    dropped: dict[str, str] = field(default_factory=dict[str, str])
    """Clients whose replies were not used, and why; by their number as text, as JSON has it."""
    worst_accuracy: float | None = None
    """Mean accuracy of the worst tenth of the clients, at least one; None where the server tests."""
    client_accuracies: list[float | None] = field(default_factory=list[float | None])
    """By client, None for one that could not be asked; empty where the server tests."""
    evaluation_bytes: int = 0
    """Sent both ways to have clients test, in no other number here."""
    aggregation_gap: float | None = None
    """‖mean of the composed weights - weights of the mean factors‖ over ‖mean of the composed weights - weights sent‖,
    Frobenius norms of all factorized weights together; None where it was not asked for."""
    layer_gaps: dict[str, float | None] = field(default_factory=dict[str, float | None])
    """The same of each factorized weight."""
    refit_residual: float | None = None
    """Under aggregation refit, the gap that the refitted factors leave."""
    rank: int | None = None
    """Of all AdaLoRA's layers together, as the round leaves them; None without AdaLoRA."""
    layer_ranks: dict[str, int] = field(default_factory=dict[str, int])
    """The same of each layer."""
    epsilon: float | None = None
    """ε of all rounds so far at `privacy.delta`; None without privacy or without noise."""
    simulated_seconds: float | None = None
    """How long the server waits for replies, where failures are simulated; none of them passes."""
    waited_seconds: float | None = None
    """How much of that it waits for slow clients."""


@dataclass(frozen=True)
class RunSummary:
    """summary.json: the last round's quality and what the whole run cost."""

    name: str
    run_dir: str
    method: str
    seed: int
    rounds: int
    """Rounds finished."""
    accuracy: float
    loss: float
    params: int
    transferred_params: int
    original_params: int
    uplink_bytes: int
    downlink_bytes: int
    total_bytes: int
    seconds: float
    interrupted: bool = False
    swept: dict[str, Any] = field(default_factory=dict[str, Any])
    """The sweep's keys and this run's values for them; empty outside a sweep."""
    worst_accuracy: float | None = None
    client_accuracies: list[float | None] = field(default_factory=list[float | None])
    evaluation_bytes: int = 0
    """Of all rounds, both ways; not in `total_bytes`."""
    execution: str = "sequential"
    """How the clients were trained: `engine.execution`, or what `auto` chose."""
    epsilon: float | None = None
    simulated_seconds: float | None = None
    waited_seconds: float | None = None


@dataclass(frozen=True)
class RunStart:
    """What is known as a run begins."""

    name: str
    index: int
    """This run's number within a sweep, from 0."""
    count: int
    """Runs in the sweep; 1 outside one."""
    method: str
    rounds: int
    params: int
    original_params: int
    swept: dict[str, Any]


class Observer(Protocol):
    """Who watches a run: the command line's progress display, or nobody."""

    def note(self, text: str) -> None:
        """Something the user should know, such as a layer that stayed as it was."""
        ...

    def run_started(self, start: RunStart) -> None: ...

    def round_ended(self, row: RoundRow) -> None: ...

    def run_ended(self, summary: RunSummary) -> None: ...


def bytes_to_reach(rows: Sequence[RoundRow], accuracy: float) -> int | None:
    """Total bytes until a round's accuracy is first at or above `accuracy`; None if that never happens."""
    spent = 0
    for row in rows:
        spent += row.total_bytes
        if row.accuracy >= accuracy:
            return spent
    return None


def total_of(values: Iterable[float | None]) -> float | None:
    """The sum of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def round_seconds(computing: float, client_bytes: float, mbps: float) -> float:
    """Seconds of a round: a client's computing, and its bytes down and up over a link.

    A megabit is 2^20 bits: so the paper's Table 7 follows from its model sizes (the original's 2 Mbps entry alone is
    5.00 s above that).
    """
    return computing + 8 * client_bytes / (mbps * 2**20)
