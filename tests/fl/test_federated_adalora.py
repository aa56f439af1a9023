"""Federated AdaLoRA beside core's own loop and by hand: importances, the allocation, what replies must bring."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import small_examples
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core import LowrankError, UsageError
from lowrank_core.adaptive import AdaptiveRank, adapt_ranks
from lowrank_core.adaptive.groups import find_groups
from lowrank_fl.config import AdapterConfig, FederationConfig, ModelConfig, StrategyConfig
from lowrank_fl.data.examples import Parts
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.importance import IMPORTANCE, SCORES
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import InProcess, Workers
from lowrank_fl.models.adapted import put_adapter
from lowrank_fl.models.build import build_model
from lowrank_fl.ranks.allocation import RankAllocation
from lowrank_fl.ranks.layers import fit
from lowrank_fl.seeds import derive_seed
from lowrank_fl.state import trained_names, transferred
from lowrank_fl.training import LocalTraining, Trainer

SEED, LR, RANK, ROUNDS = 7, 0.05, 4, 4
# Of four rounds, the budget of eight directions falls in the first and reaches its target of two in the second.
FALL = {"target_rank": 1, "warmup": 0.0, "settle": 0.5, "orthogonality": 0.5}
FEDERATION = {"epochs": 2, "batch_size": 4, "lr": LR, "weight_decay": 0.01}


def mlp(**changes):
    """Two layers with an adapter each, and nothing else to train."""
    model, _ = build_model(ModelConfig(name="mlp", method="original", width=8), (1, 8, 8), 3, seed=1)
    adapter = AdapterConfig(method="adalora", rank=RANK, alpha=6, head=False, **{**FALL, **changes})
    put_adapter(model, "mlp", adapter, seed=2)
    return model


def federate(executor=None, *, clients=1, rounds=ROUNDS, strategy="fedavg", tolerated=0.0, **changes):
    """The rounds as they end, with a copy of each one's arrays."""
    executor = executor or InProcess()
    examples, model = small_examples(), mlp(**changes)
    values = {**FEDERATION, "clients": clients, "clients_per_round": clients, "tolerated_failures": tolerated}
    federation = FederationConfig.model_validate(values)
    parts = Parts([np.arange(client, 60, clients) for client in range(clients)], [])
    ranks = RankAllocation.of(model, ROUNDS)
    made = make_strategy(StrategyConfig(name=strategy), federation, trained_names(model))
    arrays = to_record(transferred(model), shared=executor.shared)
    executor.set_up(model, examples, parts, LocalTraining(federation, 0.0, SEED, "cpu", 1))
    grid = LocalGrid(clients, executor.execute, shared=executor.shared)
    for trained in Server(made, grid, federation, Wire(), SEED, ranks=ranks).rounds(arrays, rounds):
        yield trained, {name: array.copy() for name, array in to_arrays(trained.arrays).items()}


def test_directions_start_orthonormal_and_the_adapter_adds_nothing_yet():
    model, _ = build_model(ModelConfig(name="mlp", method="original", width=8), (1, 8, 8), 3, seed=1)
    inputs = small_examples().normalize(small_examples().inputs)
    torch.testing.assert_close(mlp()(inputs), model(inputs))
    for name, tensor in transferred(mlp()).items():
        leaf = name.rpartition(".")[2]
        if leaf == "lora_E":
            assert not tensor.any()
        elif name.partition(".")[0] == "fc1":  # fc2 has three outputs, so four columns cannot be
            rows = tensor if leaf == "lora_A" else tensor.T
            torch.testing.assert_close(rows @ rows.T, torch.eye(RANK), rtol=0, atol=1e-5)


# Beside core's own loop.


def centrally(model, **adaptive):
    """A round of one client that holds everything, by core's allocator on torch's SGD."""
    examples = small_examples()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, weight_decay=FEDERATION["weight_decay"])
    steps = 2 * 15
    config = AdaptiveRank(**{**FALL, **adaptive}, every=steps, shrink_every=steps)
    allocator = adapt_ranks(optimizer, model, ROUNDS * steps, config)
    x, y = examples.normalize(examples.inputs), examples.labels
    torch.manual_seed(derive_seed(SEED, "client", 1, 0))
    for _ in range(2):
        for batch in torch.randperm(60).split(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return allocator


@pytest.mark.slow
def test_a_clients_importances_are_those_of_core_after_the_same_steps():
    model = mlp()
    allocator = centrally(model, warmup=0.25)
    expected = torch.cat([group.scores(allocator._importance)[0] for group in find_groups(model)])
    federation = FederationConfig.model_validate({**FEDERATION, "clients": 1, "clients_per_round": 1})
    how = LocalTraining(federation, 0.0, SEED, "cpu", 1)
    trainer = Trainer(mlp(), small_examples(), Parts([np.arange(60)], []), how)
    trained = trainer.train(0, 1, LR)
    assert trained.importance.shape == (2 * RANK,)
    assert len(set(expected.tolist())) == 2 * RANK
    torch.testing.assert_close(trained.importance, expected, rtol=1e-4, atol=0)
    # A client that trains next starts anew.
    trainer.load({name: tensor.numpy() for name, tensor in transferred(mlp()).items()})
    torch.testing.assert_close(trainer.train(0, 1, LR).importance, trained.importance, rtol=0, atol=0)


def test_a_round_of_one_client_is_core_s_up_to_the_first_allocation():
    model = mlp()
    allocator = centrally(model)
    trained, arrays = next(federate())
    assert sum(allocator.ranks().values()) == 2 + 6 * 0.5**3 // 1
    assert list(trained.ranks.values()) == list(allocator.ranks().values())
    for name, tensor in transferred(model).items():
        np.testing.assert_allclose(arrays[name], tensor, rtol=0, atol=1e-6)


# By hand.


def test_the_server_drops_what_matters_least_by_smoothed_scores():
    model = mlp()
    ranks = RankAllocation.of(model, ROUNDS)
    arrays = {name: tensor.numpy() for name, tensor in transferred(model).items()}
    # Two clients of 10 and 30 examples: their mean is 7.5 times the second's numbers where the first's are 0.
    first, second = np.zeros(8, np.float32), np.arange(8, dtype=np.float32)
    ranks.take([(10, first), (30, second)])
    np.testing.assert_allclose(ranks.state()["scores"], 0.15 * 0.75 * second, rtol=1e-6)
    left = ranks.drop(1, arrays)  # of 8 directions 2 + 6 / 8 stay, rounded down
    assert ranks.ranks(left) == {"fc1": 0, "fc2": 2}
    assert left["fc1.adapters.default.lora_A"].shape == (0, 64)
    for leaf, cut in (("lora_A", np.s_[2:]), ("lora_E", np.s_[2:]), ("lora_B", np.s_[:, 2:])):
        name = f"fc2.adapters.default.{leaf}"
        np.testing.assert_array_equal(left[name], arrays[name][cut])
    np.testing.assert_allclose(ranks.state()["scores"], 0.15 * 0.75 * second[6:], rtol=1e-6)
    # What was said in the first round counts in the second, in which a round without clients says nothing.
    ranks.take([])
    ranks.take([(5, np.array([40, 0], np.float32))])
    np.testing.assert_allclose(ranks.state()["scores"], [0.85 * 0.675 + 0.15 * 40, 0.85 * 0.7875], rtol=1e-6)
    assert ranks.ranks(ranks.drop(2, left)) == {"fc1": 0, "fc2": 2}
    assert ranks.drop(3, left).keys() == left.keys()


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(scores=st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8), number=st.integers(1, 2))
def test_no_direction_that_is_dropped_mattered_more_than_one_that_stays(scores, number):
    ranks = RankAllocation.of(mlp(warmup=0.0, target_rank=2), ROUNDS)
    arrays = {name: tensor.numpy() for name, tensor in transferred(mlp()).items()}
    ranks.take([(1, np.array(scores, np.float32))])
    before = sorted(ranks.state()["scores"])
    left = ranks.drop(number, arrays)
    budget = {1: 4, 2: 4}[number]
    assert sum(ranks.ranks(left).values()) == budget
    assert sorted(ranks.state()["scores"]) == before[-budget:]


def test_a_model_takes_the_ranks_of_the_arrays_it_is_given():
    examples, model = small_examples(), mlp()
    ranks = RankAllocation.of(model, ROUNDS)
    arrays = {name: tensor.numpy() for name, tensor in transferred(model).items()}
    for name in ("fc1", "fc2"):
        arrays[f"{name}.adapters.default.lora_E"][:] = 1
    ranks.take([(1, np.array([1, 0, 0, 0, 0, 0, 1, 0], np.float32))])
    left = ranks.drop(2, arrays)
    inputs = examples.normalize(examples.inputs)
    # The whole adapter with zeros in place of what was dropped computes the same.
    for layer, kept in (("fc1", 0), ("fc2", 2)):
        arrays[f"{layer}.adapters.default.lora_E"][np.arange(RANK) != kept] = 0
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=False)
    expected = model(inputs)
    assert fit(model, left)
    assert not fit(model, left)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in left.items()}, strict=False)
    torch.testing.assert_close(model(inputs), expected)


# Whole federations.


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_the_same_bits_in_one_process_and_in_two_workers(strategy, workers):
    for (one, alone), (two, spread) in zip(
        federate(clients=3, strategy=strategy),
        federate(workers, clients=3, strategy=strategy),
        strict=True,
    ):
        assert one.ranks == two.ranks
        assert {n: a.tobytes() for n, a in alone.items()} == {n: a.tobytes() for n, a in spread.items()}


@pytest.mark.slow
def test_ranks_end_at_the_budget_and_bytes_fall_with_them():
    rounds = [trained for trained, _ in federate(clients=2)]
    assert [sum(trained.ranks.values()) for trained in rounds] == [2, 2, 2, 2]
    rounds = [trained for trained, _ in federate(clients=2, target_rank=2, settle=0.25)]
    # 4 + 4 (1 - t/3)³, rounded down
    assert [sum(trained.ranks.values()) for trained in rounds] == [5, 4, 4, 4]
    for way in ("uplink_bytes", "downlink_bytes"):
        first, second, *others = (getattr(trained, way) for trained in rounds)
        assert first > second > others[0] == others[1]


# What replies must bring.


def broken(scores):
    """Client 1 answers with these importances, or none."""

    class Executor(InProcess):
        def execute(self, messages):
            replies = super().execute(messages)
            content = {key: record for key, record in replies[1].content.items() if key != IMPORTANCE}
            if scores is not None:
                content = {**content, IMPORTANCE: to_record(scores, shared=False)}
            replies[1] = Message(RecordDict(content), reply_to=messages[1])
            return replies

    return Executor()


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (None, "it sent the arrays arrays instead of arrays, importance"),
        ({"other": torch.ones(8)}, "the arrays of importance have other names than scores"),
        ({SCORES: torch.ones(7)}, "importance is float32 (7,), not float32 (8,)"),
        ({SCORES: torch.ones(8, dtype=torch.float64)}, "importance is float64 (8,), not float32 (8,)"),
        ({SCORES: torch.full((8,), torch.nan)}, "importance holds numbers that are negative or not finite"),
        ({SCORES: -torch.ones(8)}, "importance holds numbers that are negative or not finite"),
    ],
)
def test_a_client_with_other_importances_is_dropped(scores, reason):
    trained, _ = next(federate(broken(scores), clients=3, tolerated=0.4))
    assert trained.dropped == {1: reason}
    with pytest.raises(LowrankError, match=r"raise federation\.tolerated_failures"):
        next(federate(broken(scores), clients=3))


@pytest.mark.parametrize(
    ("rounds", "fall", "said"),
    [
        (
            1,
            {},
            "rounds must be a whole number of them, at least 2, got 1; give the length of the whole run",
        ),
        (
            2,
            {},
            "of 2 rounds, 1 to settle leave only the first, and importance is known after it; train longer or lower "
            "settle",
        ),
        (
            3,
            {"warmup": 0.4},
            "3 rounds leave none between a warmup of 1 and the 2 to settle; train longer or lower warmup and settle",
        ),
    ],
)
def test_too_few_rounds_for_the_fall(rounds, fall, said):
    with pytest.raises(UsageError) as caught:
        RankAllocation.of(mlp(**fall), rounds)
    assert str(caught.value) == f"adapter.method adalora: {said}"
