"""The rounds of a federated run, over Flower's public Strategy interface; Strategy.start itself cannot resume."""

import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from lowrank_core import LowrankError
from lowrank_fl.aggregation import FactorAggregation, Found
from lowrank_fl.config import CodecConfig, FailuresConfig, FederationConfig, PrivacyConfig, StrategyConfig
from lowrank_fl.failures import Simulated, simulate
from lowrank_fl.flower.codecs import codec_mod
from lowrank_fl.flower.grid import LocalGrid, client_of, make_context
from lowrank_fl.flower.importance import IMPORTANCE, SCORES, take_importance
from lowrank_fl.flower.instructions import FACTOR_TURN
from lowrank_fl.flower.records import ArrayRecord, to_arrays, to_record
from lowrank_fl.flower.screening import check_dropped, finite, screen, training_fault
from lowrank_fl.flower.strategies import make_private, make_strategy, reported
from lowrank_fl.flower.wire import Wire
from lowrank_fl.packing import Arrays
from lowrank_fl.ranks.allocation import RankAllocation
from lowrank_fl.seeds import derive_seed


@dataclass(frozen=True)
class TrainedRound:
    """What one round came to."""

    number: int
    arrays: ArrayRecord
    train_loss: float | None
    """None where every client was made to fail, and the model stays as it was."""
    clients: list[int]
    uplink_bytes: int
    downlink_bytes: int
    seconds: float
    dropped: dict[int, str]
    """The clients whose replies were not used, and why."""
    found: Found
    """What was found out about factors."""
    ranks: dict[str, int]
    """Of AdaLoRA's layers, as the round leaves them; empty without it."""
    simulated: Simulated | None = None
    """What befell clients where failures are simulated."""


@dataclass
class Server:
    """The server's half of a run: Flower's strategy, the messages to clients, and what is done beside the strategy.

    strategy: which keeps its own state from round to round.
    wire: how messages are written, which keeps what clients are known to hold.
    seed: of who is sampled, and of failures.
    examples: how many each client trains on, which is the most that it may weigh; any number if not given.
    aggregation: what is done about factors beside the strategy's step; nothing if not given.
    ranks: of AdaLoRA's layers, which replies bring importances for; they stay if not given.
    privacy: that of the strategy (`make_private`).
    failures: the clients that are made to fail, for which `examples` is needed; none if not given.
    """

    strategy: Strategy
    grid: Grid
    federation: FederationConfig
    wire: Wire
    seed: int
    examples: Sequence[int] | None = None
    aggregation: FactorAggregation | None = None
    ranks: RankAllocation | None = None
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    failures: FailuresConfig | None = None

    def rounds(self, arrays: ArrayRecord, last: int, first: int = 1) -> Iterator[TrainedRound]:
        """Yield every round from `first` to `last` as it ends; the caller evaluates and keeps what it needs.

        Raises:
            LowrankError: more replies of a round are unusable than `federation.tolerated_failures` allows, or all are,
                or the strategy makes a model of them whose numbers are not all finite.
        """
        for number in range(first, last + 1):
            trained = self._round(number, arrays)
            arrays = trained.arrays
            yield trained

    def _round(self, number: int, arrays: ArrayRecord) -> TrainedRound:
        """One call of `configure_train`, the grid and `aggregate_train`, as in Flower's own loop.

        Bytes are what Flower would serialise for the messages to the clients (down) and for their replies (up).
        """
        began = time.perf_counter()
        config = ConfigRecord({"lr": self.federation.lr_in(number), **_turn(self.aggregation, number)})
        returned = self.aggregation.returned(number) if self.aggregation else None
        # Flower's strategies sample with Python's global generator.
        random.seed(derive_seed(self.seed, "sampling", number))
        messages = list(self.strategy.configure_train(number, arrays, config, self.grid))
        clients = sorted(client_of(message.metadata.dst_node_id) for message in messages)
        simulated = None
        if self.failures:
            simulated = simulate(self.failures, self.federation, self.examples or (), self.seed, number, clients)
        missing = simulated.missing if simulated else {}
        exchange = self.wire.exchange(self.grid, messages, returned, missing)
        directions = sum(self.ranks.ranks(to_arrays(arrays)).values()) if self.ranks else None
        fault = training_fault(self.examples, returned, directions, reported(self.privacy))
        sound, dropped = screen(exchange.replies, exchange.messages, fault)
        dropped = {client: reason for client, reason in dropped.items() if client not in missing}
        asked = len(messages) - len(missing)
        check_dropped(dropped, asked, self.federation.tolerated_failures, f"be used in round {number}")
        loss, found = None, Found()
        if sound:
            arrays, loss, found = self._aggregate(number, arrays, sound)
        elif self.wire.base:
            arrays = to_record(self.wire.base.unmoved(to_arrays(arrays)), shared=True)
        if not finite(to_arrays(arrays)):
            raise LowrankError(
                f"the server's step in round {number} leaves numbers that are not finite, though every reply's are; "
                "lower strategy.server_lr or federation.lr"
            )
        self.wire.accept(number, sound)
        if self.wire.base:
            self.wire.base.follow(to_arrays(arrays))
        if self.ranks:
            arrays = to_record(self.ranks.drop(number, to_arrays(arrays)), shared=True)
        seconds = time.perf_counter() - began
        up, down = exchange.uplink_bytes, exchange.downlink_bytes
        left = self.ranks.ranks(to_arrays(arrays)) if self.ranks else {}
        dropped |= missing
        return TrainedRound(number, arrays, loss, clients, up, down, seconds, dropped, found, left, simulated)

    def _aggregate(
        self, number: int, arrays: ArrayRecord, sound: Sequence[Message]
    ) -> tuple[ArrayRecord, float, Found]:
        """The model that the strategy makes of sound replies, their mean loss, and what was found about factors."""
        if self.ranks:
            self.ranks.take([(_examples(reply), take_importance(reply)) for reply in sound])
        found = Found()
        if self.aggregation:
            found = self.aggregation.combine(to_arrays(arrays), [_trained(reply) for reply in sound])
        with np.errstate(over="ignore", invalid="ignore"):  # what it leaves is looked at afterwards
            aggregated, metrics = self.strategy.aggregate_train(number, sound)
            assert aggregated is not None
            assert metrics is not None
            arrays = _as_before({**to_arrays(arrays), **to_arrays(aggregated), **found.refitted}, arrays)
        loss = metrics["loss"]
        assert isinstance(loss, float)
        return arrays, loss, found


def _turn(aggregation: FactorAggregation | None, number: int) -> dict[str, int]:
    """What clients are told where one factor of each weight is trained."""
    turn = aggregation.turn(number) if aggregation else None
    return {} if turn is None else {FACTOR_TURN: turn}


def _trained(reply: Message) -> tuple[int, Arrays]:
    """A sound reply's examples and arrays."""
    return _examples(reply), to_arrays(reply.content.array_records["arrays"])


def _examples(reply: Message) -> int:
    count = reply.content.metric_records["metrics"]["num-examples"]
    assert isinstance(count, int)
    return count


def _as_before(aggregated: Arrays, before: ArrayRecord) -> ArrayRecord:
    """The aggregate in the model's own dtypes: Flower's FedAdam returns float64, which would double the downlink."""
    arrays = {name: array.astype(before[name].dtype, copy=False) for name, array in aggregated.items()}
    return to_record(arrays, shared=True)


def measure_round(
    config: StrategyConfig,
    federation: FederationConfig,
    state: Mapping[str, Tensor],
    parameters: Sequence[str],
    wire: Wire,
    number: int = 1,
    aggregation: FactorAggregation | None = None,
    sampling: int = 0,
    directions: int | None = None,
    privacy: PrivacyConfig | None = None,
) -> tuple[int, int]:
    """The bytes down and up of that round with a model like `state`, from the messages the strategy really makes.

    Under codec.down topk they depend on the rounds before, which go over the same `wire`: after one they are those of a
    client that takes part in every round. Updates are followed from round to round likewise.

    sampling: the seed that the round's clients are drawn by.
    directions: how many have their importance sent; nothing is sent if not given.
    """
    arrays = to_record(state, shared=False)
    grid = LocalGrid(federation.clients, lambda sent: [Message(answer, reply_to=m) for m in sent], shared=False)
    privacy = privacy or PrivacyConfig()
    strategy = make_strategy(config, federation, parameters)
    strategy = make_private(strategy, privacy, federation.clients_per_round, 0, state.keys() - set(parameters))
    random.seed(sampling)
    told = ConfigRecord({"lr": 0.1, **_turn(aggregation, number)})
    returned = aggregation.returned(number) if aggregation else None
    messages = list(strategy.configure_train(number, arrays, told, grid))
    answer = _answer(messages[0], wire.codec, returned, directions, reported(privacy))
    exchange = wire.exchange(grid, messages, returned)
    if wire.base:
        wire.base.follow(to_arrays(arrays), merge=False)
    return exchange.downlink_bytes, exchange.uplink_bytes


def _answer(
    message: Message,
    codec: CodecConfig,
    returned: Collection[str] | None,
    directions: int | None,
    metrics: Sequence[str],
) -> RecordDict:
    """A client's reply, which has a record like every one it gets; its size does not depend on the numbers."""
    told = MetricRecord({"num-examples": 1, **{name: 0.0 if name == "loss" else 0 for name in metrics}})
    records = {
        key: to_record({n: a for n, a in to_arrays(record).items() if returned is None or n in returned}, shared=False)
        for key, record in message.content.array_records.items()
    }
    if directions is not None:
        records[IMPORTANCE] = to_record({SCORES: np.zeros(directions, np.float32)}, shared=False)
    content = RecordDict({**records, "metrics": told})
    return codec_mod(codec, 0)(message, make_context(0, 1), lambda m, _: Message(content, reply_to=m)).content
