"""The same configuration gives the same bits, whatever carries its messages."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from test_run import Watcher

from lowrank_core import LowrankError
from lowrank_fl.load import load_config
from lowrank_fl.run import resume, run

SMALL = [
    "data.max_examples=120",
    "federation.clients=4",
    "federation.clients_per_round=3",
    "federation.epochs=1",
    "rounds=2",
    "model.method=fedpara",
    "model.width=4",
]


def weights_of(folder: Path, *more: str) -> bytes:
    run(load_config("quickstart", [*SMALL, *more]), folder, Watcher())
    return (folder / "model.safetensors").read_bytes()


def results(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture
def started(monkeypatch):
    """`started()` is what runs of all that this test has started, however far down."""
    if sys.platform != "linux":
        pytest.skip("looks for processes in /proc")
    mark = uuid.uuid4().hex
    monkeypatch.setenv("LOWRANK_STARTED_BY", mark)

    def started() -> list[str]:
        found: list[str] = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended
                continue
        return found

    return started


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_ray_gives_the_bits_of_the_local_engine(tmp_path, strategy):
    """SCAFFOLD's clients also keep a state on disk, which any actor may go on with."""
    pytest.importorskip("ray")
    chosen = f"strategy.name={strategy}"
    alone = weights_of(tmp_path / "alone", chosen, "engine.workers=1")
    assert weights_of(tmp_path / "workers", chosen, "engine.workers=2") == alone
    assert weights_of(tmp_path / "ray", chosen, "engine.kind=ray", "engine.workers=2") == alone
    assert results(tmp_path / "ray") == results(tmp_path / "alone")
    assert (tmp_path / "ray" / "clients").exists() == (strategy == "scaffold")


@pytest.mark.slow
def test_two_supernodes_give_the_bits_of_the_local_engine_and_leave_nothing_behind(tmp_path, started):
    chosen = "strategy.name=scaffold"
    alone = weights_of(tmp_path / "alone", chosen, "engine.workers=1")
    config = load_config("quickstart", [*SMALL, chosen], local_nodes=2)
    [summary] = run(config, tmp_path / "nodes", Watcher())
    assert (tmp_path / "nodes" / "model.safetensors").read_bytes() == alone
    assert results(tmp_path / "nodes") == results(tmp_path / "alone")
    assert summary.run_dir == str(tmp_path / "nodes")
    assert summary.rounds == 2
    assert started() == []
    # And a finished run is left as it is.
    assert resume(tmp_path / "nodes", Watcher()) == [summary]


@pytest.mark.slow
def test_a_failure_on_the_supernodes_is_the_commands_own(tmp_path):
    config = load_config("quickstart", [*SMALL, "federation.lr=1e20"], local_nodes=1)
    with pytest.raises(LowrankError, match=r"cannot be used in round 1: training diverged"):
        run(config, tmp_path / "run", Watcher())


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["--local-nodes", "2"], ["--engine", "ray", "-o", "engine.workers=2"]])
def test_ctrl_c_keeps_the_finished_rounds_and_leaves_no_process(tmp_path, started, engine):
    out = tmp_path / "run"
    settings = [part for pair in [*SMALL, "rounds=100000"] for part in ("-o", pair)]
    command = [sys.executable, "-c", "from lowrank_cli.main import main; main()", "fl", "run", "quickstart", *settings]
    process = subprocess.Popen(
        [*command, *engine, "--json", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 600
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert json.loads(printed)["interrupted"]
    assert "Traceback" not in said
    assert (out / "model.safetensors").exists()
    deadline = time.monotonic() + 30
    while started():
        assert time.monotonic() < deadline, started()
        time.sleep(0.2)
    rounds = len(metrics.read_text().splitlines())
    assert f"error: interrupted after {rounds} finished rounds, which are kept in {out}" in said
