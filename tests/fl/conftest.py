"""What tests of federated runs share."""

import pytest


@pytest.fixture
def quick(monkeypatch):
    """Pictures take most of so short a run's time, and timing most of a plan's."""
    for module in ("run", "one_run"):
        monkeypatch.setattr(f"lowrank_fl.{module}.write_report", lambda out, summaries: None)
    monkeypatch.setattr("lowrank_fl.plan.work.time_steps", lambda *_: (1.0, 1.0))
