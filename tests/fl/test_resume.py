"""A run that was stopped, at any moment, ends with the weights of one that was not."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from test_run import Watcher

from lowrank_core import LowrankError, UsageError
from lowrank_core.run_folder import locked, prepare
from lowrank_fl.folder import finished_rounds, write_config
from lowrank_fl.load import load_config
from lowrank_fl.run import resume, run

SMALL = ["data.max_examples=120", "federation.clients=4", "federation.clients_per_round=2", "federation.epochs=1"]


def config(*more: str, **flags):
    quick = ["rounds=4", "model.method=fedpara", "model.width=4", "engine.workers=1"]
    return load_config("quickstart", [*SMALL, *quick, *more], **flags)


class Killed(Watcher):
    """Ends a run after a round with no time to tidy up, as a kill does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def round_ended(self, row):
        super().round_ended(row)
        if row.round == self.after:
            raise SystemError("as if killed")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def results(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    before = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    assert resume(tmp_path / "run", Watcher())[0].rounds == 4
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == before


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_damaged_checkpoint(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    file = tmp_path / "run" / "checkpoint" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(LowrankError, match=r"state.safetensors is damaged \(.*\); remove .*checkpoint to start"):
        resume(tmp_path / "run", Watcher())


@pytest.mark.slow
def test_a_checkpoint_of_another_configuration(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.1", "lr: 0.2"))
    with pytest.raises(LowrankError, match="was left by a run with another configuration"):
        resume(tmp_path / "run", Watcher())


@pytest.mark.slow
def test_rounds_that_metrics_lack(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(LowrankError, match=r"metrics.jsonl has 0 rounds, and the checkpoint 4"):
        resume(tmp_path / "run", Watcher())


@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(LowrankError, match="another run is writing to"):
        resume(tmp_path / "run", Watcher())


@pytest.mark.parametrize("sweep", [[], ["seed=0,1"]])
def test_the_configuration_is_the_first_thing_written(tmp_path, monkeypatch, sweep):
    """A run that is killed as it starts can be resumed."""

    def be_killed(config):
        raise SystemError("as if killed")

    monkeypatch.setattr("lowrank_fl.run.make_engine", be_killed)
    settings = config(sweep=sweep)
    with pytest.raises(SystemError):
        run(settings, tmp_path / "run", Watcher())
    assert load_config(str(tmp_path / "run" / "config.yaml")) == settings


def test_a_superlinks_run_can_be_resumed_before_it_is_submitted(tmp_path, monkeypatch):
    def be_killed(config, folder, observer):
        raise SystemError("as if killed")

    monkeypatch.setattr("lowrank_fl.flower.app.submit.submit", be_killed)
    settings = config("engine.kind=superlink", "engine.address=h:1")
    with pytest.raises(SystemError):
        run(settings, tmp_path, Watcher())
    assert load_config(str(tmp_path / "config.yaml")) == settings


def test_a_folder_with_a_lock_alone_is_free(tmp_path):
    """Killed between the lock and config.yaml."""
    (tmp_path / ".lock").touch()
    assert prepare(tmp_path, "run") == tmp_path


def test_a_run_that_fails_before_it_begins_leaves_its_folder_free(tmp_path):
    with pytest.raises(LowrankError, match="none"):
        run(config("data.name=mine", f"data.path={tmp_path / 'none'}"), tmp_path / "run", Watcher())
    assert prepare(tmp_path / "run", "run") == tmp_path / "run"


def test_the_lock_stays_so_that_it_is_the_same_for_everybody(tmp_path):
    with locked(tmp_path):
        before = os.stat(tmp_path / ".lock").st_ino
    with locked(tmp_path):
        assert os.stat(tmp_path / ".lock").st_ino == before


PERSONALISED = ["model.method=pfedpara", "partition.held_out=0.2"]
ROUNDS = 20
MORE_KILLS = pytest.mark.skipif("LOWRANK_KILLS" not in os.environ, reason="SCAFFOLD's run does much the same")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["strategy.name=fedavg"], marks=MORE_KILLS),
        ["strategy.name=scaffold"],
        pytest.param(PERSONALISED, marks=MORE_KILLS),
    ],
)
def test_killed_at_random_moments_and_resumed_each_time(tmp_path, more):
    """Two kills, or as many as LOWRANK_KILLS says, about a quarter of them before the first checkpoint."""
    kills = int(os.environ.get("LOWRANK_KILLS", "2"))
    early = max(1, kills // 4)
    keys = [*SMALL, f"rounds={ROUNDS}", "data.max_examples=400", "model.width=4", "model.method=fedpara", *more]
    command = [sys.executable, "-c", "from lowrank_cli.main import main; main()", "fl", "run", "--quiet"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = [*command, "quickstart", *(part for key in keys for part in ("-o", key)), "--out"]
    subprocess.run([*start, str(whole)], check=True, capture_output=True)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    a_round = sum(row["seconds"] for row in rows) / ROUNDS
    draw = random.Random(0)
    for number in range(kills):
        known = (killed / "config.yaml").exists()
        again = [*command, "--resume", str(killed)] if known else [*start, str(killed)]
        done = finished_rounds(killed)
        written = killed / ["", "config.yaml", "metrics.jsonl"][number % 3]
        process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.time()
        if number < early:
            # The folder itself at first; each start writes the files anew before its first round.
            _wait(process, partial(_written, written, began))
        else:
            goal = max(done + 1, ROUNDS * (number - early + 1) // (kills - early + 1))
            _wait(process, partial(_has_rounds, killed, goal))
            time.sleep(draw.uniform(0, a_round))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert number >= early or not (killed / "checkpoint" / "state.safetensors").exists()
    subprocess.run([*command, "--resume", str(killed)], check=True, capture_output=True)
    assert weights(killed) == weights(whole)
    assert results(killed) == results(whole)


def _written(file: Path, since: float) -> bool:
    return file.exists() and file.stat().st_mtime > since


def _has_rounds(folder: Path, count: int) -> bool:
    return finished_rounds(folder) >= count


def _wait(process, condition) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.002)


@pytest.mark.slow
def test_what_may_change_when_a_run_goes_on(tmp_path):
    run(config(), tmp_path / "run", Watcher())
    more = ["rounds=5", "federation.tolerated_failures=0.5", "engine.workers=2"]
    assert resume(tmp_path / "run", Watcher(), more)[0].rounds == 5
    kept = load_config(str(tmp_path / "run" / "config.yaml"))
    assert (kept.rounds, kept.federation.tolerated_failures, kept.engine.workers) == (5, 0.5, 2)
    run(config("rounds=5"), tmp_path / "whole", Watcher())
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "federation.lr=1",
            "and federation.lr would make it another run",
        ),
        ("engine.threads=2", "and engine.threads would make it another run; leave it out, or start a new run"),
        ("rounds=3", "run has 4 finished rounds already; set rounds to more"),
    ],
)
def test_what_may_not_change_when_a_run_goes_on(tmp_path, override, said):
    run(config(), tmp_path / "run", Watcher())
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UsageError, match=re.escape(said)):
        resume(tmp_path / "run", Watcher(), [override])
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_swept_key_stays_as_it_is_when_a_sweep_goes_on(tmp_path):
    write_config(tmp_path, config(sweep=["rounds=1,2"]))
    with pytest.raises(UsageError, match="and rounds is swept; leave it out"):
        resume(tmp_path, Watcher(), ["rounds=3"])


@pytest.mark.slow
def test_a_finished_sweep_starts_no_workers_and_loads_no_data(tmp_path, monkeypatch):
    run(config("rounds=1", sweep=["seed=0,1"]), tmp_path / "sweep", Watcher())
    for name in ("run.make_engine", "one_run.examples_of"):
        monkeypatch.setattr(f"lowrank_fl.{name}", lambda config: pytest.fail("starts"))
    assert [summary.seed for summary in resume(tmp_path / "sweep", Watcher())] == [0, 1]


@pytest.mark.slow
def test_a_finished_run_on_a_superlink_is_not_submitted_again(tmp_path, monkeypatch):
    run(config("rounds=1"), tmp_path, Watcher())
    for name in ("model.safetensors", "checkpoint/state.safetensors"):  # they stay on the SuperLink's machine
        (tmp_path / name).unlink()
    write_config(tmp_path, config("rounds=1", "engine.kind=superlink", "engine.address=far.example:1"))
    monkeypatch.setattr("lowrank_fl.flower.app.submit.submit", lambda *_: pytest.fail("submits"))
    assert resume(tmp_path, Watcher())[0].rounds == 1


@pytest.mark.parametrize(("address", "held"), [("far.example:1", True), ("127.0.0.1:1", False)])
def test_the_folder_of_a_run_elsewhere_is_locked_while_it_is_followed(tmp_path, monkeypatch, address, held):
    def submit(config, folder, observer):
        """Here the ServerApp must be able to take the lock."""
        if held:
            with pytest.raises(LowrankError, match="another run is writing"), locked(folder):
                pass
        else:
            with locked(folder):
                pass
        return []

    monkeypatch.setattr("lowrank_fl.flower.app.submit.submit", submit)
    run(config("engine.kind=superlink", f"engine.address={address}"), tmp_path, Watcher())
