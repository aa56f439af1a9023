"""Every client tests the shared model, with what it has of its own, on the examples it holds out."""

from collections.abc import Mapping, Sequence

import flwr.app
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from lowrank_core import LowrankError
from lowrank_fl.config import FederationConfig, StrategyConfig
from lowrank_fl.flower.grid import LocalGrid, client_of
from lowrank_fl.flower.records import to_record
from lowrank_fl.flower.screening import check_dropped, metrics_of, screen
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.results import Evaluation

_METRICS = ("accuracy", "loss")


def evaluate_by_clients(
    strategy: Strategy,
    grid: Grid,
    arrays: flwr.app.ArrayRecord,
    federation: FederationConfig,
    wire: Wire,
    number: int,
) -> Evaluation:
    """Ask all clients how the model that round `number` left does on their held-out examples.

    Raises:
        LowrankError: more replies are unusable than `federation.tolerated_failures` allows, or all are.
    """
    config = ConfigRecord({"lr": federation.lr_in(number)})
    exchange = wire.exchange(grid, strategy.configure_evaluate(number, arrays, config, grid))
    sound, dropped = screen(exchange.replies, exchange.messages, _fault)
    task = f"test the model of round {number}"
    check_dropped(dropped, len(exchange.messages), federation.tolerated_failures, task)
    found = {client_of(reply.metadata.src_node_id): metrics_of(reply, _METRICS) for reply in sound}
    accuracies = {client: found[client]["accuracy"] for client in sorted(found)}
    losses = [found[client]["loss"] for client in accuracies]
    ranked = sorted(accuracies.values())
    worst = ranked[: max(1, len(ranked) // 10)]
    return Evaluation(
        accuracy=sum(accuracies.values()) / len(accuracies),
        loss=sum(losses) / len(losses),
        worst_accuracy=sum(worst) / len(worst),
        client_accuracies=[accuracies.get(client) for client in range(federation.clients)],
        sent_bytes=exchange.uplink_bytes + exchange.downlink_bytes,
        dropped=dropped,
    )


def measure_evaluation(
    config: StrategyConfig, federation: FederationConfig, state: Mapping[str, Tensor], wire: Wire, number: int = 1
) -> int:
    """The bytes, both ways, of one evaluation of a model like `state`, from the messages the strategy really makes.

    wire: what the rounds before went over, on which the bytes depend under codec.down topk.
    """

    def reply(messages: Sequence[Message]) -> list[Message]:
        metrics = MetricRecord({"num-examples": 1, "accuracy": 0.0, "loss": 0.0})
        return [Message(RecordDict({"metrics": metrics}), reply_to=message) for message in messages]

    grid = LocalGrid(federation.clients, reply, shared=False)
    strategy = make_strategy(config, federation, [])
    arrays, config_record = to_record(state, shared=False), ConfigRecord({"lr": federation.lr})
    exchange = wire.exchange(grid, strategy.configure_evaluate(number, arrays, config_record, grid))
    return exchange.uplink_bytes + exchange.downlink_bytes


def _fault(reply: Message, _: Message) -> str | None:
    try:
        accuracy = metrics_of(reply, _METRICS)["accuracy"]
    except LowrankError as error:
        return str(error)
    return None if 0 <= accuracy <= 1 else f"it reports the accuracy {accuracy}"
