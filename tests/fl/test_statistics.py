"""A batch norm's statistics are averaged, whatever the server's rule does to the parameters."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from lowrank_fl.config import FederationConfig, StrategyConfig
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.strategies import load_strategy_state, make_strategy, strategy_state

FEDERATION = FederationConfig(clients=2, clients_per_round=2, lr=0.1)
START = {"weight": np.array([1.0, -2.0], np.float32), "running_var": np.array([1.0, 0.5], np.float32)}
EXAMPLES = (10, 30)
ADAPTIVE = ["fedavgm", "fedadam", "fedyogi", "fedadagrad"]


def config_of(name: str) -> StrategyConfig:
    return StrategyConfig(name=name, server_lr=0.1, server_momentum=0.9)


def answer(message: Message) -> Message:
    """The client moves its weight to its number, and its variance almost to 0.002, as batch norm does in some steps."""
    client = message.metadata.dst_node_id - 1
    got = to_arrays(message.content.array_records["arrays"])
    left = {"weight": 0.5 * got["weight"] + client, "running_var": 0.002 + 0.01 * (got["running_var"] - 0.002)}
    arrays = to_record({name: value.astype(np.float32) for name, value in left.items()}, shared=False)
    metrics = MetricRecord({"num-examples": EXAMPLES[client], "loss": 0.0})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def federate(strategy: flower.Strategy, rounds: int, resume_at: int | None = None, again=None) -> list[dict]:
    grid = LocalGrid(2, lambda messages: [answer(message) for message in messages], shared=False)
    arrays: ArrayRecord = to_record(START, shared=False)
    left = []
    for number in range(1, rounds + 1):
        if number == resume_at:
            state = strategy_state(strategy)
            strategy = again()
            load_strategy_state(strategy, state, arrays)
        messages = list(strategy.configure_train(number, arrays, ConfigRecord({"lr": 0.1}), grid))
        aggregated, _ = strategy.aggregate_train(number, list(grid.send_and_receive(messages)))
        assert aggregated is not None
        in_float32 = {name: array.numpy().astype(np.float32) for name, array in aggregated.items()}
        arrays = to_record(in_float32, shared=False)
        left.append(in_float32)
    return left


@pytest.mark.parametrize("name", ADAPTIVE)
def test_variances_are_the_clients_mean_and_never_negative(name):
    variance = START["running_var"].astype(np.float64)
    for arrays in federate(make_strategy(config_of(name), FEDERATION, ["weight"]), 60):
        variance = 0.002 + 0.01 * (variance - 0.002)
        np.testing.assert_allclose(arrays["running_var"], variance, rtol=1e-5)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_parameters_move_by_flowers_own_rule_to_the_bit(name):
    ours = federate(make_strategy(config_of(name), FEDERATION, ["weight"]), 6)
    everything = federate(make_strategy(config_of(name), FEDERATION, ["weight", "running_var"]), 6)
    assert [arrays["weight"].tolist() for arrays in ours] == [arrays["weight"].tolist() for arrays in everything]
    assert ours[-1]["running_var"].tolist() != everything[-1]["running_var"].tolist()
    assert list(ours[-1]) == list(START)  # in the model's order, which codecs go by


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_resumed_strategy_keeps_its_bits(name):
    def make():
        return make_strategy(config_of(name), FEDERATION, ["weight"])

    whole, resumed = federate(make(), 6), federate(make(), 6, resume_at=4, again=make)
    for one, other in zip(whole, resumed, strict=True):
        assert {key: value.tobytes() for key, value in one.items()} == {k: v.tobytes() for k, v in other.items()}
