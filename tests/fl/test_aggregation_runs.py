"""Whole runs that average weights and not only factors: what travels, what it costs, the same bits, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from cases import equal_parts, how, small_examples
from safetensors.numpy import load_file
from test_resume import Killed, results, weights
from test_run import Watcher
from torch import nn

from lowrank_core import UsageError, factorize
from lowrank_fl.aggregation import FactorAggregation, trained_in_turn
from lowrank_fl.checkpoint import load_checkpoint
from lowrank_fl.config import AggregationConfig, CodecConfig, StrategyConfig
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import InProcess
from lowrank_fl.load import load_config
from lowrank_fl.paper.match import differences, essence
from lowrank_fl.paper.rows import paper_rows
from lowrank_fl.plan import plan
from lowrank_fl.run import resume, run
from lowrank_fl.state import state_of, trained_names

SMALL = [
    "rounds=3",
    "data.max_examples=120",
    "federation.clients=4",
    "federation.clients_per_round=2",
    "federation.epochs=1",
    "model.width=4",
    "engine.workers=1",
]


def config(kind, *more, method="fedpara"):
    return load_config("quickstart", [*SMALL, f"model.method={method}", f"aggregation.kind={kind}", *more])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara", "svd", "kronecker"])
def test_a_run_of_each_kind(tmp_path, method):
    found = {}
    for kind in ("factors", "one-factor", "refit"):
        run(config(kind, "aggregation.gap=true", method=method), tmp_path / kind, Watcher())
        found[kind] = rows_of(tmp_path / kind)
    for row in found["factors"]:
        assert row["aggregation_gap"] > 1e-8
        assert set(row["layer_gaps"]) >= {"features.4.weight"}
        assert row["refit_residual"] is None
    for row, whole in zip(found["one-factor"], found["factors"], strict=True):
        assert row["aggregation_gap"] < 1e-11
        assert row["uplink_bytes"] < whole["uplink_bytes"]
    for row in found["refit"]:
        assert row["refit_residual"] < row["aggregation_gap"]
    assert found["refit"][0]["aggregation_gap"] == found["factors"][0]["aggregation_gap"]
    page = (tmp_path / "refit" / "report.html").read_text()
    assert "<h2>Aggregation gap</h2>" in page
    assert "<th>after refit</th>" in page


@pytest.mark.slow
def test_the_gap_is_looked_at_only_where_asked_for_and_changes_nothing(tmp_path):
    for gap in ("true", "false"):
        run(config("factors", f"aggregation.gap={gap}"), tmp_path / gap, Watcher())
    assert weights(tmp_path / "true") == weights(tmp_path / "false")
    assert rows_of(tmp_path / "false")[0]["aggregation_gap"] is None
    assert "Aggregation gap" not in (tmp_path / "false" / "report.html").read_text()


@pytest.mark.slow
def test_a_method_without_factors_has_no_gap_to_measure(tmp_path):
    run(config("factors", "aggregation.gap=true", "rounds=1", method="original"), tmp_path / "run", Watcher())
    assert rows_of(tmp_path / "run")[0]["aggregation_gap"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("up", "down"), [("none", "none"), ("fp16", "int8"), ("int8", "topk"), ("topk", "int8")])
def test_a_plan_costs_what_one_factor_a_round_then_costs(tmp_path, up, down):
    settings = config(
        "one-factor", f"codec.up={up}", f"codec.down={down}", "rounds=14", "federation.clients_per_round=4"
    )
    (expected,) = plan(settings).runs
    (summary,) = run(settings, tmp_path / "run", Watcher())
    assert expected.uplink_bytes == summary.uplink_bytes
    if down != "topk":  # whose first round brings everything
        assert expected.downlink_bytes == summary.downlink_bytes
    whole = plan(config("factors", "rounds=14", "federation.clients_per_round=4")).runs[0]
    assert expected.flops_per_round < whole.flops_per_round
    assert whole.paper_bytes / 2 < expected.paper_bytes < whole.paper_bytes


@pytest.mark.slow
def test_a_plan_of_one_turn_costs_what_its_factors_do(tmp_path):
    settings = config("one-factor", "rounds=1")
    (cost,) = plan(settings).runs
    run(settings, tmp_path / "run", Watcher())
    model = load_file(tmp_path / "run" / "model.safetensors")
    sent = [a.nbytes for n, a in model.items() if n.rpartition(".")[2][0] not in "xyt" or n.endswith(".x1")]
    assert cost.paper_bytes == 2 * (sum(a.nbytes for a in model.values()) + sum(sent))


RESUMED = [
    ("one-factor", []),
    ("one-factor", ["strategy.name=fedprox", "codec.up=topk", "codec.down=topk"]),
    ("one-factor", ["codec.up=int8", "partition.held_out=0.3", "personalization.kind=finetune"]),
    ("refit", ["strategy.name=fedprox"]),
    ("refit", ["codec.up=topk", "codec.down=fp16", "model.method=kronecker"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), RESUMED)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, kind, more):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = config(kind, "rounds=4", *more)
    run(settings, whole, Watcher())

    with pytest.raises(SystemError):
        run(settings, stopped, Killed(after=2))
    resume(stopped, Watcher())
    assert weights(stopped) == weights(whole)
    assert results(stopped) == results(whole)


@pytest.mark.slow
def test_worker_processes_give_the_same_bits(tmp_path):
    for workers in (1, 2):
        for kind in ("one-factor", "refit"):
            run(config(kind, f"engine.workers={workers}", "rounds=2"), tmp_path / f"{kind}{workers}", Watcher())
    for kind in ("one-factor", "refit"):
        assert weights(tmp_path / f"{kind}1") == weights(tmp_path / f"{kind}2")
        assert results(tmp_path / f"{kind}1") == results(tmp_path / f"{kind}2")


@pytest.mark.slow
def test_a_checkpoint_of_the_default_is_one_of_versions_without_the_key(tmp_path):
    settings = config("factors", "rounds=1")
    run(settings, tmp_path / "run", Watcher())
    assert load_checkpoint(tmp_path / "run", settings) is not None
    from lowrank_fl.checkpoint import _digest

    assert _digest(settings) == _digest(config("factors", "rounds=9"))
    assert _digest(settings) != _digest(config("refit", "rounds=1"))


def trained(tmp_path, treat, *, codec="none", kind="one-factor", rounds=5):
    """Rounds over our own clients, of which `treat(number, message, reply)` gives the reply; None is none."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    factorize(model, "fedpara", rank=2)
    examples = small_examples()
    local = dataclasses.replace(
        how(epochs=1, tolerated_failures=0.7), state_folder=tmp_path, codec=CodecConfig(up=codec, top_k=0.2)
    )
    executor, wire = InProcess(), Wire(local.codec, 7)
    executor.set_up(model, examples, equal_parts(examples, 4), local)

    def execute(messages):
        replies = []
        for message in messages:
            number = message.content.config_records["config"]["server-round"]
            reply = treat(number, message, executor.execute([message])[0])
            replies += [reply] if reply is not None else []
        return replies

    start = to_record(state_of(model), shared=False)
    strategy = make_strategy(StrategyConfig(), local.federation, trained_names(model))
    aggregation = FactorAggregation(AggregationConfig.model_validate({"kind": kind, "gap": True}), model)
    server = Server(strategy, LocalGrid(4, execute, shared=False), local.federation, wire, 5, aggregation=aggregation)
    yield {name: array.copy() for name, array in to_arrays(start).items()}, model
    for each in server.rounds(start, rounds):
        yield each, {name: array.copy() for name, array in to_arrays(each.arrays).items()}


@pytest.mark.parametrize("codec", ["none", "topk"])
def test_in_a_round_only_what_is_its_turn_changes(tmp_path, codec):
    sent: list[set[str]] = []

    def treat(number, message, reply):
        if codec == "none":
            sent.append(set(reply.content.array_records["arrays"]))
        return reply

    (before, model), *rounds = trained(tmp_path, treat, codec=codec)
    for number, (each, after) in enumerate(rounds):
        names = trained_in_turn(model, number)
        assert {name for name in before if not np.array_equal(before[name], after[name])} == names
        assert all(name == names for name in sent[3 * number : 3 * number + 3])
        assert each.found.gap < 1e-9
        assert list(after) == list(before)
        before = after


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one-factor", "refit"])
def test_a_dropped_client_is_in_no_mean(tmp_path, kind):
    """A client that does not answer, and one that sends what is not due, leave the same."""

    def lost(number, message, reply):
        return None if message.metadata.dst_node_id == 2 else reply

    def spoilt(number, message, reply):
        if message.metadata.dst_node_id == 2:
            arrays = to_arrays(reply.content.array_records["arrays"])
            broken = {name: array for name, array in arrays.items() if name != next(iter(arrays))}
            reply.content["arrays"] = to_record(broken, shared=False)
        return reply

    (_, *first), (_, *second) = (list(trained(tmp_path / t.__name__, t, kind=kind)) for t in (lost, spoilt))
    reasons = {reason for each, _ in second for reason in each.dropped.values()}
    due = "were sent" if kind == "refit" else "are due"
    assert reasons == {f"the arrays of arrays have other names than {due}"}
    for (one, a), (two, b) in zip(first, second, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
        assert (one.found.gap, one.found.residual) == (two.found.gap, two.found.residual)
        assert one.dropped.keys() == two.dropped.keys()


REFUSED = [
    (["aggregation.kind=one-factor", "model.method=original"], r"aggregation.kind one-factor is about factors, and "),
    (["aggregation.kind=refit", "model.method=original"], r"model.method original has none; set model.method to a"),
    (["aggregation.kind=one-factor", "model.tanh=true"], r"linear in each factor, and those of model.tanh are in none"),
    (["aggregation.kind=refit", "model.tanh=true"], r"set model.tanh=false"),
    (["aggregation.kind=one-factor", "strategy.name=scaffold"], r"strategy.name scaffold takes a step of its own"),
    (["aggregation.kind=refit", "strategy.name=krum"], r"makes the clients' mean exact, .*; use fedavg or fedprox"),
    (["aggregation.gap=true", "strategy.name=feddyn"], r"strategy.name feddyn takes none; use one of fedavg, fedavgm"),
    (["aggregation.gap=true", "strategy.name=fedmedian"], r"aggregation.gap is that of a mean by examples"),
    (
        ["aggregation.kind=one-factor", "model.jacobian_lambda=1"],
        r"model.jacobian_lambda is 1, .* set model.jacobian_lambda=0",
    ),
    (
        ["aggregation.kind=refit", "partition.held_out=0.2", "model.method=pfedpara"],
        r"under personalization.kind pfedpara a part of them is each client's own; set personalization.kind to none or",
    ),
    (
        ["aggregation.gap=true", "partition.held_out=0.2", "personalization.kind=fedper"],
        r"aggregation.gap is about weights that all clients share whole",
    ),
    (["aggregation.kind=exact"], r"aggregation.kind"),
    (["aggregation.sweeps=0"], r"aggregation.sweeps"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_does_not_go_together_is_said(overrides, message):
    with pytest.raises(UsageError, match=message):
        load_config("quickstart", ["model.method=fedpara", *overrides])


def test_the_corrections_that_other_methods_ignore_are_no_obstacle():
    for kind in ("one-factor", "refit"):
        more = ["model.tanh=true", "model.jacobian_lambda=1"]
        assert config(kind, *more, method="lowrank").aggregation.kind == kind
    assert config("refit", "model.jacobian_lambda=1").aggregation.sweeps == 2


def test_runs_are_compared_by_what_their_server_does_about_factors():
    plain, seen = essence(config("factors")), essence(config("factors", "aggregation.gap=true", "aggregation.sweeps=5"))
    assert plain == seen
    assert essence(config("refit")) != essence(config("refit", "aggregation.sweeps=5"))
    row = next(row for row in paper_rows() if row.preset == "cifar10-iid" and row.quantity == "accuracy")
    preset = [f"{key}={value}" for key, value in row.set.items()]
    assert differences(row, essence(load_config(row.preset, preset))) == []
    other = [*preset, "aggregation.kind=refit", "model.tanh=false"]
    assert differences(row, essence(load_config(row.preset, other))) is None
