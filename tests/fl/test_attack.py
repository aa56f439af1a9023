"""Poisoned clients: who they are, what they train on and send, and that robust rules leave them out."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import equal_parts, one_more_trial, small_examples
from test_engine_parity import SMALL, results
from test_resume import config, weights
from test_run import Watcher

from lowrank_fl.attack import poisoned_clients, poisoned_update, with_poisoned_labels
from lowrank_fl.clients import examples_of, parts_of
from lowrank_fl.config import AttackConfig
from lowrank_fl.data.examples import Parts
from lowrank_fl.load import expand, load_config
from lowrank_fl.run import run

RECEIVED = {"w": np.array([1.0, 2.0], np.float32), "variance": np.array([4.0], np.float32)}
TRAINED = {"w": torch.tensor([1.5, 1.0]), "variance": torch.tensor([5.0])}


def test_the_poisoned_clients_follow_from_the_seed_and_are_the_same_for_every_kind():
    drawn = [poisoned_clients(AttackConfig(kind=kind, share=0.25), 20, 3) for kind in ("labels", "sign", "noise")]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0]) == 5
    assert drawn[0] != poisoned_clients(AttackConfig(kind="sign", share=0.25), 20, 4)
    assert drawn[0] < poisoned_clients(AttackConfig(kind="sign", share=0.5), 20, 3)
    assert poisoned_clients(AttackConfig(share=0.5), 20, 3) == frozenset()


def test_a_flipped_update_by_hand():
    sent = poisoned_update(AttackConfig(kind="sign", scale=2), RECEIVED, TRAINED, ["w"], 0)
    assert sent["w"].tolist() == [1.0 - 2 * 0.5, 2.0 + 2 * 1.0]
    assert sent["variance"].tolist() == [5.0]
    assert TRAINED["w"].tolist() == [1.5, 1.0]  # what the client goes on from is left alone


def test_noise_is_as_long_as_the_change_it_takes_the_place_of():
    received = {"w": np.full(100_000, 3.0, np.float32)}
    trained = {"w": torch.full((100_000,), 3.5)}
    attack = AttackConfig(kind="noise", scale=2)
    sent = poisoned_update(attack, received, trained, ["w"], 0)["w"] - 3
    assert sent.square().mean().sqrt().item() == pytest.approx(2 * 0.5, rel=0.01)
    assert abs(sent.mean().item()) < 0.02
    assert torch.equal(sent + 3, poisoned_update(attack, received, trained, ["w"], 0)["w"])
    assert not torch.equal(sent + 3, poisoned_update(attack, received, trained, ["w"], 1)["w"])


def test_poisoned_labels_are_those_of_the_poisoned_clients_training_examples_alone():
    examples, attack = small_examples(), AttackConfig(kind="labels", share=0.5)
    whole = equal_parts(examples, 4).train
    parts = Parts([rows[3:] for rows in whole], [rows[:3] for rows in whole])
    poisoned = poisoned_clients(attack, 4, 1)
    seen = with_poisoned_labels(attack, examples, parts, 1)
    for client, rows in enumerate(parts.train):
        expected = 2 - examples.labels[rows] if client in poisoned else examples.labels[rows]
        assert torch.equal(seen.labels[rows], expected)
        assert torch.equal(seen.labels[parts.held_out[client]], examples.labels[parts.held_out[client]])
    assert torch.equal(seen.test_labels, examples.test_labels)
    assert with_poisoned_labels(AttackConfig(kind="sign", share=0.5), examples, parts, 1) is examples


ROBUST = [
    "rounds=6", "data.max_examples=600", "federation.clients=10", "federation.clients_per_round=10",
    "partition.kind=iid", "model.name=mlp", "model.width=32", "model.gamma=0.5", "federation.epochs=2",
    "attack.share=0.2", "attack.scale=4", "strategy.malicious=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["original", "fedpara"])
def test_sign_flips_stop_the_mean_and_not_robust_rules(tmp_path, quick, method):
    found = {}
    for kind, strategy in [("none", "fedavg"), ("sign", "fedavg"), ("sign", "fedmedian"), ("sign", "krum")]:
        told = [*ROBUST, f"model.method={method}", f"attack.kind={kind}", f"strategy.name={strategy}"]
        [summary] = run(config(*told), tmp_path / f"{kind}-{strategy}", Watcher())
        found[kind, strategy] = summary.accuracy
    assert found["none", "fedavg"] > found["sign", "fedavg"] + 0.2
    assert found["sign", "fedmedian"] > found["sign", "fedavg"] + 0.1
    assert found["sign", "krum"] > found["sign", "fedavg"] + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["codec.up=int8"],
        ["strategy.name=scaffold"],
        ["privacy.noise_multiplier=0"],
        ["update.kind=low-rank", "model.method=original", "failures.dropout=0.3"],
        ["engine.execution=batched", "model.name=mlp", "privacy.noise_multiplier=0", "privacy.side=client"],
    ],
)
@pytest.mark.parametrize("kind", ["labels", "sign", "noise"])
def test_an_attack_goes_with_everything_else_and_changes_the_model(tmp_path, quick, kind, more):
    told = ["rounds=2", "attack.share=0.5", "federation.clients_per_round=4", *more]
    run(config(*told), tmp_path / "plain", Watcher())
    for name in ("one", "two"):
        run(config(*told, f"attack.kind={kind}"), tmp_path / name, Watcher())
    assert weights(tmp_path / "one") == weights(tmp_path / "two") != weights(tmp_path / "plain")


def test_the_preset_holds_rules_against_each_other_with_and_without_poison():
    runs = [single for single, _ in expand(load_config("mnist-poisoned"))]
    rules = {(single.attack.kind, single.strategy.name) for single in runs}
    assert rules == {(a, s) for a in ("none", "sign") for s in ("fedavg", "fedmedian", "fedtrimmedavg", "krum")}
    for single in runs:
        poisoned = round(single.attack.share * single.federation.clients)
        assert single.strategy.malicious == poisoned
        assert single.strategy.trim * single.federation.clients_per_round >= poisoned


EVERYTHING = [
    *SMALL, "rounds=3", "federation.clients=6", "federation.clients_per_round=5", "attack.kind=labels",
    "attack.share=0.34", "failures.dropout=0.3", "failures.stragglers=0.3", "privacy.noise_multiplier=0.3",
    "privacy.clipping=adaptive", "privacy.side=client",
]  # fmt: skip


@pytest.mark.slow
def test_workers_give_the_same_bits_with_noise_failures_and_poison(tmp_path, quick):
    pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    for workers in (1, 2):
        told = [*EVERYTHING, f"engine.workers={workers}"]
        run(load_config("quickstart", told), tmp_path / str(workers), Watcher())
    assert weights(tmp_path / "1") == weights(tmp_path / "2")
    assert results(tmp_path / "1") == results(tmp_path / "2")
    assert any(row["dropped"] for row in results(tmp_path / "1"))


@pytest.mark.slow
@one_more_trial
@pytest.mark.parametrize("engine", ["ray", "superlink"])
def test_engines_give_the_same_bits_with_noise_failures_and_poison(tmp_path, engine):
    pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    pytest.importorskip("ray")
    run(load_config("quickstart", [*EVERYTHING, "engine.workers=1"]), tmp_path / "local", Watcher())
    own = ["engine.workers=2"] if engine == "ray" else ["engine.local_nodes=2"]
    command = [sys.executable, "-c", "from lowrank_cli.main import main; main()", "fl", "run", "quickstart", "--quiet"]
    command += [part for pair in [*EVERYTHING, *own, f"engine.kind={engine}"] for part in ("-o", pair)]
    subprocess.run([*command, "--out", str(tmp_path / engine)], check=True, capture_output=True)
    assert weights(tmp_path / engine) == weights(tmp_path / "local")
    for found, expected in zip(results(tmp_path / engine), results(tmp_path / "local"), strict=True):
        alike = [key for key in expected if not key.endswith("_bytes")]  # ids of a SuperLink are longer than ours
        assert {key: found[key] for key in alike} == {key: expected[key] for key in alike}
    assert json.loads((tmp_path / engine / "summary.json").read_text())["epsilon"] is not None


def test_poison_leaves_partition_and_test_set_alone():
    told = load_config("quickstart", [*SMALL, "attack.kind=labels"])
    examples = examples_of(told)
    parts = parts_of(told, examples)
    for one, other in zip(parts.train, parts_of(load_config("quickstart", SMALL), examples).train, strict=True):
        assert np.array_equal(one, other)
