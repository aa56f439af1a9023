"""Privacy: clipping and noise are as told, clients count alike, ε is the accountant's, and an untrue ε is refused."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from cases import how, small_examples, small_model
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from test_resume import Killed, config, results, weights
from test_run import Watcher

from lowrank_core import LowrankError, UsageError
from lowrank_fl.config import FederationConfig, PrivacyConfig, RunConfig, StrategyConfig
from lowrank_fl.data.examples import Parts
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import make_private, make_strategy, strategy_state
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import InProcess
from lowrank_fl.plan import plan
from lowrank_fl.privacy import epsilon
from lowrank_fl.run import resume, run
from lowrank_fl.state import transferred

KINDS = [(clipping, side) for clipping in ("fixed", "adaptive") for side in ("server", "client")]
kinds = pytest.mark.parametrize(("clipping", "side"), KINDS)


def one_round(privacy, sampled=4, sizes=(15, 15, 15, 15)):
    """The model before and after a round of our own clients, which hold so many examples."""
    examples, model = small_examples(), small_model()
    train = [np.arange(15 * client, 15 * client + size) for client, size in enumerate(sizes)]
    local = dataclasses.replace(how(clients=4, clients_per_round=sampled), privacy=privacy)
    executor = InProcess()
    executor.set_up(model, examples, Parts(train, []), local)
    grid = LocalGrid(4, executor.execute, shared=False)
    start = to_record(transferred(model), shared=False)
    strategy = make_private(make_strategy(StrategyConfig(), local.federation, []), privacy, sampled, 3)
    wire = Wire(seed=7)
    [trained] = Server(strategy, grid, local.federation, wire, 5, privacy=privacy).rounds(start, 1)
    return flat(start), flat(trained.arrays), trained, strategy


def flat(record):
    return np.concatenate([array.ravel() for array in to_arrays(record).values()]).astype(np.float64)


@kinds
def test_without_noise_and_with_a_huge_norm_it_is_the_mean_that_counts_every_client_the_same(clipping, side):
    sizes = (15, 5, 10, 2)
    off = PrivacyConfig()
    alone = []  # the same training of one client after the other: what each of them would send
    examples, model = small_examples(), small_model()
    train = [np.arange(15 * client, 15 * client + size) for client, size in enumerate(sizes)]
    executor = InProcess()
    executor.set_up(model, examples, Parts(train, []), how(clients=4, clients_per_round=4))

    def execute(messages):
        replies = executor.execute(messages)
        alone.extend(flat(reply.content.array_records["arrays"]) for reply in replies)
        return replies

    federation = FederationConfig(clients=4, clients_per_round=4, lr=0.05)
    start = to_record(transferred(model), shared=False)
    strategy = make_strategy(StrategyConfig(), federation, [])
    [plain] = Server(strategy, LocalGrid(4, execute, shared=False), federation, Wire(), 5).rounds(start, 1)
    huge = PrivacyConfig(noise_multiplier=0, clipping_norm=1e6, clipping=clipping, side=side)
    _, found, trained, _ = one_round(huge, sizes=sizes)
    np.testing.assert_allclose(found, np.mean(alone, axis=0), atol=1e-6)
    assert np.abs(found - flat(plain.arrays)).max() > 1e-4  # by examples it is another
    assert math.isfinite(trained.train_loss)
    _, unweighted, *_ = one_round(off, sizes=(15, 15, 15, 15))
    _, same, *_ = one_round(huge, sizes=(15, 15, 15, 15))
    np.testing.assert_allclose(same, unweighted, atol=1e-6)


@kinds
@pytest.mark.parametrize("norm", [0.003, 0.02])
def test_a_clients_change_is_as_long_as_the_norm(clipping, side, norm):
    before, after, *_ = one_round(
        PrivacyConfig(noise_multiplier=0, clipping_norm=norm, clipping=clipping, side=side), sampled=1
    )
    assert np.linalg.norm(after - before) == pytest.approx(norm, rel=1e-3)


def given(message, arrays, examples=1):
    metrics = MetricRecord({"num-examples": examples, "loss": 0.5, "norm_bit": 0})
    return Message(RecordDict({"arrays": to_record(arrays, shared=False), "metrics": metrics}), reply_to=message)


def aggregate(privacy, seed=0, number=1, replies=4, change=0.0):
    """What the server makes of replies that change 200,000 numbers alike."""
    federation = FederationConfig(clients=10, clients_per_round=4)
    strategy = make_private(make_strategy(StrategyConfig(), federation, ["w"]), privacy, 4, seed)
    grid = LocalGrid(10, lambda messages: [given(m, {"w": w + change}) for m in messages], shared=False)
    w = np.zeros(200_000, np.float32)
    start = ArrayRecord({"w": to_record({"w": w}, shared=False)["w"]})
    messages = list(strategy.configure_train(number, start, ConfigRecord({"lr": 0.1}), grid))
    aggregated, _ = strategy.aggregate_train(number, grid.send_and_receive(messages[:replies]))
    assert aggregated is not None
    return aggregated["w"].numpy(), strategy


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize(("replies", "multiplier", "norm"), [(4, 1.5, 0.2), (2, 1.5, 0.2), (4, 0.7, 3.0)])
def test_the_noise_has_the_standard_deviation_that_flower_documents(side, replies, multiplier, norm):
    """noise_multiplier x clipping_norm / replies, on the mean: the sum's over the number it is divided by."""
    privacy = PrivacyConfig(noise_multiplier=multiplier, clipping_norm=norm, side=side)
    found, _ = aggregate(privacy, replies=replies, change=1e-6)
    assert found.std() == pytest.approx(multiplier * norm / replies, rel=0.01)
    assert abs(found.mean()) < 5 * found.std() / math.sqrt(found.size)


def test_the_noise_follows_from_seed_and_round_and_leaves_numpys_generator_alone():
    privacy = PrivacyConfig(noise_multiplier=1)
    np.random.seed(4)
    expected = np.random.random()
    np.random.seed(4)
    first, _ = aggregate(privacy, change=1e-6)
    assert np.random.random() == expected
    assert first.tobytes() == aggregate(privacy, change=1e-6)[0].tobytes()
    for other in ({"seed": 1}, {"number": 2}):
        assert first.tobytes() != aggregate(privacy, change=1e-6, **other)[0].tobytes()


@pytest.mark.parametrize(("change", "factor"), [(1.0, math.exp(0.2 * 0.5)), (1e-9, math.exp(-0.2 * 0.5))])
def test_an_adaptive_norm_grows_where_all_changes_are_longer_and_shrinks_where_none_is(change, factor):
    """C exp(-η(b - γ)) with b the share of changes within the norm, here 0 and 1; η = 0.2 and γ = 0.5."""
    _, strategy = aggregate(PrivacyConfig(noise_multiplier=0, clipping_norm=0.1, clipping="adaptive"), change=change)
    assert float(strategy_state(strategy)["clipping_norm"]) == pytest.approx(0.1 * factor)


def test_a_change_of_zero_length_is_named():
    with pytest.raises(LowrankError, match=r"a client's change in round 1 is zero, .*; raise federation\.lr"):
        aggregate(PrivacyConfig(noise_multiplier=1))


def test_a_norms_statistics_are_refused():
    strategy = make_strategy(StrategyConfig(), FederationConfig(), [])
    with pytest.raises(LowrankError, match=r"statistics of a norm \(bn\.running_mean\), .*; use a model without batch"):
        make_private(strategy, PrivacyConfig(noise_multiplier=1), 4, 0, {"bn.running_var", "bn.running_mean"})


def private(clients=100, sampled=10, **privacy):
    federation = FederationConfig(clients=clients, clients_per_round=sampled)
    return RunConfig(federation=federation, privacy=PrivacyConfig(**privacy))


def delta_of(epsilon, mu):
    """Of the Gaussian mechanism with mean shift `mu` (Balle and Wang, 2018, Theorem 8), which is exact."""
    below = torch.special.ndtr(torch.tensor(mu / 2 - epsilon / mu, dtype=torch.float64)).item()
    above = torch.special.log_ndtr(torch.tensor(-mu / 2 - epsilon / mu, dtype=torch.float64)).item()
    return below - math.exp(epsilon + above)


@pytest.mark.parametrize(("multiplier", "rounds"), [(1.0, 1), (4.0, 20), (20.0, 100)])
def test_where_all_clients_take_part_epsilon_is_that_of_one_gaussian(multiplier, rounds):
    """A client that is replaced moves the sum by two norms, so rounds together shift it by 2 √rounds / multiplier."""
    pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    found = epsilon(private(20, 20, noise_multiplier=multiplier), rounds)
    assert found is not None
    mu = 2 * math.sqrt(rounds) / multiplier
    assert delta_of(found, mu) <= 1e-5  # it holds
    assert delta_of(0.8 * found, mu) > 1e-5  # and is no idle bound
    # By hand: Rényi divergence α/(2σ²) of each round, to (ε, δ) as Canonne, Kamath and Steinke (2020) do, Prop. 12.
    by_hand = min(
        a * mu**2 / 2 + math.log1p(-1 / a) - (math.log(1e-5) + math.log(a)) / (a - 1)
        for a in np.linspace(1.01, 200, 9999)
    )
    assert found == pytest.approx(by_hand, rel=0.02)


@pytest.mark.slow
def test_where_some_are_sampled_epsilon_is_the_accountants():
    rdp = pytest.importorskip("dp_accounting.rdp", reason="the extra `privacy` is not installed")
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent

    accountant = rdp.RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    accountant.compose(SampledWithoutReplacementDpEvent(100, 10, GaussianDpEvent(0.75)), 7)
    found = epsilon(private(noise_multiplier=1.5), 7)
    assert found == pytest.approx(accountant.get_epsilon(1e-5))
    assert found < epsilon(private(noise_multiplier=1.5), 8)
    assert found < epsilon(private(10, 10, noise_multiplier=1.5), 7)
    assert found < epsilon(private(noise_multiplier=1.5, delta=1e-7), 7)


def test_without_noise_there_is_no_epsilon():
    assert epsilon(private(), 5) is None
    assert epsilon(private(noise_multiplier=0), 5) is None


def test_a_missing_accountant_is_named_before_anything_is_trained(tmp_path, monkeypatch, quick):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    watcher = Watcher()
    with pytest.raises(LowrankError, match=r"counted with dp-accounting, .*pip install 'lowrank\[fl,privacy\]'"):
        run(config("privacy.noise_multiplier=0.77"), tmp_path / "run", watcher)
    assert watcher.rows == []


REFUSED = {
    "strategy.name=scaffold": r"strategy\.name scaffold sends something else or keeps more; use fedavg or fedprox",
    "strategy.name=fedadam": r"strategy\.name fedadam",
    "strategy.name=krum": r"strategy\.name krum",
    "personalization.kind=fedper": r"personalization\.kind fedper gives them a part that they keep",
    "aggregation.gap=true": r"aggregation\.gap reads the clients' weights before",
    "aggregation.kind=refit": r"aggregation\.kind refit reads",
    "aggregation.kind=one-factor": r"aggregation\.kind one-factor reads",
    "update.kind=low-rank": r"update\.kind low-rank its factors begin anew",
    "adapter.method=adalora": r"clients send importances too, .*use lora, loha or lokr",
    "codec.up=topk": r"codec topk",
    "codec.down=topk": r"codec topk",
    "federation.tolerated_failures=0.5": r"federation\.tolerated_failures is 0\.5, .*set it to 0 with privacy",
    "failures.deadline=3": r"failures\.deadline leaves out clients",
    "privacy.delta=0.25": r"privacy\.delta is 0\.25, at which one of 4 clients",
    "privacy.clipping=adaptive": r"privacy\.noise_multiplier is 1, .*clients_per_round / 10 = 0\.2",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_would_make_epsilon_untrue_is_refused(override):
    held = ["partition.held_out=0.2"] if "personalization" in override else []
    held += ["model.method=original"] if override.startswith(("update", "adapter")) else []
    config(override, *held, "privacy.noise_multiplier=null")
    with pytest.raises(UsageError, match=REFUSED[override]):
        config(override, *held, "privacy.noise_multiplier=1")


def test_what_clients_clip_must_travel_as_it_is():
    config("privacy.noise_multiplier=1", "codec.up=int8", "codec.down=fp16")
    config("privacy.noise_multiplier=1", "privacy.side=client", "codec.down=fp16")
    with pytest.raises(UsageError, match=r"codec\.up int8 rounds what privacy\.side client has clipped"):
        config("privacy.noise_multiplier=1", "privacy.side=client", "codec.up=int8")


NOISY = ["privacy.noise_multiplier=0.1", "privacy.clipping_norm=0.5"]


@pytest.mark.slow
@kinds
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, quick, clipping, side):
    pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    told = [*NOISY, f"privacy.clipping={clipping}", f"privacy.side={side}"]
    run(config(*told), tmp_path / "whole", Watcher())
    with pytest.raises(SystemError):
        run(config(*told), tmp_path / "stopped", Killed(after=2))
    resume(tmp_path / "stopped", Watcher())
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["model.method=original", "adapter.method=loha"], ["codec.up=int8"]])
def test_who_clips_makes_no_difference_and_the_run_says_what_it_spent(tmp_path, quick, more):
    pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    told = [*NOISY, "rounds=2", *more]
    [summary] = run(config(*told), tmp_path / "server", Watcher())
    rows = [json.loads(line) for line in (tmp_path / "server" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epsilon"] for row in rows] == [epsilon(config(*told), 1), epsilon(config(*told), 2)]
    assert json.loads((tmp_path / "server" / "summary.json").read_text())["epsilon"] == rows[-1]["epsilon"]
    assert summary.epsilon == rows[-1]["epsilon"]
    if not more:
        run(config(*told, "privacy.side=client"), tmp_path / "client", Watcher())
        assert weights(tmp_path / "client") == weights(tmp_path / "server")


@pytest.mark.slow
@kinds
def test_the_plan_counts_what_a_private_run_sends(tmp_path, quick, clipping, side):
    told = [
        "rounds=2", "federation.clients_per_round=4", "privacy.noise_multiplier=0",
        f"privacy.clipping={clipping}", f"privacy.side={side}",
    ]  # fmt: skip
    [summary] = run(config(*told), tmp_path / "run", Watcher())
    [planned] = plan(config(*told)).runs
    assert planned.total_bytes == summary.total_bytes


@pytest.mark.slow
def test_the_report_has_a_column_where_a_run_is_private(tmp_path):
    pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    from lowrank_fl.reporting.groups import group_runs
    from lowrank_fl.reporting.read import find_runs
    from lowrank_fl.reporting.show import measured

    run(config(*NOISY, "rounds=1"), tmp_path / "noisy", Watcher())
    run(config("rounds=1"), tmp_path / "plain", Watcher())
    groups = group_runs(find_runs([tmp_path]).runs)
    shown = measured(groups, (10.0,))
    assert {row["run"]: row["ε"] == "-" for row in shown} == {
        "fedpara, noise_multiplier 0.1": False,
        "fedpara": True,
    }
    assert [group.as_tree(())["epsilon"] is None for group in groups] == [row["ε"] == "-" for row in shown]
    assert "<th>&epsilon;</th>" in (tmp_path / "noisy" / "report.html").read_text()
    assert "&epsilon;" not in (tmp_path / "plain" / "report.html").read_text()
    assert "ε" not in measured([group for group in groups if group.epsilon() is None], (10.0,))[0]
