"""Simulated failures: who fails follows from the seed; who failed is as if not asked; the wait is counted."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_dropped_clients import CASES, CLIENTS, Federation, client_of
from test_resume import Killed, config, results, weights
from test_run import Watcher

from lowrank_fl.config import FailuresConfig, FederationConfig
from lowrank_fl.failures import simulate
from lowrank_fl.flower.records import to_arrays
from lowrank_fl.flower.rounds import Server
from lowrank_fl.run import resume, run

EXAMPLES = [100, 200, 300, 400]
ROUNDS = 6


def simulated(number=1, clients=(0, 1, 2, 3), seed=0, **keys):
    return simulate(FailuresConfig(**keys), FederationConfig(epochs=5), EXAMPLES, seed, number, clients)


def test_nothing_is_simulated_unless_asked_for():
    assert simulated() is None


def test_the_server_waits_for_the_slowest():
    """Five epochs of 100, 200, 300 and 400 examples, at 1000 a second."""
    plain = simulated(deadline=100.0)
    assert (plain.missing, plain.seconds, plain.waited) == ({}, 2.0, 0.0)
    slow = simulated(stragglers=1.0, slowdown=4)
    assert (slow.missing, slow.seconds, slow.waited) == ({}, 8.0, 6.0)
    fast = simulated(stragglers=1.0, slowdown=4, speed=2000)
    assert (fast.seconds, fast.waited) == (4.0, 3.0)


def test_a_deadline_ends_the_wait_and_leaves_out_who_is_late():
    late = simulated(stragglers=1.0, slowdown=4, deadline=5.0)
    assert late.missing == {
        2: "simulated: it takes 6 s, and the deadline is 5 s",
        3: "simulated: it takes 8 s, and the deadline is 5 s",
    }
    assert (late.seconds, late.waited) == (5.0, 3.0)


def test_who_drops_out_is_waited_for_only_where_there_is_a_deadline():
    assert simulated(dropout=1.0).seconds == 0
    gone = simulated(dropout=1.0, deadline=5.0)
    assert gone.missing == dict.fromkeys(range(4), "simulated: it dropped out")
    assert (gone.seconds, gone.waited) == (5.0, 0.0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 10**6), st.sets(st.integers(0, 3)))
def test_a_clients_fate_depends_on_seed_round_and_client_alone(seed, number, asked):
    keys = {"dropout": 0.5, "stragglers": 0.5, "deadline": 4.0}
    everyone = simulated(number, seed=seed, **keys).missing
    some = simulated(number, sorted(asked), seed, **keys).missing
    assert some == {client: reason for client, reason in everyone.items() if client in asked}


@pytest.mark.slow
def test_as_many_fail_as_asked_for():
    fates = [simulated(number, dropout=0.3, stragglers=0.2, deadline=3.0) for number in range(1, 2001)]
    out = sum(reason.endswith("out") for fate in fates for reason in fate.missing.values())
    assert out / 8000 == pytest.approx(0.3, abs=0.02)
    late = sum(2 in fate.missing and not fate.missing[2].endswith("out") for fate in fates)
    assert late / 2000 == pytest.approx(0.7 * 0.2, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_client_that_is_made_to_fail_is_as_one_whose_reply_is_lost(case, tmp_path):
    """With the bits of everything that follows, the client's own state included, and without tolerated_failures."""
    failures = FailuresConfig(dropout=0.25)
    federation = FederationConfig(clients=CLIENTS, epochs=1)
    fates = {n: simulate(failures, federation, [15] * CLIENTS, 5, n, range(CLIENTS)) for n in range(1, ROUNDS + 1)}
    assert all(len(fate.missing) < 3 for fate in fates.values())

    def answered(number, message, answer):
        return answer(message)

    def lost(number, message, answer):
        return None if client_of(message) in fates[number].missing else answer(message)

    ran = []
    for name, treat, simulated_here in (("made", answered, failures), ("lost", lost, None)):
        federation = Federation(tmp_path / name, treat, **CASES[case])
        tolerated = 0.0 if simulated_here else 0.7
        told = federation.federation.model_copy(update={"tolerated_failures": tolerated})
        server = Server(
            federation.strategy, federation.grid, told, federation.wire, 5, [15] * CLIENTS, failures=simulated_here
        )
        ran.append(list(server.rounds(federation.start, ROUNDS)))
    made, without = ran
    for one, other in zip(made, without, strict=True):
        assert {n: a.tobytes() for n, a in to_arrays(one.arrays).items()} == {
            n: a.tobytes() for n, a in to_arrays(other.arrays).items()
        }
        assert one.dropped == {c: r for c, r in fates[one.number].missing.items() if c in one.clients}
        assert one.dropped.keys() == other.dropped.keys()
        assert one.downlink_bytes == other.downlink_bytes
        assert one.uplink_bytes == other.uplink_bytes
    assert any(one.dropped for one in made)


FAILING = ["failures.dropout=0.4", "failures.stragglers=0.3", "failures.deadline=0.2", "federation.clients_per_round=4"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["scaffold", "krum"])
def test_a_stopped_run_goes_on_to_the_same_bits_and_rows(tmp_path, quick, strategy):
    told = [*FAILING, f"strategy.name={strategy}"]
    [summary] = run(config(*told), tmp_path / "whole", Watcher())
    with pytest.raises(SystemError):
        run(config(*told), tmp_path / "stopped", Killed(after=2))
    resume(tmp_path / "stopped", Watcher())
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    assert any(row["dropped"] for row in rows)
    assert summary.simulated_seconds == pytest.approx(sum(row["simulated_seconds"] for row in rows))
    assert summary.waited_seconds == pytest.approx(sum(row["waited_seconds"] for row in rows))


@pytest.mark.slow
def test_failures_cost_downlink_and_no_uplink(tmp_path, quick):
    [plain] = run(config("federation.clients_per_round=4"), tmp_path / "plain", Watcher())
    [failing] = run(config(*FAILING), tmp_path / "failing", Watcher())
    answered = sum(4 - len(row["dropped"]) for row in rows_of(tmp_path / "failing"))
    assert failing.downlink_bytes == plain.downlink_bytes
    assert failing.uplink_bytes == plain.uplink_bytes * answered // 16


@pytest.mark.parametrize("more", [[], ["aggregation.gap=true"], ["codec.up=topk"], ["privacy.noise_multiplier=0"]])
def test_a_round_that_nobody_answers_leaves_the_model_as_it_was(tmp_path, quick, more):
    run(config("failures.dropout=1", "rounds=2", *more), tmp_path / "run", Watcher())
    first, second = rows_of(tmp_path / "run")
    assert first["train_loss"] is second["train_loss"] is None
    assert (first["accuracy"], first["loss"]) == (second["accuracy"], second["loss"])
    assert first["uplink_bytes"] == 0 < first["downlink_bytes"]
    assert len(first["dropped"]) == 2


@pytest.mark.slow
def test_the_report_and_the_terminal_say_what_waiting_costs(tmp_path, capsys):
    from lowrank_cli.progress import _Lines
    from lowrank_fl.reporting.groups import group_runs
    from lowrank_fl.reporting.read import find_runs
    from lowrank_fl.reporting.show import measured

    watcher = _Lines()
    watcher.run_ended(
        SimpleNamespace(
            total_bytes=1e6, seconds=2.0, accuracy=0.5, worst_accuracy=None, rounds=3, epsilon=1.25,
            simulated_seconds=40.0, waited_seconds=30.0,
        )
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "accuracy 50.00%, ε 1.25 after 3 rounds, 1.00 MB in 2.0 s; simulated 40.0 s, 30.0 s of them waiting" in said
    run(config("failures.stragglers=0.5", "rounds=2"), tmp_path / "slow", Watcher())
    run(config("rounds=2"), tmp_path / "plain", Watcher())
    shown = measured(group_runs(find_runs([tmp_path]).runs), (10.0,))
    assert [row["simulated s"] == "-" for row in shown] == [row["run"] == "fedpara, stragglers 0.0" for row in shown]
    assert "waiting for slow clients" in (tmp_path / "slow" / "report.html").read_text()
    assert "waiting for slow clients" not in (tmp_path / "plain" / "report.html").read_text()
