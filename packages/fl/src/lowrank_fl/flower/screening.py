"""Replies that no server should average: errors, other arrays than were sent, numbers that are none."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from flwr.app import Message

from lowrank_fl.codecs import Undecodable
from lowrank_fl.flower.codecs.content import read
from lowrank_fl.flower.grid import client_of
from lowrank_fl.packing import Arrays


def screen(
    replies: Sequence[Message],
    messages: Sequence[Message],
    fault: Callable[[Message, Message], str | None] | None = None,
) -> tuple[list[Message], dict[int, str]]:
    """The replies that can be used, in their order; and why the other clients' cannot, or that none came.

    fault: what is wrong with a reply that is no error, given the message it answers; that of training if not given.
    """
    sent = {message.metadata.dst_node_id: message for message in messages}
    sound: list[Message] = []
    dropped: dict[int, str] = {}
    answered: set[int] = set()
    for reply in replies:
        node = reply.metadata.src_node_id
        if node not in sent or node in answered:
            continue  # nobody asked, or nobody asked twice
        answered.add(node)
        if reply.has_error():
            reason = reply.error.reason or f"error code {reply.error.code}"
        else:
            reason = (fault or _fault)(reply, sent[node])
        if reason:
            dropped[client_of(node)] = reason
        else:
            sound.append(reply)
    for node in sent.keys() - answered:
        dropped[client_of(node)] = "no reply came"
    return sound, dropped


def _fault(reply: Message, message: Message) -> str | None:
    expected, given = message.content.array_records, reply.content.array_records
    if list(given) != list(expected):
        return f"it sent the arrays {', '.join(given) or 'none'} instead of {', '.join(expected)}"
    metrics = reply.content.metric_records.get("metrics")
    weight = metrics.get("num-examples") if metrics else None
    if not isinstance(weight, int | float) or not weight > 0:
        return f"it reports {weight} examples"
    for key, record in given.items():
        like = expected[key]
        if list(record) != list(like):
            return f"the arrays of {key} have other names than were sent"
        try:
            arrays = read(record)
        except Undecodable as error:
            return f"{key}/{error}"
        for name, values in arrays.items():
            if values.shape != tuple(like[name].shape) or str(values.dtype) != like[name].dtype:
                return f"{key}/{name} is {values.dtype} {values.shape}, not {like[name].dtype} {like[name].shape}"
        if not _finite(arrays):
            return f"{key} holds numbers that are not finite"
    return None


def _finite(arrays: Arrays) -> bool:
    for values in arrays.values():
        if not np.issubdtype(values.dtype, np.floating):
            continue
        # A sum is several times cheaper than looking at every number, and finite if all of them are, overflow aside.
        total = torch.from_numpy(values).sum() if values.flags.writeable else torch.tensor(values).sum()
        if not bool(torch.isfinite(total)) and not bool(np.isfinite(values).all()):
            return False
    return True
