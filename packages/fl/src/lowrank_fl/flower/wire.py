"""A round trip of messages: encoded, sent through a grid, answered, measured on the way, and decoded."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lowrank_fl.config import CodecConfig
from lowrank_fl.flower.base_model import BaseModel
from lowrank_fl.flower.codecs.downlink import Downlink
from lowrank_fl.flower.codecs.uplink import decode_reply
from lowrank_fl.flower.grid import client_of
from lowrank_fl.flower.instructions import STATE_ROUND
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
    base: the weights under updates, of which clients are sent what they miss; none if not given.
    """

    def __init__(self, codec: CodecConfig | None = None, seed: int = 0, base: BaseModel | None = None) -> None:
        self.codec, self.base = codec or CodecConfig(), base
        self._downlink = Downlink(self.codec, seed)
        self._accepted: dict[int, int] = {}
        """By client, the last round whose reply was used."""

    def exchange(
        self,
        grid: Grid,
        messages: Iterable[Message],
        returned: Collection[str] | None = None,
        silent: Collection[int] = (),
    ) -> Exchange:
        """Send the messages, each with the number of its client, and wait for the replies.

        A reply that cannot be decoded becomes an error reply.

        returned: the names, among those sent, of the arrays that replies bring; all of them if not given.
        silent: the clients whose messages count as sent and go nowhere, so that no reply comes.
        """
        addressed = self._addressed(messages)
        contents = {message.metadata.dst_node_id: message.content for message in addressed}
        if self.base is not None:
            self.base.add_to(addressed)
            exchange = _exchange(grid, addressed, silent)
            for message in addressed:
                message.content = contents[message.metadata.dst_node_id]
            self.base.confirm(addressed, (r.metadata.src_node_id for r in exchange.replies if r.has_content()))
            return exchange
        if self.codec.up == self.codec.down == "none":
            return _exchange(grid, addressed, silent)
        sent = self._downlink.encode(addressed)
        if returned is not None:
            sent = {identity: whole.part(returned) for identity, whole in sent.items()}
        encoded = _exchange(grid, addressed, silent)
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
            else:
                self._downlink.forget(client_of(message.metadata.dst_node_id))
        return Exchange(addressed, replies, encoded.downlink_bytes, encoded.uplink_bytes)

    def accept(self, round_number: int, replies: Iterable[Message]) -> None:
        """Take note that these replies are used; their clients go on from what this round of training left them.

        A client whose reply is not among them goes on from where it was, as if it had not been asked.
        """
        for reply in replies:
            self._accepted[client_of(reply.metadata.src_node_id)] = round_number

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint: `accepted`, int64 rows of client and round, and what clients hold under topk or
        updates.
        """
        accepted = np.array(sorted(self._accepted.items()), np.int64).reshape(-1, 2)
        base = {f"base/{path}": array for path, array in self.base.state().items()} if self.base else {}
        return {"accepted": accepted, **base, **self._downlink.state()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        self._accepted = dict(state["accepted"].tolist())
        if self.base:
            self.base.load_state({path.removeprefix("base/"): array for path, array in state.items()})
        else:
            self._downlink.load_state({path: array for path, array in state.items() if path != "accepted"})

    def _addressed(self, messages: Iterable[Message]) -> list[Message]:
        """The messages with what their client is told: its number, because a node may host several, and its state."""
        named = list(messages)
        for message in named:
            client = client_of(message.metadata.dst_node_id)
            told = {"client": client, STATE_ROUND: self._accepted.get(client, 0)}
            own = ConfigRecord({**message.content.config_records["config"], **told})
            message.content = RecordDict({**message.content, "config": own})
        return named


def _exchange(grid: Grid, messages: Sequence[Message], silent: Collection[int]) -> Exchange:
    downlink_bytes = sum(map(wire_bytes, messages))
    delivered = [m for m in messages if client_of(m.metadata.dst_node_id) not in silent]
    replies = list(grid.send_and_receive(delivered)) if delivered else []
    return Exchange(messages, replies, downlink_bytes, sum(map(wire_bytes, replies)))
