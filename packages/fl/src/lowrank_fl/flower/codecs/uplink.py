"""What the server makes of encoded replies: plain arrays, as a strategy expects them."""

from collections.abc import Mapping

import flwr.app
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from lowrank_fl.codecs import Undecodable, make_codec
from lowrank_fl.config import CodecConfig
from lowrank_fl.flower.codecs.content import CHANGES, read, wrap
from lowrank_fl.flower.codecs.downlink import Sent
from lowrank_fl.packing import Layout


def decode_reply(reply: Message, sent: Mapping[str, Sent], config: CodecConfig) -> Message:
    """The reply as if the client had received the strategy's own model: that model with the client's change added.

    A lossy downlink then costs the server's model nothing (the preserved model of Philippenko and Dieuleveut, 2021,
    https://arxiv.org/abs/2102.12528), and what topk has not sent yet is not lost. A reply that cannot be decoded
    becomes an error that says why.

    sent: what the client was sent, by the names of its records.
    """
    if reply.has_error():
        return reply
    records = reply.content.array_records
    try:
        decoded = {key: _decode(key, record, sent[key], config) for key, record in records.items() if key in sent}
    except Undecodable as error:
        reason = f"its reply does not decode as {config.up} (codec.up): {error}"
        # Flower's own way to rebuild a message it has received; its stubs leave it out.
        return Message(  # pyright: ignore[reportCallIssue]
            error=Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), metadata=reply.metadata
        )
    reply.content = RecordDict({**reply.content, **decoded})
    return reply


def _decode(key: str, record: flwr.app.ArrayRecord, sent: Sent, config: CodecConfig) -> flwr.app.ArrayRecord:
    arrays, layout = read(record), sent.layout
    if config.up == "none":
        if key in CHANGES or sent.received is sent.model or Layout.of(arrays) != layout:
            return record  # other arrays than were sent are for the screening to refuse
        change, kept = layout.flat(arrays) - sent.received, arrays
    else:
        change, kept = make_codec(config.up, config).decode(arrays, layout.sizes), arrays
    return wrap(layout.arrays(change if key in CHANGES else sent.model + change, kept))
