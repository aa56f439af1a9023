"""The command as its users see it, and runs that cost nothing."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowrank_cli.main import main
from lowrank_fl.results import RoundRow, RunStart, RunSummary


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def lowrank(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`lowrank("fl", "run")` is the command, its exit code and what it printed."""

    def lowrank(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return lowrank


@pytest.fixture
def summary() -> Callable[..., RunSummary]:
    """A run's summary with a tenth of the original's parameters, but for what is given."""

    def summary(run_dir: Path | str = "runs/made", **given: Any) -> RunSummary:
        values: dict[str, Any] = {
            "name": "made",
            "method": "fedpara",
            "seed": 0,
            "rounds": 2,
            "accuracy": 0.95,
            "loss": 0.125,
            "params": 100,
            "transferred_params": 100,
            "original_params": 1000,
            "uplink_bytes": 1_000_000,
            "downlink_bytes": 2_000_000,
            "total_bytes": 3_000_000,
            "seconds": 4.0,
        }
        return RunSummary(run_dir=str(run_dir), **values | given)

    return summary


@pytest.fixture
def row() -> Callable[..., RoundRow]:
    """`row(round=1, accuracy=0.5, total_bytes=10)`."""

    def row(**given: Any) -> RoundRow:
        values: dict[str, Any] = {
            "round": 1,
            "accuracy": 0.5,
            "loss": 1.0,
            "train_loss": 1.0,
            "uplink_bytes": 500_000,
            "downlink_bytes": 500_000,
            "total_bytes": 1_000_000,
            "seconds": 2.0,
            "clients": [0, 1],
        }
        return RoundRow(**values | given)

    return row


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch, summary: Any, row: Any) -> dict[str, Any]:
    """Replace `lowrank_fl.run.run` by one that trains nothing; the dict holds what it was called with."""
    import lowrank_fl.run
    from lowrank_fl.load import expand

    called: dict[str, Any] = {}

    def run(config: Any, out: Path | None, observer: Any) -> list[RunSummary]:
        called.update(config=config, out=out)
        runs = expand(config)
        summaries: list[RunSummary] = []
        for index, (single, swept) in enumerate(runs):
            method = single.model.method
            share = 1000 if method == "original" else 100
            path = (
                (out or Path("runs/made")) / "-".join(map(str, swept.values())) if swept else out or Path("runs/made")
            )
            observer.note("head stays as it is: excluded")
            observer.run_started(RunStart(single.name, index, len(runs), method, 2, share, 1000, swept))
            rows = [row(round=1, total_bytes=share * 10_000), row(round=2, accuracy=0.95, total_bytes=share * 10_000)]
            if out is not None:
                path.mkdir(parents=True)
                lines = [json.dumps(dataclasses.asdict(each)) + "\n" for each in rows]
                (path / "metrics.jsonl").write_text("".join(lines))
            for each in rows:
                observer.round_ended(each)
            summaries.append(summary(path, name=single.name, method=method, params=share, swept=swept))
            observer.run_ended(summaries[-1])
        if out is not None:
            (out / "report.html").touch()
        return summaries

    monkeypatch.setattr(lowrank_fl.run, "run", run)
    return called
