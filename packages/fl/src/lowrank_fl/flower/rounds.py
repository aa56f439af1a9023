"""The rounds of a federated run, over Flower's public Strategy interface; Strategy.start itself cannot resume."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import flwr.app
import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from lowrank_core import LowrankError
from lowrank_fl.config import CodecConfig, FederationConfig, StrategyConfig
from lowrank_fl.flower.codecs import codec_mod
from lowrank_fl.flower.grid import LocalGrid, client_of, make_context
from lowrank_fl.flower.records import ArrayRecord, to_arrays, to_record
from lowrank_fl.flower.screening import check_dropped, finite, screen, training_fault
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
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
    dropped: dict[int, str]
    """The clients whose replies were not used, and why."""


def train_rounds(
    strategy: Strategy,
    grid: Grid,
    arrays: ArrayRecord,
    federation: FederationConfig,
    wire: Wire,
    *,
    rounds: int,
    seed: int,
    first: int = 1,
    examples: Sequence[int] | None = None,
) -> Iterator[TrainedRound]:
    """Yield every round from `first` on as it ends; the caller evaluates and keeps what it needs.

    One call of `configure_train`, the grid and `aggregate_train` is a round, as in Flower's own loop. Bytes are what
    Flower would serialise for the messages to the clients (down) and for their replies (up).

    examples: how many each client trains on, which is the most that it may weigh; any number if not given.

    Raises:
        LowrankError: more replies of a round are unusable than `federation.tolerated_failures` allows, or all are, or
            the strategy makes a model of them whose numbers are not all finite.
    """
    for number in range(first, rounds + 1):
        began = time.perf_counter()
        config = ConfigRecord({"lr": federation.lr_in(number)})
        # Flower's strategies sample with Python's global generator.
        random.seed(derive_seed(seed, "sampling", number))
        exchange = wire.exchange(grid, strategy.configure_train(number, arrays, config, grid))
        messages = exchange.messages
        sound, dropped = screen(exchange.replies, messages, training_fault(examples))
        check_dropped(dropped, len(messages), federation.tolerated_failures, f"be used in round {number}")
        with np.errstate(over="ignore", invalid="ignore"):  # what it leaves is looked at below
            aggregated, metrics = strategy.aggregate_train(number, sound)
            assert aggregated is not None
            assert metrics is not None
            arrays = _as_before(aggregated, arrays)
        if not finite(to_arrays(arrays)):
            raise LowrankError(
                f"the server's step in round {number} leaves numbers that are not finite, though every reply's are; "
                "lower strategy.server_lr or federation.lr"
            )
        wire.accept(number, sound)
        loss = metrics["loss"]
        assert isinstance(loss, float)
        clients = sorted(client_of(message.metadata.dst_node_id) for message in messages)
        seconds = time.perf_counter() - began
        up, down = exchange.uplink_bytes, exchange.downlink_bytes
        yield TrainedRound(number, arrays, loss, clients, up, down, seconds, dropped)


def _as_before(aggregated: flwr.app.ArrayRecord, before: ArrayRecord) -> ArrayRecord:
    """The aggregate in the model's own dtypes: Flower's FedAdam returns float64, which would double the downlink."""
    arrays = {name: array.numpy().astype(before[name].dtype, copy=False) for name, array in aggregated.items()}
    return to_record(arrays, shared=True)


def measure_round(
    config: StrategyConfig,
    federation: FederationConfig,
    state: Mapping[str, Tensor],
    parameters: Sequence[str],
    wire: Wire,
    number: int = 1,
) -> tuple[int, int]:
    """The bytes down and up of one round with a model like `state`, from the messages the strategy really makes.

    Under codec.down topk they depend on the rounds before, which go over the same `wire`: after one they are those of a
    client that takes part in every round.
    """
    arrays = to_record(state, shared=False)
    grid = LocalGrid(federation.clients, lambda sent: [Message(answer, reply_to=m) for m in sent], shared=False)
    strategy = make_strategy(config, federation, parameters)
    random.seed(0)  # the same clients in every round
    messages = list(strategy.configure_train(number, arrays, ConfigRecord({"lr": 0.1}), grid))
    answer = _answer(messages[0], wire.codec)
    exchange = wire.exchange(grid, messages)
    return exchange.downlink_bytes, exchange.uplink_bytes


def _answer(message: Message, codec: CodecConfig) -> RecordDict:
    """A client's reply, which has a record like every one it gets; its size does not depend on the numbers."""
    metrics = MetricRecord({"num-examples": 1, "loss": 0.0})
    content = RecordDict({**message.content.array_records, "metrics": metrics})
    return codec_mod(codec, 0)(message, make_context(0, 1), lambda m, _: Message(content, reply_to=m)).content
