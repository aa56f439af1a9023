"""What the server does to the arrays it sends."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import flwr.app
import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from lowrank_fl.codecs import make_codec
from lowrank_fl.config import CodecConfig
from lowrank_fl.flower.codecs.content import HOW, LAYOUT, read, wrap
from lowrank_fl.flower.codecs.shadow import Shadow
from lowrank_fl.flower.grid import client_of
from lowrank_fl.packing import Layout
from lowrank_fl.seeds import derive_seed


@dataclass(frozen=True)
class Sent:
    """One record as the strategy made it, and what clients get of it."""

    layout: Layout
    model: Tensor
    """The strategy's numbers in a row."""
    received: Tensor
    """What clients decode; `model` itself without a codec."""
    kept: Mapping[str, np.ndarray]
    encodings: dict[int | None, flwr.app.ArrayRecord] = field(default_factory=dict[int | None, flwr.app.ArrayRecord])
    """What travels; under topk by the version that the client holds."""

    def part(self, names: Collection[str]) -> "Sent":
        """What it says of the arrays with these names, for replies that bring no others."""
        places = self.layout.places(names)
        model = self.model[places]
        received = model if self.received is self.model else self.received[places]
        kept = {name: values for name, values in self.kept.items() if name in names}
        return Sent(self.layout.part(names), model, received, kept)


class Downlink:
    """Encodes messages, each record once for all messages that carry it.

    fp16 and int8 encode the whole record; int8 draws its rounding anew for each version of the model. topk sends a
    client what makes it hold the shadow. A model that clients test after a round and train in the next is one version,
    so testing changes nothing of the training.
    """

    def __init__(self, config: CodecConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.shadows: dict[str, Shadow] = {}

    def encode(self, messages: Sequence[Message]) -> dict[int, Sent]:
        """Replace the messages' arrays by what travels.

        Returns:
            What was sent, by the identity of the strategy's records.
        """
        sent: dict[int, Sent] = {}
        for message in messages:
            records = message.content.array_records
            for key, record in records.items():
                if id(record) not in sent:
                    sent[id(record)] = self._sent(key, record, _version(message))
            if self.config.down == "none":
                continue
            client = client_of(message.metadata.dst_node_id)
            how = ConfigRecord({"down": self.config.down, "version": _version(message)})
            if self.config.down == "topk":
                how["held"] = max(shadow.seen.get(client, 0) for shadow in self.shadows.values())
            travels = {}
            for key, record in records.items():
                how[LAYOUT + key] = sent[id(record)].layout.to_bytes()
                travels[key] = self._encoding(key, sent[id(record)], client)
            message.content = RecordDict({**message.content, **travels, HOW: how})
        return sent

    def confirm(self, message: Message) -> None:
        """This message was answered, so its client holds what it brought."""
        for key in message.content.array_records:
            if key in self.shadows:
                self.shadows[key].seen[client_of(message.metadata.dst_node_id)] = _version(message)

    def forget(self, client: int) -> None:
        """Nothing is known of what this client holds, so its next message brings the whole model."""
        for shadow in self.shadows.values():
            shadow.seen.pop(client, None)

    def state(self) -> dict[str, np.ndarray]:
        """What the next message depends on, by `record/name`."""
        return {f"{key}/{name}": a for key, shadow in self.shadows.items() for name, a in shadow.state().items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        by_key: dict[str, dict[str, np.ndarray]] = {}
        for path, array in state.items():
            key, _, name = path.rpartition("/")
            by_key.setdefault(key, {})[name] = array
        self.shadows = {key: Shadow.from_state(named) for key, named in by_key.items()}

    def _sent(self, key: str, record: flwr.app.ArrayRecord, version: int) -> Sent:
        arrays = read(record)
        layout = Layout.of(arrays)
        model = layout.flat(arrays)
        kept = {name: arrays[name] for name in layout.kept}
        if self.config.down == "none":
            return Sent(layout, model, model, kept)
        if self.config.down == "topk":
            if key not in self.shadows:
                self.shadows[key] = Shadow(model, version)
            self.shadows[key].advance(model, version, self.config.top_k)
            return Sent(layout, model, self.shadows[key].values, kept)
        codec = make_codec(self.config.down, self.config)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "server_codec", version))
        packed = codec.encode(model, layout.sizes, generator)
        return Sent(layout, model, codec.decode(packed, layout.sizes), kept, {None: wrap({**packed, **kept})})

    def _encoding(self, key: str, sent: Sent, client: int) -> flwr.app.ArrayRecord:
        seen = self.shadows[key].seen.get(client) if key in self.shadows else None
        if seen not in sent.encodings:
            sent.encodings[seen] = wrap({**self.shadows[key].news(seen), **sent.kept})
        return sent.encodings[seen]


def _version(message: Message) -> int:
    """Of the model a message carries: a round's, or after it, to be tested, the next round's."""
    number = message.content.config_records["config"]["server-round"]
    assert isinstance(number, int)
    return number + message.metadata.message_type.startswith("evaluate")
