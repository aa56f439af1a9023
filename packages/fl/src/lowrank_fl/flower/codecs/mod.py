"""The client's half of the codecs, as a Flower mod."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flwr.app
import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor

from lowrank_fl.client_state import ClientStates
from lowrank_fl.codecs import Undecodable, make_codec, update
from lowrank_fl.config import CodecConfig
from lowrank_fl.flower.codecs.content import CHANGES, HOW, LAYOUT, read, wrap
from lowrank_fl.flower.instructions import Instructions
from lowrank_fl.flower.records import to_record
from lowrank_fl.packing import Layout
from lowrank_fl.seeds import derive_seed

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def codec_mod(config: CodecConfig, seed: int, folder: Path | None = None) -> Mod:
    """A mod for `ClientApp(mods=[...])` that decodes what a `Wire` sends, and encodes the replies for it.

    The app sees plain arrays. A record of the reply travels as the change of the one received under its name, or,
    where that is `control`, as the change it is already. It may lack some of the arrays received, if what it has is in
    their order; with other names, shapes or dtypes it travels as it is, for the server to refuse. The message's
    ConfigRecord `config` holds the `server-round`, the `state-round` and the number of the `client`, as a `Wire` writes
    them.

    config: the server's.
    seed: of the run; int8 rounds by seed, round and client.
    folder: where clients keep, under topk, what they have not sent yet, and the model that the server's next message
        builds on. Without it the first is lost and the second an error.

    The mod raises LowrankError where a message cannot be decoded.
    """
    client_side = _ClientSide(config, seed, folder)

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        told = Instructions.of(message, context)
        # A message of its own, because within one process the server still holds the other.
        plain = client_side.decode(message.content, told.client)
        received = Message(plain, metadata=message.metadata)  # pyright: ignore[reportCallIssue]
        reply = call_next(received, context)
        if reply.has_content():
            reply.content = client_side.encode(reply.content, plain, told)
        return reply

    return mod


@dataclass(frozen=True)
class _ClientSide:
    config: CodecConfig
    seed: int
    folder: Path | None

    def decode(self, content: RecordDict, client: int) -> RecordDict:
        if HOW not in content.config_records:
            return content
        how = content.config_records[HOW]
        down, version, before = how.get("down"), how.get("version"), how.get("held", 0)
        if down not in ("fp16", "int8", "topk") or not isinstance(version, int) or not isinstance(before, int):
            raise Undecodable(f"the message is encoded as {down!r}, version {version!r}, which nobody knows")
        states = ClientStates(self.folder / "received") if self.folder and down == "topk" else None
        held = states.load(client, before) if states else {}
        plain: dict[str, flwr.app.ArrayRecord] = {}
        for key, record in content.array_records.items():
            described = how.get(LAYOUT + key)
            layout = Layout.from_bytes(described if isinstance(described, bytes) else b"")
            packed = read(record)
            if down == "topk":
                flat = held[key] = update(held.get(key), packed, layout.total)
            else:
                flat = make_codec(down, self.config).decode(packed, layout.sizes)
            plain[key] = wrap(layout.arrays(flat, packed))
        if states:
            # A client that was forgotten in this round is sent everything; a resumed run may count on what it held.
            latest = max((number for number in states.rounds(client) if number < version), default=0)
            states.save(client, version, held, keep=before or latest)
        return RecordDict({key: plain.get(key, record) for key, record in content.items() if key != HOW})

    def encode(self, content: RecordDict, received: RecordDict, told: Instructions) -> RecordDict:
        known = received.array_records
        records = {key: record for key, record in content.array_records.items() if key in known}
        if self.config.up == "none" or not records:
            return content
        states = ClientStates(self.folder / "residual") if self.folder and self.config.up == "topk" else None
        left = states.load(told.client, told.state_round) if states else {}
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "codec", told.round, told.client))
        encoded = {key: self._encode(key, record, known[key], left, generator) for key, record in records.items()}
        if states:
            states.save(told.client, told.round, left, keep=told.state_round)
        return RecordDict({**content, **encoded})

    def _encode(
        self,
        key: str,
        record: flwr.app.ArrayRecord,
        received: flwr.app.ArrayRecord,
        left: dict[str, Tensor],
        generator: torch.Generator,
    ) -> flwr.app.ArrayRecord:
        """The record's change as it travels; `left` is what topk left out before, and then what it leaves out now."""
        arrays, before = read(record), read(received)
        layout, whole = Layout.of(arrays), Layout.of(before)
        if layout != whole.part(arrays):
            return record
        change = layout.flat(arrays)
        if key not in CHANGES:
            change -= layout.flat(before)
        # What is left of arrays that do not travel this time waits until they do.
        places = slice(None) if layout == whole else whole.places(arrays)
        if key in left:
            change += left[key][places]
        codec = make_codec(self.config.up, self.config)
        packed = codec.encode(change, layout.sizes, generator)
        if self.config.up == "topk" and bool(change.isfinite().all()):  # else the server drops this reply
            left.setdefault(key, torch.zeros(whole.total))[places] = change - codec.decode(packed, layout.sizes)
        # Copied, because the slot that the reply lies in takes its shorter form.
        kept = {name: arrays[name].copy() for name in layout.kept}
        return to_record({**packed, **kept}, shared=False, slot=getattr(record, "slot", None))
