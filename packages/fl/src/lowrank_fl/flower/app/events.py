"""How a ServerApp tells the command that submitted it what happens: lines in the run's log, which Flower carries."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from lowrank_core import LowrankError
from lowrank_fl.results import Observer, RoundRow, RunStart, RunSummary

_MARK = "lowrank-fl: "


class Teller:
    """The Observer of a run in a ServerApp."""

    def note(self, text: str) -> None:
        _tell("note", text)

    def run_started(self, start: RunStart) -> None:
        _tell("run_started", dataclasses.asdict(start))

    def round_ended(self, row: RoundRow) -> None:
        _tell("round_ended", dataclasses.asdict(row))

    def run_ended(self, summary: RunSummary) -> None:
        _tell("run_ended", dataclasses.asdict(summary))

    def done(self, summaries: Sequence[RunSummary]) -> None:
        _tell("done", [dataclasses.asdict(summary) for summary in summaries])

    def stopped(self, summaries: Sequence[RunSummary]) -> None:
        _tell("stopped", [dataclasses.asdict(summary) for summary in summaries])

    def failed(self, error: LowrankError) -> None:
        _tell("failed", str(error))


class Listener:
    """Passes on to an observer what a Teller tells, and keeps how the run ended."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.summaries: list[RunSummary] | None = None
        """Of every run, once all are done or the last was stopped."""
        self.error: str | None = None
        self.stopped = False

    def hear(self, line: str) -> bool:
        """Whether a line of the log was told by a Teller."""
        _, mark, told = line.partition(_MARK)
        if not mark:
            return False
        kind, value = json.loads(told)
        match kind:
            case "note":
                self._observer.note(value)
            case "run_started":
                self._observer.run_started(RunStart(**value))
            case "round_ended":
                self._observer.round_ended(RoundRow(**value))
            case "run_ended":
                self._observer.run_ended(RunSummary(**value))
            case "done" | "stopped":
                self.summaries = [RunSummary(**each) for each in value]
                self.stopped = kind == "stopped"
            case _:
                self.error = value
        return True


def _tell(kind: str, value: Any) -> None:
    print(_MARK + json.dumps([kind, value]), flush=True)
