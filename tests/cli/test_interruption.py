"""Ctrl-C as a user presses it, in the real command."""

import json
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_in_round_3_keeps_the_finished_rounds_and_exits_with_130(tmp_path, workers):
    out = tmp_path / "run"
    settings = ["-o", "model.method=fedpara", "-o", "rounds=500", "-o", f"engine.workers={workers}"]
    command = [sys.executable, "-c", "from lowrank_cli.main import main; main()", "fl", "run", *settings, "--json"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130
    summary = json.loads(printed)
    rounds = len(metrics.read_text().splitlines())
    assert summary["interrupted"]
    assert summary["rounds"] == rounds == json.loads((out / "summary.json").read_text())["rounds"] >= 3
    assert said.splitlines()[-1] == f"error: interrupted after {rounds} finished rounds, which are kept in {out}"
    assert "Traceback" not in said
    assert (out / "model.safetensors").exists()
