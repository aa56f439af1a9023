"""Whole runs with codecs: the same bits however they are carried out, what a plan says, what they cost in quality."""

import pytest
from cases import kill_before_checkpoint
from test_resume import Killed, results, weights
from test_run import Watcher

from lowrank_fl.load import load_config
from lowrank_fl.plan import plan
from lowrank_fl.run import resume, run

SMALL = [
    "rounds=3",
    "data.max_examples=120",
    "federation.clients=4",
    "federation.clients_per_round=2",
    "federation.epochs=1",
    "model.method=fedpara",
    "model.width=4",
    "engine.workers=1",
]


def config(up: str, down: str, *more: str):
    return load_config("quickstart", [*SMALL, f"codec.up={up}", f"codec.down={down}", *more])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("up", "down", "more"),
    [
        ("int8", "fp16", ["strategy.name=fedadam"]),
        ("topk", "int8", ["strategy.name=scaffold"]),
        ("topk", "topk", ["strategy.name=scaffold", "partition.held_out=0.3"]),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, up, down, more):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(config(up, down, *more), whole, Watcher())

    with pytest.raises(SystemError):
        run(config(up, down, *more), stopped, Killed(after=2))
    resume(stopped, Watcher())
    assert weights(stopped) == weights(whole)
    assert results(stopped) == results(whole)


@pytest.mark.slow
def test_a_run_killed_within_a_round_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = config("topk", "topk", "partition.held_out=0.3")
    run(settings, whole, Watcher())

    # Everything of round 2 is done by clients, and nothing of it has reached the checkpoint.
    with monkeypatch.context() as patched:
        kill_before_checkpoint(patched, 2)
        with pytest.raises(SystemError):
            run(settings, stopped, Watcher())
    resume(stopped, Watcher())
    assert weights(stopped) == weights(whole)
    assert results(stopped) == results(whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["scaffold", "fedadam"])
def test_two_workers_give_the_bits_of_one(tmp_path, strategy):
    more = ["partition.held_out=0.3", f"strategy.name={strategy}"]
    for workers in (1, 2):
        run(config("topk", "topk", *more, f"engine.workers={workers}"), tmp_path / str(workers), Watcher())
    assert weights(tmp_path / "1") == weights(tmp_path / "2")
    assert results(tmp_path / "1") == results(tmp_path / "2")


@pytest.mark.slow
@pytest.mark.parametrize(("up", "down"), [("fp16", "int8"), ("topk", "fp16")])
def test_a_plan_says_what_the_run_then_sends(tmp_path, up, down):
    settings = config(up, down, "strategy.name=scaffold", "partition.held_out=0.3")
    (cost,) = plan(settings).runs
    watcher = Watcher()
    (summary,) = run(settings, tmp_path / "run", watcher)
    assert (cost.uplink_bytes, cost.downlink_bytes) == (summary.uplink_bytes, summary.downlink_bytes)
    assert cost.evaluation_bytes == sum(row.evaluation_bytes for row in watcher.rows)


@pytest.mark.slow
def test_a_plan_says_what_later_rounds_send_by_topk(tmp_path):
    settings = config("none", "topk", "federation.clients_per_round=4")
    (cost,) = plan(settings).runs
    watcher = Watcher()
    run(settings, tmp_path / "run", watcher)
    assert {row.downlink_bytes for row in watcher.rows[1:]} == {cost.downlink_bytes // 3}
    assert watcher.rows[0].downlink_bytes > cost.downlink_bytes // 3


@pytest.mark.slow
def test_what_codecs_cost_in_quality(tmp_path, monkeypatch):
    """Half precision costs nothing that can be seen; error feedback is what makes the largest entries enough."""

    def accuracy(name: str, *more: str) -> float:
        settings = ["model.method=original", "federation.clients=10", "federation.clients_per_round=10", "rounds=8"]
        settings = load_config("quickstart", [*settings, "federation.epochs=2", "engine.workers=1", *more])
        (summary,) = run(settings, tmp_path / name, Watcher())
        return summary.accuracy

    plain = accuracy("none")
    assert abs(accuracy("fp16", "codec.up=fp16", "codec.down=fp16") - plain) < 0.02
    share = ["codec.up=topk", "codec.top_k=0.001", "partition.kind=pathological"]
    kept = accuracy("kept", *share)
    monkeypatch.setattr("lowrank_fl.flower.client.codec_mod", lambda codec, seed, folder: _forgetful(codec, seed))
    assert accuracy("forgotten", *share) < kept - 0.05


def _forgetful(codec, seed):
    from lowrank_fl.flower.codecs import codec_mod

    return codec_mod(codec, seed)
