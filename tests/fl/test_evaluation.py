"""Runs whose clients test: what is reported, what travels, who is left out, and that stopping changes nothing."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_personal import KINDS
from test_run import Watcher, rows_of

from lowrank_core import LowrankError, UsageError
from lowrank_fl.clients import examples_of, model_of, parts_of, training_of
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.load import load_config
from lowrank_fl.plan import plan
from lowrank_fl.run import resume, run
from lowrank_fl.state import local_names, personalization_of, state_of
from lowrank_fl.training import Trainer

SMALL = [
    "rounds=3",
    "federation.clients=5",
    "federation.clients_per_round=2",
    "federation.epochs=1",
    "model.width=4",
    "data.max_examples=120",
    "partition.kind=iid",
    "partition.held_out=0.2",
    "engine.workers=1",
]


pytestmark = pytest.mark.usefixtures("quick")


def config(kind: str, *more: str):
    method = "pfedpara" if kind == "pfedpara" else "fedpara"
    return load_config("quickstart", [*SMALL, f"model.method={method}", f"personalization.kind={kind}", *more])


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_shared_is_in_any_message_either_way(kind, tmp_path, monkeypatch):
    found: dict[str, set[tuple[str, ...]]] = {}
    send = LocalGrid.send_and_receive

    def watched(self, messages, **options):
        messages = list(messages)
        replies = send(self, messages, **options)
        for message in [*messages, *replies]:
            way = message.metadata.message_type + (" reply" if message in replies else "")
            records = message.content.array_records.values()
            found.setdefault(way, set()).update(tuple(record) for record in records)
        return replies

    monkeypatch.setattr(LocalGrid, "send_and_receive", watched)
    settings = config(kind, "rounds=1")
    run(settings, tmp_path / "run", Watcher())
    model, _ = model_of(settings, examples_of(settings))
    local = local_names(model, personalization_of(settings))
    shared = tuple(name for name in state_of(model) if name not in local)
    assert found == {"train": {shared}, "train reply": {shared}, "evaluate": {shared}, "evaluate reply": set()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_reports(kind, tmp_path):
    settings = config(kind)
    (summary,) = run(settings, tmp_path / "run", Watcher())
    rows = rows_of(tmp_path / "run")
    for row in rows:
        accuracies = row["client_accuracies"]
        assert len(accuracies) == 5
        assert row["accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["worst_accuracy"] == min(accuracies)
        assert row["total_bytes"] == row["uplink_bytes"] + row["downlink_bytes"]
        assert row["evaluation_bytes"] > 0
    assert (summary.accuracy, summary.worst_accuracy) == (rows[-1]["accuracy"], rows[-1]["worst_accuracy"])
    assert summary.client_accuracies == rows[-1]["client_accuracies"]
    assert summary.evaluation_bytes == sum(row["evaluation_bytes"] for row in rows)
    (planned,) = plan(settings).runs
    assert planned.transferred_params == summary.transferred_params
    # Numbers of examples and of clients take a byte more or less.
    for name in ("uplink_bytes", "downlink_bytes", "evaluation_bytes"):
        assert getattr(planned, name) == pytest.approx(getattr(summary, name), rel=0.01, abs=300)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "pfedpara", "fedper", "local"])
def test_the_model_file_is_whole_and_is_what_a_client_that_never_trained_tests(kind, tmp_path):
    settings = config(kind, "rounds=1")
    (summary,) = run(settings, tmp_path / "run", Watcher())
    examples = examples_of(settings)
    model, _ = model_of(settings, examples)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved.keys() == state_of(model).keys()
    trainer = Trainer(model, examples, parts_of(settings, examples), training_of(settings, tmp_path))
    trainer.load(saved)
    (row,) = rows_of(tmp_path / "run")
    absent = [client for client in range(5) if client not in row["clients"]]
    assert [summary.client_accuracies[client] for client in absent] == [trainer.test(c).accuracy for c in absent]


@pytest.mark.slow
def test_clients_test_on_their_own_examples_alone(tmp_path):
    """Of the plain model the mean over clients is that of the held-out examples, each client counting the same."""
    settings = config("none", "partition.kind=dirichlet", "federation.clients=4", "rounds=1")
    (summary,) = run(settings, tmp_path / "run", Watcher())
    examples = examples_of(settings)
    model, _ = model_of(settings, examples)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    model.eval()
    accuracies, losses = [], []
    for rows in parts_of(settings, examples).held_out:
        logits = model(examples.normalize(examples.inputs[torch.from_numpy(rows)]))
        labels = examples.labels[torch.from_numpy(rows)]
        accuracies.append((logits.argmax(1) == labels).float().mean().item())
        losses.append(torch.nn.functional.cross_entropy(logits, labels).item())
    assert summary.client_accuracies == pytest.approx(accuracies)
    assert summary.loss == pytest.approx(np.mean(losses), rel=1e-5)


def results(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(folder)]


def kept(folder):
    """Every client's newest tensors, and the model, as bytes."""
    files = [*(folder / "clients").rglob("round-*.safetensors"), folder / "model.safetensors"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


MOMENTS = ["before the first checkpoint", "between training and checkpoint", "after a round"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "moment"), [*((kind, MOMENTS[1]) for kind in KINDS), ("pfedpara", MOMENTS[0]), ("pfedpara", MOMENTS[2])]
)
def test_a_run_stopped_at_any_moment_ends_with_the_same_bits(kind, moment, tmp_path, monkeypatch):
    import lowrank_fl.one_run

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(config(kind, "strategy.name=scaffold"), whole, Watcher())
    save = lowrank_fl.one_run.save_checkpoint

    def stop(folder, settings, checkpoint):
        if moment == "after a round":
            save(folder, settings, checkpoint)
        if checkpoint.round == (1 if moment == "before the first checkpoint" else 2):
            raise SystemError("as if killed")
        if moment != "after a round":
            save(folder, settings, checkpoint)

    monkeypatch.setattr(lowrank_fl.one_run, "save_checkpoint", stop)
    with pytest.raises(SystemError):
        run(config(kind, "strategy.name=scaffold"), stopped, Watcher())
    monkeypatch.setattr(lowrank_fl.one_run, "save_checkpoint", save)
    (summary,) = resume(stopped, Watcher())
    assert results(stopped) == results(whole)
    assert kept(stopped) == kept(whole)
    assert summary.client_accuracies == json.loads((whole / "summary.json").read_text())["client_accuracies"]


def break_test_of(monkeypatch, *broken: int):
    test = Trainer.test

    def failing(self, client):
        if client in broken:
            raise LowrankError("the disk is gone")
        return test(self, client)

    monkeypatch.setattr(Trainer, "test", failing)


def test_a_client_that_cannot_test_ends_the_run(tmp_path, monkeypatch):
    break_test_of(monkeypatch, 1, 3)
    with pytest.raises(LowrankError) as caught:
        run(config("fedper"), tmp_path / "run", Watcher())
    assert str(caught.value) == (
        "client 1 (and 1 more) cannot test the model of round 1: the disk is gone; "
        "raise federation.tolerated_failures to go on without such clients"
    )


@pytest.mark.slow
def test_a_client_that_cannot_test_is_left_out_where_that_is_tolerated(tmp_path, monkeypatch):
    break_test_of(monkeypatch, 1)
    (summary,) = run(config("fedper", "federation.tolerated_failures=0.2"), tmp_path / "run", Watcher())
    assert summary.client_accuracies[1] is None
    others = [accuracy for accuracy in summary.client_accuracies if accuracy is not None]
    assert len(others) == 4
    assert summary.accuracy == pytest.approx(np.mean(others))
    assert all(row["dropped"] == {"1": "testing: the disk is gone"} for row in rows_of(tmp_path / "run"))


def test_an_accuracy_that_is_none_is_not_believed(tmp_path, monkeypatch):
    import dataclasses

    test = Trainer.test
    monkeypatch.setattr(Trainer, "test", lambda self, client: dataclasses.replace(test(self, client), accuracy=7.0))
    with pytest.raises(
        LowrankError, match=r"client 0 \(and 4 more\) cannot test .* it reports the accuracy 7.0; raise"
    ):
        run(config("none"), tmp_path / "run", Watcher())


def test_pfedpara_means_its_own_personalisation_where_clients_test():
    assert load_config("mnist", ["model.method=pfedpara", "partition.held_out=0.2"]).personalized == "pfedpara"
    assert load_config("mnist", ["model.method=pfedpara"]).personalized == "none"
    assert load_config("mnist", ["model.method=fedpara", "partition.held_out=0.2"]).personalized == "none"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["personalization.kind=pfedpara", "partition.held_out=0.2"],
            "personalization.kind pfedpara keeps the factors of W2 with each client, and model.method fedpara has "
            "none; set model.method=pfedpara",
        ),
        (
            ["personalization.kind=ditto"],
            "personalization.kind ditto gives each client a model of its own, which only its own examples can test; "
            "set partition.held_out above 0",
        ),
        (
            ["personalization.test_epochs=1"],
            "personalization.test_epochs is 1, and the server, which tests here, does not train; set "
            "partition.held_out above 0, or personalization.test_epochs=0",
        ),
        (
            ["personalization.kind=local", "partition.held_out=0.2", "strategy.name=krum"],
            "strategy.name krum chooses among the models that clients send, and under personalization.kind local they "
            "send none; use strategy.name=fedavg",
        ),
    ],
)
def test_kinds_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UsageError) as caught:
        load_config("mnist", overrides)
    assert str(caught.value) == message


@pytest.mark.slow
def test_finetune_is_the_shared_model_trained_before_its_test(tmp_path):
    run(config("finetune", "personalization.epochs=2"), tmp_path / "finetune", Watcher())
    run(config("none", "personalization.test_epochs=2"), tmp_path / "none", Watcher())
    found = [[row["client_accuracies"] for row in rows_of(tmp_path / kind)] for kind in ("finetune", "none")]
    assert found[0] == found[1]


@pytest.mark.slow
def test_where_nothing_is_shared_the_strategy_makes_no_difference(tmp_path):
    others = ["fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad", "scaffold", "feddyn", "fedmedian"]
    accuracies = {}
    for strategy in ["fedavg", *others, "fedtrimmedavg"]:
        run(config("local", f"strategy.name={strategy}"), tmp_path / strategy, Watcher())
        accuracies[strategy] = [row["client_accuracies"] for row in rows_of(tmp_path / strategy)]
    assert all(found == accuracies["fedavg"] for found in accuracies.values())


@pytest.mark.parametrize(
    ("kind", "test_epochs", "least", "most"),
    [
        ("fedrep", "0", 1.2, 2.0),
        ("fedrep", "1", 3.7, 4.5),
        ("ditto", "null", 2.0, 2.0),
        ("finetune", "null", 3.5, 3.5),
        ("none", "1", 3.5, 3.5),
        ("finetune", "2", 6.0, 6.0),
    ],
)
def test_a_plan_counts_what_is_trained_beside_the_shared_model(kind, test_epochs, least, most):
    """Of 5 clients 2 train an epoch; before a test all 5 train, and FedRep's first epoch is of the head."""
    own = config(kind, f"personalization.test_epochs={test_epochs}")
    (plain,), (personal,) = (plan(each).runs for each in (config("none"), own))
    assert least * 0.999 <= personal.flops_per_round / plain.flops_per_round <= most * 1.001


@pytest.mark.slow
def test_fedper_converges_on_two_classes_a_client_and_beats_fedavg(tmp_path):
    more = ["data.max_examples=null", "partition.kind=pathological", "rounds=10", "federation.clients=10"]
    more += ["federation.clients_per_round=5", "model.width=8", "federation.epochs=2", "model.method=original"]
    accuracy = {}
    for kind in ("none", "fedper"):
        (summary,) = run(config(kind, *more), tmp_path / kind, Watcher())
        accuracy[kind] = summary.accuracy
    assert accuracy["fedper"] > 0.9
    assert accuracy["fedper"] > accuracy["none"] + 0.1


@pytest.mark.slow
def test_a_damaged_part_of_a_client_is_said(tmp_path):
    run(config("fedper", "federation.clients_per_round=5"), tmp_path / "run", Watcher())
    file = tmp_path / "run" / "clients" / "personal" / "2" / "round-3.safetensors"
    file.write_bytes(b"short")
    os.remove(tmp_path / "run" / "summary.json")
    settings = config("fedper", "federation.clients_per_round=5", "rounds=4")
    (tmp_path / "run" / "config.yaml").write_text(settings.model_dump_json())
    with pytest.raises(LowrankError, match=r"the state of client 2 in .*round-3.safetensors cannot be read"):
        resume(tmp_path / "run", Watcher())
