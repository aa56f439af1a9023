"""A round trip of messages: sent through a grid, answered, and measured on the way."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lowrank_fl.flower.grid import client_of
from lowrank_fl.flower.records import wire_bytes


@dataclass(frozen=True)
class Exchange:
    """What was sent and what came back; bytes are those Flower would serialise."""

    messages: Sequence[Message]
    replies: list[Message]
    downlink_bytes: int
    uplink_bytes: int


class Wire:
    """What lies between a strategy and its clients."""

    def exchange(self, grid: Grid, messages: Iterable[Message]) -> Exchange:
        """Send the messages, each with the number of its client, and wait for the replies."""
        sent = _addressed(messages)
        downlink_bytes = sum(map(wire_bytes, sent))
        replies = list(grid.send_and_receive(sent))
        return Exchange(sent, replies, downlink_bytes, sum(map(wire_bytes, replies)))


def _addressed(messages: Iterable[Message]) -> list[Message]:
    """The messages with the number of their client in their config, because a node may host several."""
    named = list(messages)
    for message in named:
        config = message.content.config_records["config"]
        own = ConfigRecord({**config, "client": client_of(message.metadata.dst_node_id)})
        message.content = RecordDict({**message.content, "config": own})
    return named
