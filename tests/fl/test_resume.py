"""A run that was stopped, at any moment, ends with the weights of one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from test_run import Watcher

from lowrank_core import LowrankError
from lowrank_fl.load import load_config
from lowrank_fl.run import resume, run

SMALL = ["data.max_examples=120", "federation.clients=4", "federation.clients_per_round=2", "federation.epochs=1"]


def config(*more: str):
    quick = ["rounds=4", "model.method=fedpara", "model.width=4", "engine.workers=1"]
    return load_config("quickstart", [*SMALL, *quick, *more])


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def results(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "scaffold", "feddyn"])
@pytest.mark.parametrize("rounds", [0, 2])
def test_a_run_stopped_after_some_rounds_goes_on_to_the_same_bits(tmp_path, monkeypatch, strategy, rounds):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(config(f"strategy.name={strategy}"), whole, Watcher())

    class Stop(Watcher):
        def round_ended(self, row):
            super().round_ended(row)
            if row.round > rounds:
                if rounds == 0:
                    os.remove(stopped / "checkpoint" / "state.safetensors")
                raise SystemError("as if killed")

    with pytest.raises(SystemError):
        run(config(f"strategy.name={strategy}"), stopped, Stop())
    summaries = resume(stopped, Watcher())
    assert weights(stopped) == weights(whole)
    assert results(stopped) == results(whole)
    assert summaries[0].rounds == 4
    assert not summaries[0].interrupted


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    before = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    assert resume(tmp_path / "run", Watcher())[0].rounds == 4
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == before


def test_a_sweep_goes_on_with_the_runs_it_has_not_finished(tmp_path):
    settings = load_config(
        "quickstart", [*SMALL, "rounds=2", "model.width=4", "engine.workers=1", "model.gamma=0.1"], sweep=["seed=0,1"]
    )
    run(settings, tmp_path / "sweep", Watcher())
    expected = {path.name: weights(path) for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    shutil.rmtree(tmp_path / "sweep" / sorted(expected)[-1])
    summaries = resume(tmp_path / "sweep", Watcher())
    assert len(summaries) == len(expected)
    assert {path.name: weights(path) for path in (tmp_path / "sweep").iterdir() if path.is_dir()} == expected


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(LowrankError, match=r"holds no run to resume: there is no config.yaml in it"):
        resume(tmp_path, Watcher())


def test_a_damaged_checkpoint(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    file = tmp_path / "run" / "checkpoint" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(LowrankError, match=r"state.safetensors is damaged \(.*\); remove .*checkpoint to start"):
        resume(tmp_path / "run", Watcher())


def test_a_checkpoint_of_another_configuration(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.1", "lr: 0.2"))
    with pytest.raises(LowrankError, match="was left by a run with another configuration"):
        resume(tmp_path / "run", Watcher())


def test_rounds_that_metrics_lack(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(LowrankError, match=r"metrics.jsonl has 0 rounds, and the checkpoint 4"):
        resume(tmp_path / "run", Watcher())


def test_two_runs_in_one_folder(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(LowrankError, match="another run is writing to"):
        resume(tmp_path / "run", Watcher())


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_each_time(tmp_path):
    import random

    more = [part for item in [*SMALL, "rounds=30", "model.width=4", "strategy.name=scaffold"] for part in ("-o", item)]
    command = [sys.executable, "-c", "from lowrank_cli.main import main; main()", "fl", "run"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = [*command, "quickstart", "-o", "model.method=fedpara", *more, "--quiet", "--out"]
    subprocess.run([*start, str(whole)], check=True, capture_output=True)
    draw = random.Random(0)
    began = subprocess.Popen([*start, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(4):
        time.sleep(draw.uniform(3, 11))  # before the first checkpoint and after it
        began.send_signal(signal.SIGKILL)
        began.wait()
        if not (killed / "config.yaml").exists():
            shutil.rmtree(killed, ignore_errors=True)
            again = [*start, str(killed)]
        else:
            again = [*command, "--resume", str(killed), "--quiet"]
        began = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert began.wait() == 0
    assert weights(killed) == weights(whole)
    assert results(killed) == results(whole)
