"""The rounds of a federated run: ours, over Flower's public Strategy interface, because Strategy.start cannot resume."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from lowrank_fl.config import FederationConfig
from lowrank_fl.flower.grid import client_of
from lowrank_fl.flower.records import to_record, wire_bytes
from lowrank_fl.seeds import derive_seed


@dataclass(frozen=True)
class TrainedRound:
    """What one round came to."""

    number: int
    arrays: ArrayRecord
    train_loss: float
    clients: list[int]
    uplink_bytes: int
    downlink_bytes: int
    seconds: float


def train_rounds(
    strategy: Strategy,
    grid: Grid,
    arrays: ArrayRecord,
    federation: FederationConfig,
    *,
    rounds: int,
    seed: int,
) -> Iterator[TrainedRound]:
    """Yield every round as it ends; the caller evaluates and keeps what it needs.

    One call of `configure_train`, the grid and `aggregate_train` is a round, as in Flower's own loop. Bytes are what
    Flower would serialise for the messages to the clients (down) and for their replies (up).
    """
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        config = ConfigRecord({"lr": federation.lr * federation.lr_decay ** (number - 1)})
        # Flower's strategies sample with Python's global generator.
        random.seed(derive_seed(seed, "sampling", number))
        messages = list(strategy.configure_train(number, arrays, config, grid))
        downlink_bytes = sum(map(wire_bytes, messages))
        replies = list(grid.send_and_receive(messages))
        uplink_bytes = sum(map(wire_bytes, replies))
        aggregated, metrics = strategy.aggregate_train(number, replies)
        assert aggregated is not None and metrics is not None, "every reply was an error"
        arrays = _as_before(aggregated, arrays)
        loss = metrics["loss"]
        assert isinstance(loss, float)
        clients = sorted(client_of(message.metadata.dst_node_id) for message in messages)
        seconds = time.perf_counter() - began
        yield TrainedRound(number, arrays, loss, clients, uplink_bytes, downlink_bytes, seconds)


def _as_before(aggregated: ArrayRecord, before: ArrayRecord) -> ArrayRecord:
    """The aggregate in the model's own dtypes: Flower's FedAdam returns float64, which would double the downlink."""
    arrays = {name: array.numpy().astype(before[name].dtype, copy=False) for name, array in aggregated.items()}
    return to_record(arrays, shared=True)
