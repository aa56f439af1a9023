"""The local engine under Flower: records, bytes on the wire, strategies, and the same bits from every executor."""

import random
import shutil
from pathlib import Path

import flwr.app
import numpy as np
import pytest
import torch
from cases import equal_parts, how, small_examples, small_model
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core import LowrankError, factorize
from lowrank_fl.config import StrategyConfig
from lowrank_fl.data.examples import Parts
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.records import to_arrays, to_record, wire_bytes
from lowrank_fl.flower.rounds import Server, measure_round
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import InProcess, Workers
from lowrank_fl.state import trained_names, transferred


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


def message_with(state) -> Message:
    LocalGrid(1, lambda messages: messages, shared=False)  # sets up who may make messages
    content = RecordDict(
        {
            "arrays": to_record(state, shared=False),
            "config": ConfigRecord({"lr": 0.1, "server-round": 3}),
            "metrics": MetricRecord({"loss": 0.5, "num-examples": 100}),
        }
    )
    return Message(content, 1, "train")


STATE = {
    "weight": torch.randn(3, 4),
    "scalar": torch.tensor(2.5),
    "half": torch.randn(7, dtype=torch.float16),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "strided": torch.randn(4, 6).T,
}


def test_a_record_keeps_names_shapes_dtypes_and_numbers():
    record = to_record(STATE, shared=False)
    for name, tensor in STATE.items():
        array = to_arrays(record)[name]
        assert array.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(array, tensor.numpy())


def test_flower_reads_a_record_after_sending_it():
    message = message_with(STATE)
    objects = get_all_nested_objects(message.content)
    contents = {object_id: item.deflate() for object_id, item in objects.items()}
    received = inflate_object_from_contents(message.content.object_id, contents)
    arrays = received.array_records["arrays"]
    for name, tensor in STATE.items():
        np.testing.assert_array_equal(arrays[name].numpy(), tensor.numpy())


def deflated_bytes(message: Message) -> int:
    return sum(len(item.deflate()) for item in get_all_nested_objects(message).values())


@pytest.mark.slow
def test_wire_bytes_are_those_of_everything_flower_serialises():
    small = message_with(STATE)
    large = message_with({"big": torch.randn(5_500_000), "small": torch.randn(5)})  # five chunks of up to 5 MiB
    for message in (small, large):
        assert wire_bytes(message) == deflated_bytes(message)


@pytest.mark.parametrize(
    ("dtype", "shape", "stype"),
    [
        ("float32", (10**12,), "numpy.ndarray"),
        ("evil", (3,), "numpy.ndarray"),
        ("float32", (-1,), "numpy.ndarray"),
        ("float32", (3,), "pickle"),
    ],
)
def test_an_array_from_elsewhere_counts_by_the_bytes_that_came(dtype, shape, stype):
    message = message_with({"w": torch.ones(3)})
    data = flwr.app.Array(np.ones(3, np.float32)).data
    message.content["arrays"] = flwr.app.ArrayRecord({"w": flwr.app.Array(dtype, shape, stype, data)})
    assert wire_bytes(message) == deflated_bytes(message)


@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_wire_bytes_hold_for_any_shapes(shapes):
    message = message_with({f"layer{i}": torch.randn(shape) for i, shape in enumerate(shapes)})
    assert wire_bytes(message) == deflated_bytes(message)


def run(executor, strategy="fedavg", order=None, rounds=3, **federation):
    examples = small_examples()
    local = how(**federation)
    model = small_model()
    executor.set_up(model, examples, equal_parts(examples, 4), local)

    def execute(messages):
        if order is None:
            return executor.execute(messages)
        shuffled = sorted(messages, key=lambda m: order[m.metadata.dst_node_id - 1])
        replies = dict(zip([m.metadata.dst_node_id for m in shuffled], executor.execute(shuffled), strict=True))
        return [replies[m.metadata.dst_node_id] for m in messages]

    grid = LocalGrid(4, execute, shared=executor.shared)
    initial = to_record(transferred(model), shared=executor.shared)
    results = []
    made = make_strategy(StrategyConfig(name=strategy), local.federation, list(transferred(model)))
    for trained in Server(made, grid, local.federation, Wire(), 5).rounds(initial, rounds):
        results.append(
            (
                trained.clients,
                trained.train_loss,
                trained.uplink_bytes,
                trained.downlink_bytes,
                executor.evaluate(trained.arrays),
                {name: array.tobytes() for name, array in to_arrays(trained.arrays).items()},
            )
        )
    return results


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam"])
def test_the_same_seed_gives_the_same_bits_in_any_order_and_with_any_number_of_workers(strategy, workers):
    expected = run(InProcess(), strategy)
    assert run(InProcess(), strategy) == expected
    assert run(InProcess(), strategy, order=[2, 0, 3, 1]) == expected
    assert run(workers, strategy) == expected


@pytest.mark.slow
def test_training_goes_on_from_round_to_round_and_learns():
    results = run(InProcess(), rounds=12)
    losses = [result[1] for result in results]
    assert losses[-1] < 0.5 * losses[0]
    accuracy, _ = results[-1][4]
    assert accuracy > 0.9


def test_fedavg_is_the_mean_weighted_by_examples():
    examples = small_examples()
    parts = Parts([np.arange(10), np.arange(10, 40)], [])
    local = how(clients=2, clients_per_round=2)
    executor = InProcess()
    executor.set_up(small_model(), examples, parts, local)
    grid = LocalGrid(2, executor.execute, shared=False)
    initial = to_record(transferred(small_model()), shared=False)
    made = make_strategy(StrategyConfig(), local.federation, list(transferred(small_model())))
    captured = []
    grid_send = grid.send_and_receive
    grid.send_and_receive = lambda messages, **_: captured.extend(grid_send(messages)) or captured
    (trained,) = Server(made, grid, local.federation, Wire(), 5).rounds(initial, 1)
    one, two = (to_arrays(reply.content.array_records["arrays"]) for reply in captured)
    for name, array in to_arrays(trained.arrays).items():
        np.testing.assert_allclose(array, 0.25 * one[name] + 0.75 * two[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_every_round_samples_the_configured_number_of_clients_and_leaves_pythons_generator_alone_between_runs():
    sampled = [result[0] for result in run(InProcess(), rounds=6)]
    assert all(len(set(clients)) == 3 for clients in sampled)
    assert len({tuple(clients) for clients in sampled}) > 1
    random.seed(99)
    assert [result[0] for result in run(InProcess(), rounds=6)] == sampled


def measured(config, federation, model):
    return measure_round(config, federation, transferred(model), trained_names(model), Wire())


def test_a_federation_may_have_one_client():
    federation = how(clients=1, clients_per_round=1).federation
    for strategy in ("fedavg", "scaffold", "krum"):
        assert measured(StrategyConfig(name=strategy), federation, small_model())[0] > 0


def test_fedadam_sends_the_models_dtype_though_flower_returns_float64():
    results = run(InProcess(), "fedadam")
    assert len({result[3] for result in results}) == 1


def test_a_plan_measures_the_bytes_a_round_really_takes():
    for strategy in ("fedavg", "fedprox", "fedadam"):
        _, _, uplink, downlink, _, _ = run(InProcess(), strategy, rounds=1)[0]
        assert measured(StrategyConfig(name=strategy), how().federation, small_model()) == (
            downlink,
            uplink,
        )


def test_factorized_models_travel_as_factors_alone():
    model = small_model()
    dense = measured(StrategyConfig(), how().federation, model)
    factorize(model, "fedpara", rank=1)
    factors = measured(StrategyConfig(), how().federation, model)
    assert set(transferred(model)) >= {"1.weight.x1", "1.weight.y2"}
    assert factors[0] < dense[0]


def test_an_error_in_a_worker_reaches_the_server_as_itself(workers):
    with pytest.raises(LowrankError, match="training diverged"):
        run(workers, lr=1e30, epochs=5)
    assert run(workers, rounds=1)[0][0]  # and the worker lives on


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_that_says_what_to_do():
    pool = Workers(1)
    try:
        examples = small_examples()
        pool.set_up(small_model(), examples, equal_parts(examples, 4), how())
        pool._pools[0].submit(_die)
        with pytest.raises(LowrankError, match=r"a worker process died.*-o engine.workers=1"):
            pool.evaluate(to_record(transferred(small_model()), shared=True))
    finally:
        pool.close()


def test_too_little_shared_memory_is_said_before_it_kills(workers, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr("lowrank_fl.flower.workers._SHARED_MEMORY", Path("/"))
    with pytest.raises(
        LowrankError, match=r"worker processes would share \d+ MB in /, which has 0 MB free; run without"
    ):
        run(workers)


def _die():
    import os

    os._exit(3)


def test_the_grid_answers_whole_rounds_only():
    grid = LocalGrid(2, lambda messages: messages, shared=False)
    assert list(grid.get_node_ids()) == [1, 2]
    assert isinstance(grid.create_message(RecordDict(), "train", 1, "1"), flwr.app.Message)
    with pytest.raises(NotImplementedError, match="use send_and_receive"):
        grid.push_messages([])
    with pytest.raises(NotImplementedError, match="use send_and_receive"):
        grid.pull_messages([])
