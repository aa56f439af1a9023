"""Clients trained together against the same clients trained one after the other."""

import json

import numpy as np
import pytest
import torch
from cases import how, small_examples
from flwr.app import Message
from test_run import Watcher
from torch import nn

from lowrank_core import LowrankError, UsageError, factorize
from lowrank_fl.config import AdapterConfig
from lowrank_fl.data.examples import Parts
from lowrank_fl.drift import Drift
from lowrank_fl.execution.batched import BatchedTrainer, schedule
from lowrank_fl.execution.groups import grouped
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.workers import InProcess
from lowrank_fl.load import load_config
from lowrank_fl.models.adapted import put_adapter
from lowrank_fl.models.mlp import MLP
from lowrank_fl.run import resume, run
from lowrank_fl.training import Trainer

METHODS = ["original", "lowrank", "fedpara", "pfedpara", "kronecker", "svd", "lora", "loha", "lokr"]

# Whole batches, a short last batch, less than one batch, and a client that takes many more steps than the others.
UNEQUAL = Parts([np.arange(0, 8), np.arange(8, 17), np.arange(17, 20), np.arange(20, 43), np.arange(43, 47)], [])


def mlp(method: str, *, tanh: bool = False) -> nn.Module:
    torch.manual_seed(3)
    model = MLP(64, 3, width=12)
    if method in ("lora", "loha", "lokr"):
        put_adapter(model, "mlp", AdapterConfig(method=method, rank=2), seed=1)
        # As drawn, an adapter's factors begin at zero and hide a mistake in the others' gradients.
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                nn.init.normal_(parameter, std=0.2)
    elif method != "original":
        factorize(model, method, rank=2, tanh=tanh)
    return model


class Doubles:
    """Examples in float64; everything else is the data set's."""

    def __init__(self, examples) -> None:
        self.__dict__.update(examples.__dict__)
        self.is_text = False
        self._normalize = examples.normalize

    def normalize(self, inputs):
        return self._normalize(inputs).double()


def outcomes(kind, model, dtype, local, *, drift=None, only=None, clients=range(5)):
    examples = small_examples()
    trainer = kind(model, examples, UNEQUAL, local)
    if dtype is torch.float64:
        trainer.examples = Doubles(examples)
    start = {name: tensor.clone() for name, tensor in trainer.state.items()}
    trainer.expect(list(clients))
    found = []
    for client in clients:
        trainer.load(start)
        trained = trainer.train(client, 3, 0.02, drift, only=only)
        found.append((trained, {name: tensor.clone() for name, tensor in trainer.state.items()}))
    return found


def assert_alike(batched, sequential, rtol, atol):
    for (got, tensors), (expected, right) in zip(batched, sequential, strict=True):
        assert (got.examples, got.steps) == (expected.examples, expected.steps)
        assert got.loss == pytest.approx(expected.loss, rel=max(rtol, 1e-6))  # summed in float32
        for name, tensor in right.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def stacked_alone(monkeypatch):
    """A client that is not trained in its group fails the test."""

    def alone(*_: object, **__: object):
        raise AssertionError("a client was trained alone")

    # A batched trainer's own `train` calls this one; a plain trainer's is what it is held against.
    train = Trainer._train
    chosen = lambda self, *args: (alone if isinstance(self, BatchedTrainer) else train)(self, *args)  # noqa: E731
    monkeypatch.setattr(Trainer, "_train", chosen)


@pytest.mark.usefixtures("stacked_alone")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float64, 1e-9, 1e-12), (torch.float32, 1e-4, 1e-5)], ids=["double", "float"]
)
def test_every_client_of_a_group_ends_where_it_ends_alone(method, dtype, rtol, atol):
    local = how(epochs=3, momentum=0.5, weight_decay=0.01)
    found = [outcomes(kind, mlp(method).to(dtype), dtype, local) for kind in (BatchedTrainer, Trainer)]
    assert_alike(*found, rtol, atol)
    ends = [tensors for _, tensors in found[0]]
    assert all(any(not torch.equal(ends[0][n], other[n]) for n in other) for other in ends[1:])


@pytest.mark.slow
@pytest.mark.usefixtures("stacked_alone")
def test_the_proximal_term_and_the_turn_of_one_factor_are_those_of_a_client_alone():
    local = how(epochs=2)
    turn = {"fc1.weight.x2", "fc1.bias", "fc2.weight", "fc2.bias"}  # fc2 is too small for factors
    for asked in ({"drift": Drift(proximal=0.7)}, {"only": turn}, {"drift": Drift(proximal=0.7), "only": turn}):
        model = mlp("fedpara", tanh=True).double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = [
            outcomes(kind, mlp("fedpara", tanh=True).double(), torch.float64, local, **asked)
            for kind in (BatchedTrainer, Trainer)
        ]
        assert_alike(*found, 1e-9, 1e-12)
        moved = {name for name, tensor in before.items() if not torch.equal(found[0][0][1][name], tensor)}
        assert moved == (turn if "only" in asked else set(before))


def test_a_client_that_starts_elsewhere_or_is_corrected_by_its_own_numbers_is_trained_alone():
    examples, local = small_examples(), how()
    trainers = [kind(mlp("fedpara"), examples, UNEQUAL, local) for kind in (BatchedTrainer, Trainer)]
    start = {name: tensor.clone() for name, tensor in trainers[1].state.items()}
    other = {name: tensor + 0.1 for name, tensor in start.items()}
    offset = Drift({name: torch.full_like(p, 0.01) for name, p in trainers[1].trainable().items()})
    for client, begin, drift in ((0, start, None), (1, other, None), (2, start, offset), (3, start, None)):
        ends = []
        for trainer in trainers:
            if client == 0:
                trainer.expect([0, 1, 2])
            trainer.load(begin)
            trainer.train(client, 1, 0.05, drift)
            ends.append({name: tensor.clone() for name, tensor in trainer.state.items()})
        same = all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
        assert same == (client != 0), client  # trained alone it has the bits, in the group almost


def test_one_client_that_diverges_takes_no_other_with_it():
    examples = small_examples()
    examples.labels[:8] = 2  # client 0 alone disagrees with the data
    model = mlp("original")
    with torch.no_grad():
        model.fc2.bias.copy_(torch.tensor([float("nan"), 0.0, 0.0]))
    trainer = BatchedTrainer(model, examples, Parts([np.arange(3), np.arange(3, 6)], []), how())
    trainer.expect([0, 1])
    with pytest.raises(LowrankError, match="training diverged: client 0 has loss nan in round 4"):
        trainer.train(0, 4, 0.05)


@pytest.mark.parametrize("count", [1, 4, 9, 12])
@pytest.mark.parametrize(("epochs", "width"), [(1, 4), (3, 4)])
def test_a_schedule_holds_the_batches_of_a_client_alone(count, epochs, width):
    torch.manual_seed(count)
    orders = [torch.randperm(count) for _ in range(epochs)]
    torch.manual_seed(count)
    found = schedule(count, epochs, 4, min(width, count))
    batches = [batch for order in orders for batch in order.split(4)]
    assert [rows[taken].tolist() for rows, taken in zip(found.rows, found.taken, strict=True)] == [
        batch.tolist() for batch in batches
    ]
    assert found.sizes.tolist() == [len(batch) for batch in batches]
    before = len(batches) * (epochs - 1) // epochs
    assert found.reported.tolist() == [False] * before + [True] * (len(batches) - before)


def test_groups_are_of_nearly_one_size_and_hold_everyone_in_order():
    assert [list(group) for group in grouped(range(10), 8)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [len(group) for group in grouped(range(17), 8)] == [5, 6, 6]
    assert list(grouped([], 8)) == []
    assert [list(group) for group in grouped("ab", 1)] == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)), "0 is a Conv2d"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)), "2 is a BatchNorm1d"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.2)), "2 is a Dropout"),
        (nn.LSTM(3, 3), "the model is a LSTM"),
    ],
)
def test_a_layer_that_cannot_be_stacked_is_named(model, name):
    examples = small_examples()
    with pytest.raises(LowrankError, match=f"trains models of linear layers, and {name}; use model.name=mlp"):
        BatchedTrainer(model, examples, UNEQUAL, how())


SMALL = [
    "model.name=mlp",
    "model.width=16",
    "data.max_examples=150",
    "federation.clients=7",
    "federation.clients_per_round=5",
    "federation.epochs=2",
    "partition.kind=dirichlet",
    "rounds=3",
    "engine.workers=1",
]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["model.method=fedpara", "federation.momentum=0.9", "federation.lr=0.02"],
        ["model.method=original", "strategy.name=fedprox", "codec.up=fp16", "codec.down=topk"],
        ["model.method=original", "adapter.method=lora", "partition.held_out=0.3", "personalization.kind=finetune"],
        ["model.method=lowrank", "aggregation.kind=one-factor", "strategy.name=fedavg"],
    ],
    ids=["fedpara", "fedprox-codecs", "lora-finetune", "one-factor"],
)
def test_a_run_ends_where_the_sequential_run_ends(tmp_path, settings):
    from safetensors.torch import load_file

    for way in ("sequential", "batched"):
        config = load_config("quickstart", [*SMALL, *settings], engine=way)
        (summary,) = run(config, tmp_path / way, Watcher())
        assert summary.execution == way
        assert json.loads((tmp_path / way / "summary.json").read_text())["execution"] == way
        assert f"execution: {way}" in (tmp_path / way / "config.yaml").read_text()
    found, expected = (load_file(tmp_path / way / "model.safetensors") for way in ("batched", "sequential"))
    for name, tensor in expected.items():
        # fp16 and topk turn a difference in the last digit into one of a rounding step or of an entry.
        coarse = "codec.down=topk" in settings
        torch.testing.assert_close(found[name], tensor, rtol=1e-2 if coarse else 1e-3, atol=1e-2 if coarse else 1e-4)
    for got, right in zip(rows_of(tmp_path / "batched"), rows_of(tmp_path / "sequential"), strict=True):
        assert got["train_loss"] == pytest.approx(right["train_loss"], rel=1e-3)
        assert got["total_bytes"] == right["total_bytes"]
        assert got["clients"] == right["clients"]


@pytest.mark.slow
def test_batched_runs_have_the_same_bits_again_with_any_number_of_workers_and_after_a_resume(tmp_path):
    more = ["model.method=fedpara", "federation.clients=12", "federation.clients_per_round=12", "federation.epochs=1"]

    def config(*overrides):
        return load_config("quickstart", [*SMALL, *more, *overrides], engine="batched")

    run(config(), tmp_path / "alone", Watcher())
    run(config("engine.workers=2"), tmp_path / "workers", Watcher())
    run(config("rounds=2"), tmp_path / "resumed", Watcher())
    resume(tmp_path / "resumed", Watcher(), ["rounds=3"])
    expected = (tmp_path / "alone" / "model.safetensors").read_bytes()
    for other in ("workers", "resumed"):
        assert (tmp_path / other / "model.safetensors").read_bytes() == expected, other
    with pytest.raises(UsageError, match=r"engine\.execution would make it another run"):
        resume(tmp_path / "resumed", Watcher(), ["engine.execution=sequential"])


def test_executors_hand_over_whole_groups(monkeypatch):
    """Both executors: the clients of a message are told to the trainer before the first of them is trained."""
    told = []
    monkeypatch.setattr(BatchedTrainer, "expect", lambda self, clients: told.append(list(clients)))
    monkeypatch.setattr(BatchedTrainer, "train", Trainer.train)
    monkeypatch.setattr("lowrank_fl.flower.resident.Resident.run", lambda self, message, slot: message)
    from dataclasses import replace

    from flwr.app import RecordDict

    executor = InProcess()
    executor.set_up(mlp("original"), small_examples(), UNEQUAL, replace(how(), execution="batched"))
    LocalGrid(10, executor.execute, shared=False)
    told.clear()
    executor.execute([Message(RecordDict(), node, "train") for node in range(1, 11)])
    executor.execute([Message(RecordDict(), node, "evaluate") for node in range(1, 3)])
    assert told == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], []]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=cnn"], "model.name cnn has layers that are not linear"),
        (["strategy.name=scaffold"], "strategy.name scaffold corrects each client's steps by numbers of its own"),
        (["strategy.name=feddyn"], "strategy.name feddyn corrects"),
        (["personalization.kind=fedper", "partition.held_out=0.2"], "personalization.kind fedper has each client"),
        (["model.method=fedpara", "model.jacobian_lambda=1"], "model.jacobian_lambda is 1, a correction of one model"),
        (["model.method=original", "update.kind=low-rank"], "update.kind low-rank has each client hold weights"),
        (["engine.kind=ray"], "execution batched belongs to engine.kind local, not ray"),
    ],
)
def test_what_cannot_be_batched_is_refused_before_anything_starts(overrides, said):
    with pytest.raises(UsageError, match=said):
        load_config("quickstart", ["model.name=mlp", "sweep={}", *overrides], engine="batched")
