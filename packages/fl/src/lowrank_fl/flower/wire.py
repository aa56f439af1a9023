"""A round trip of messages: encoded, sent through a grid, answered, measured on the way, and decoded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lowrank_fl.config import CodecConfig
from lowrank_fl.flower.codecs.downlink import Downlink
from lowrank_fl.flower.codecs.uplink import decode_reply
from lowrank_fl.flower.grid import client_of
from lowrank_fl.flower.records import wire_bytes


@dataclass(frozen=True)
class Exchange:
    """What was sent and what came back, both decoded; bytes are those Flower would serialise, encoded."""

    messages: Sequence[Message]
    replies: list[Message]
    downlink_bytes: int
    uplink_bytes: int


class Wire:
    """What lies between a strategy and its clients, whose ClientApp has `codec_mod` with the same configuration.

    Client n is node n + 1 of the grid.

    codec: how numbers are written for the way; as they are if not given.
    seed: of the run.
    """

    def __init__(self, codec: CodecConfig | None = None, seed: int = 0) -> None:
        self.codec = codec or CodecConfig()
        self._downlink = Downlink(self.codec, seed)

    def exchange(self, grid: Grid, messages: Iterable[Message]) -> Exchange:
        """Send the messages, each with the number of its client, and wait for the replies.

        A reply that cannot be decoded becomes an error reply.
        """
        addressed = _addressed(messages)
        if self.codec.up == self.codec.down == "none":
            return _exchange(grid, addressed)
        contents = {message.metadata.dst_node_id: message.content for message in addressed}
        sent = self._downlink.encode(addressed)
        encoded = _exchange(grid, addressed)
        for message in addressed:
            message.content = contents[message.metadata.dst_node_id]
        replies: list[Message] = []
        for reply in encoded.replies:
            content = contents.get(reply.metadata.src_node_id)
            if content is not None:
                named = {key: sent[id(record)] for key, record in content.array_records.items()}
                reply = decode_reply(reply, named, self.codec)
            replies.append(reply)
        answered = {reply.metadata.src_node_id for reply in replies if reply.has_content()}
        for message in addressed:
            if message.metadata.dst_node_id in answered:
                self._downlink.confirm(message)
        return Exchange(addressed, replies, encoded.downlink_bytes, encoded.uplink_bytes)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint: what clients hold under codec.down topk; nothing otherwise."""
        return self._downlink.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        self._downlink.load_state(state)


def _exchange(grid: Grid, messages: Sequence[Message]) -> Exchange:
    downlink_bytes = sum(map(wire_bytes, messages))
    replies = list(grid.send_and_receive(messages))
    return Exchange(messages, replies, downlink_bytes, sum(map(wire_bytes, replies)))


def _addressed(messages: Iterable[Message]) -> list[Message]:
    """The messages with the number of their client in their config, because a node may host several."""
    named = list(messages)
    for message in named:
        config = message.content.config_records["config"]
        own = ConfigRecord({**config, "client": client_of(message.metadata.dst_node_id)})
        message.content = RecordDict({**message.content, "config": own})
    return named
