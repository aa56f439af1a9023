"""Personalised methods: what travels, what stays with clients, and one reference for all in plain torch."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import small_examples
from torch import nn

from lowrank_core import LowrankError, factorize
from lowrank_fl.config import FederationConfig, ModelConfig, StrategyConfig
from lowrank_fl.data.examples import Parts
from lowrank_fl.flower.evaluation import evaluate_by_clients
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.records import map_slots, to_arrays, to_record
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import InProcess, Workers
from lowrank_fl.models.build import EXCEPTIONS, HEADS, build_model
from lowrank_fl.personal import Personal
from lowrank_fl.seeds import derive_seed
from lowrank_fl.state import Personalization, local_names, state_of, trained_names, transferred
from lowrank_fl.training import LocalTraining, Trainer

KINDS = ["none", "pfedpara", "fedper", "fedrep", "ditto", "local", "finetune"]
SEED, LR, MU, OWN_EPOCHS = 7, 0.05, 0.5, 2
FACTORS = ["x1", "y1", "x2", "y2"]


def personalization(kind: str, test_epochs: int = 0) -> Personalization:
    return Personalization(kind, "3", OWN_EPOCHS, MU, OWN_EPOCHS if kind == "finetune" else test_epochs)


def model_of(kind: str) -> nn.Module:
    """64-8-3, as `W1 * (W2 + 1)` where the kind asks for it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    if kind == "pfedpara":
        factorize(model, "pfedpara", rank=1)
    return model


LOCAL = {
    "pfedpara": {f"{layer}.weight.{factor}" for layer in (1, 3) for factor in ("x2", "y2")},
    "fedper": {"3.weight", "3.bias"},
    "fedrep": {"3.weight", "3.bias"},
    "local": {"1.weight", "1.bias", "3.weight", "3.bias"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_with_clients(kind):
    model = model_of(kind)
    assert local_names(model, personalization(kind)) == LOCAL.get(kind, set())
    shared = [name for name in state_of(model) if name not in LOCAL.get(kind, set())]
    assert list(transferred(model, personalization(kind))) == shared
    assert trained_names(model, personalization(kind)) == shared


def paper_model(method: str) -> nn.Module:
    return build_model(ModelConfig(name="mlp", method=method, width=256, gamma=0.5), (1, 28, 28), 62, seed=0)[0]


@pytest.mark.parametrize(
    ("method", "kind", "travels"),
    [("original", "none", 216_894), ("pfedpara", "pfedpara", 63_646), ("original", "fedper", 200_960)],
)
def test_the_papers_network_transfers_what_the_paper_says(method, kind, travels):
    """Section 3.3: pFedPara transfers 3.4 times fewer parameters than FedAvg, FedPer 1.07 times."""
    state = transferred(paper_model(method), Personalization(kind, HEADS["mlp"]))
    assert sum(tensor.numel() for tensor in state.values()) == travels


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_the_head_is_the_last_layer_with_weight_and_bias(name):
    shape = {"lstm": (80,), "vgg16": (3, 32, 32), "resnet18": (3, 32, 32)}.get(name, (1, 8, 8))
    model, _ = build_model(ModelConfig(name=name, method="original", width=4), shape, 5, seed=0)
    last = list(state_of(model))[-1].rpartition(".")[0]
    assert HEADS[name] == last
    assert local_names(model, Personalization("fedper", HEADS[name])) == {f"{last}.weight", f"{last}.bias"}


def test_every_factor_of_the_head_stays_under_fedper():
    local = local_names(paper_model("pfedpara"), Personalization("fedper", "fc2"))
    assert local == {"fc2.bias", *(f"fc2.weight.{factor}" for factor in FACTORS)}


def federation_config(clients: int = 2, **given) -> FederationConfig:
    values = {"clients": clients, "clients_per_round": clients, "epochs": 1, "batch_size": 4, "lr": LR, **given}
    return FederationConfig.model_validate(values)


def parts(clients: int) -> Parts:
    rows = [np.arange(client, 60, clients) for client in range(clients)]
    return Parts([held[:-3] for held in rows], [held[-3:] for held in rows])


def federate(kind, folder, executor=None, *, strategy="fedavg", rounds=2, clients=2, sampled=None, test_epochs=0):
    """After each round: the shared arrays, the accuracies and the loss that clients find."""
    executor = executor or InProcess()
    examples, model = small_examples(), model_of(kind)
    settings = federation_config(clients, clients_per_round=sampled or clients)
    how = LocalTraining(settings, 0.0, SEED, "cpu", 1, folder, personalization(kind, test_epochs))
    executor.set_up(model, examples, parts(clients), how)
    grid = LocalGrid(clients, executor.execute, shared=executor.shared)
    arrays = to_record(transferred(model, how.personalization), shared=executor.shared)
    made = make_strategy(StrategyConfig(name=strategy), settings, trained_names(model, how.personalization))
    results = []
    wire = Wire()
    for trained in Server(made, grid, settings, wire, SEED).rounds(arrays, rounds):
        found = evaluate_by_clients(made, grid, trained.arrays, settings, wire, trained.number)
        shared = {name: array.copy() for name, array in to_arrays(trained.arrays).items()}
        results.append((shared, found.client_accuracies, found.loss, trained.clients))
    return results


class Reference:
    """The methods written out: dictionaries of tensors, autograd, and no class of ours but the seeds."""

    def __init__(self, kind: str, test_epochs: int = 0, clients: int = 2) -> None:
        self.kind, self.clients, self.test_epochs = kind, clients, personalization(kind, test_epochs).test_epochs
        self.examples, self.parts = small_examples(), parts(clients)
        start = {name: tensor.clone() for name, tensor in model_of(kind).state_dict().items()}
        local = start if kind == "ditto" else LOCAL.get(kind, set())
        self.shared = {name: t for name, t in start.items() if name not in LOCAL.get(kind, set())}
        self.own = [{name: start[name].clone() for name in start if name in local} for _ in range(clients)]

    def forward(self, w, x):
        def weight(layer):
            if self.kind != "pfedpara":
                return w[f"{layer}.weight"]
            x1, y1, x2, y2 = (w[f"{layer}.weight.{factor}"] for factor in FACTORS)
            return (x1 @ y1.T) * (x2 @ y2.T + 1)

        hidden = F.linear(x.flatten(1), weight(1), w["1.bias"]).relu()
        return F.linear(hidden, weight(3), w["3.bias"])

    def sgd(self, w, names, client, stream, number, epochs, towards=None):
        rows = torch.from_numpy(self.parts.train[client])
        x, y = self.examples.normalize(self.examples.inputs[rows]), self.examples.labels[rows]
        torch.manual_seed(derive_seed(SEED, stream, number, client))
        w = {name: tensor.clone() for name, tensor in w.items()}
        for _ in range(epochs):
            for batch in torch.randperm(len(y)).split(4):
                leaves = {n: t.detach().requires_grad_() for n, t in w.items()}
                loss = F.cross_entropy(self.forward(leaves, x[batch]), y[batch])
                gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
                for name, gradient in zip(names, gradients, strict=True):
                    if towards:
                        gradient = gradient + MU * (w[name] - towards[name])
                    w[name] = w[name] - LR * gradient
        return w

    def round(self, number):
        sent, weights = [], []
        for client in range(self.clients):
            shared, own = self.shared, self.own[client]
            if self.kind == "ditto":
                self.own[client] = self.sgd(own, list(own), client, "personal", number, OWN_EPOCHS, towards=shared)
                own = {}
            w = {**shared, **own}
            if self.kind == "fedrep":
                w = self.sgd(w, list(own), client, "personal", number, OWN_EPOCHS)
            w = self.sgd(w, list(shared) if self.kind == "fedrep" else list(w), client, "client", number, 1)
            if self.kind not in ("ditto", "finetune", "none"):
                self.own[client] = {name: w[name] for name in own}
            sent.append({name: w[name] for name in shared})
            weights.append(len(self.parts.train[client]))
        self.shared = {
            name: sum(n * w[name] for n, w in zip(weights, sent, strict=True)) / sum(weights) for name in self.shared
        }

    def tested(self, number):
        accuracies, losses = [], []
        for client in range(self.clients):
            w = {**self.shared, **self.own[client]}
            if self.test_epochs:
                w = self.sgd(w, list(w), client, "test", number, self.test_epochs)
            rows = torch.from_numpy(self.parts.held_out[client])
            logits = self.forward(w, self.examples.normalize(self.examples.inputs[rows]))
            accuracies.append((logits.argmax(1) == self.examples.labels[rows]).double().mean().item())
            losses.append(F.cross_entropy(logits, self.examples.labels[rows]).item())
        return accuracies, sum(losses) / len(losses)


@pytest.mark.parametrize("test_epochs", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_each_method_is_its_algorithm_written_out(kind, test_epochs, tmp_path):
    reference = Reference(kind, test_epochs)
    for number, (shared, accuracies, loss, _) in enumerate(federate(kind, tmp_path, test_epochs=test_epochs), 1):
        reference.round(number)
        assert shared.keys() == reference.shared.keys()
        for name, array in shared.items():
            np.testing.assert_allclose(array, reference.shared[name], rtol=0, atol=1e-6)
        expected, expected_loss = reference.tested(number)
        assert accuracies == pytest.approx(expected)
        assert loss == pytest.approx(expected_loss, abs=1e-5)


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


def bits(results):
    return [({name: array.tobytes() for name, array in shared.items()}, *rest) for shared, *rest in results]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_in_one_process_and_in_two_workers(kind, strategy, tmp_path, workers):
    many = {"strategy": strategy, "rounds": 3, "clients": 5, "sampled": 2, "test_epochs": 1}
    expected = bits(federate(kind, tmp_path / "one", **many))
    assert bits(federate(kind, tmp_path / "two", workers, **many)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_before_a_test_leaves_no_trace(kind, tmp_path):
    further, plain = federate(kind, tmp_path / "further", test_epochs=3), federate(kind, tmp_path / "plain")
    assert [result[0] for result in bits(further)] == [result[0] for result in bits(plain)]
    files = [{f.name: f.read_bytes() for f in (tmp_path / n).rglob("*.safetensors")} for n in ("further", "plain")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ditto", "finetune"])
def test_the_shared_model_has_the_bits_of_fedavg(kind, tmp_path):
    shared, plain = federate(kind, tmp_path / "own"), federate("none", tmp_path / "plain")
    assert [result[0] for result in bits(shared)] == [result[0] for result in bits(plain)]
    assert [result[2] for result in shared] != [result[2] for result in plain]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_client_keeps_lies_on_disk_under_its_number(kind, tmp_path):
    ((_, _, _, clients),) = federate(kind, tmp_path, rounds=1, clients=5, sampled=2)
    from safetensors.torch import load_file

    found = {path.relative_to(tmp_path).as_posix(): set(load_file(path)) for path in tmp_path.rglob("*.safetensors")}
    own = set(state_of(model_of(kind))) if kind == "ditto" else LOCAL.get(kind)
    assert found == ({f"personal/{client}/round-1.safetensors": own for client in clients} if own else {})


@pytest.mark.parametrize("kind", ["pfedpara", "fedper", "fedrep", "local", "ditto"])
def test_a_client_that_never_trained_has_the_common_start(kind, tmp_path):
    """Algorithm 2 has all clients start from one point, though the resident model has been other clients since."""
    trained = Trainer(model_of(kind), small_examples(), parts(4), how(kind, tmp_path))
    personal = Personal(trained)
    received = {name: tensor.numpy().copy() for name, tensor in trained.shared.items()}
    start = {name: tensor.clone() for name, tensor in trained.state.items()}
    personal.begin(received, 0, 1, LR, 0)
    personal.train(0, 1, LR, None, 0)
    personal.begin_test(received, 3, 1, LR, 0)
    for name, tensor in trained.state.items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=0)
    personal.begin_test(received, 0, 1, LR, 1)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in trained.state.items())


def how(kind, folder, **given):
    return LocalTraining(federation_config(**given), 0.0, SEED, "cpu", 1, folder, personalization(kind))


def test_a_round_that_is_run_again_starts_from_what_it_started_from(tmp_path):
    trainer = Trainer(model_of("fedper"), small_examples(), parts(2), how("fedper", tmp_path))
    personal = Personal(trainer)
    received = {name: tensor.numpy().copy() for name, tensor in trainer.shared.items()}
    ends = []
    for number in (1, 2, 2):
        personal.begin(received, 0, number, LR, number - 1)
        personal.train(0, number, LR, None, number - 1)
        ends.append(trainer.state["3.weight"].clone())
    assert torch.equal(ends[1], ends[2])
    assert not torch.equal(ends[0], ends[1])


def test_fedproxs_pull_and_feddyns_correction_hold_what_travels_alone(tmp_path):
    """With μ = 10 the shared layer hardly moves, and the client's own moves as far as without."""
    moved = {}
    for mu in (0.0, 10.0):
        from lowrank_fl.drift import Drift

        trainer = Trainer(model_of("fedper"), small_examples(), parts(2), how("fedper", tmp_path / str(mu), epochs=5))
        personal, start = Personal(trainer), {name: t.clone() for name, t in trainer.state.items()}
        personal.begin({name: tensor.numpy().copy() for name, tensor in trainer.shared.items()}, 0, 1, LR, 0)
        personal.train(0, 1, LR, Drift(proximal=mu), 0)
        moved[mu] = {name: (tensor - start[name]).norm().item() for name, tensor in trainer.state.items()}
    assert moved[10.0]["1.weight"] < 0.3 * moved[0.0]["1.weight"]
    assert moved[10.0]["3.weight"] > 0.5 * moved[0.0]["3.weight"]


def test_feddyn_keeps_gradients_of_what_travels_alone(tmp_path):
    from safetensors.torch import load_file

    federate("fedper", tmp_path, strategy="feddyn", rounds=1)
    assert set(load_file(tmp_path / "strategy" / "0" / "round-1.safetensors")) == {"1.weight", "1.bias"}


def test_fedreps_first_phase_leaves_the_bodys_statistics(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
    trainer = Trainer(model, small_examples(), parts(2), how("fedrep", tmp_path))
    before = {name: tensor.clone() for name, tensor in trainer.state.items()}
    Personal(trainer).begin({name: tensor.numpy().copy() for name, tensor in trainer.shared.items()}, 0, 1, LR, 0)
    changed = {name for name, tensor in trainer.state.items() if not torch.equal(tensor, before[name])}
    assert changed == {"3.weight", "3.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_jacobian_correction_leaves_frozen_weights_out(tmp_path):
    model = model_of("pfedpara")
    local = dataclasses.replace(how("fedrep", tmp_path), jacobian_lambda=1.0)
    trainer = Trainer(model, small_examples(), parts(2), local)
    personal = Personal(trainer)
    personal.begin({name: tensor.numpy().copy() for name, tensor in trainer.shared.items()}, 0, 1, LR, 0)
    assert personal.train(0, 1, LR, None, 0).loss > 0


def test_clients_with_a_part_of_their_own_need_a_folder():
    with pytest.raises(LowrankError, match=r"keep something between rounds; give them a folder for it \(state_folder"):
        Personal(Trainer(model_of("fedper"), small_examples(), parts(2), how("fedper", None)))


def test_arrays_of_no_numbers_need_no_slot():
    """Under `local` the mapped slots have no bytes, and a codec may still send arrays of size 0."""
    map_slots(torch.empty(3, 0, dtype=torch.uint8))
    try:
        record = to_record({"none": torch.empty(0, dtype=torch.int32)}, shared=False, slot=2)
    finally:
        map_slots(None)
    assert to_arrays(record)["none"].shape == (0,)
