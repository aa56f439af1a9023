"""Replies that no server should average: errors, other arrays than were sent, numbers that are none."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import flwr.app
import numpy as np
import torch
from flwr.app import Message

from lowrank_core import LowrankError
from lowrank_fl.codecs import Undecodable
from lowrank_fl.flower.codecs.content import read
from lowrank_fl.flower.grid import client_of
from lowrank_fl.flower.importance import IMPORTANCE, importance_fault
from lowrank_fl.flower.records import array_records
from lowrank_fl.packing import Arrays

Fault = Callable[[Message, Message], str | None]
"""What is wrong with a reply that is no error, given the message it answers."""

_EXAMPLES = "num-examples"
_LONGEST_REASON = 300


def screen(
    replies: Sequence[Message], messages: Sequence[Message], fault: Fault | None = None
) -> tuple[list[Message], dict[int, str]]:
    """The replies that can be used, in their order; and why the other clients' cannot, or that none came.

    fault: `training_fault()` if not given.
    """
    fault = fault or training_fault()
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
            reason = fault(reply, sent[node])
        if reason:
            dropped[client_of(node)] = _shortened(reason)
        else:
            sound.append(reply)
    for node in sent.keys() - answered:
        dropped[client_of(node)] = "no reply came"
    return sound, dropped


def check_dropped(dropped: Mapping[int, str], asked: int, tolerated: float, task: str) -> None:
    """See that enough clients are left.

    asked: how many clients were asked.
    tolerated: the share of them that may be dropped; never all.
    task: what a dropped client cannot do, after "cannot".

    Raises:
        LowrankError: more were dropped.
    """
    if not dropped or (len(dropped) <= tolerated * asked and len(dropped) < asked):
        return
    client, reason = next(iter(dropped.items()))
    if len(dropped) <= tolerated * asked:
        raise LowrankError(f"no client can {task}; client {client}: {reason}")
    others = f" (and {len(dropped) - 1} more)" if len(dropped) > 1 else ""
    raise LowrankError(
        f"client {client}{others} cannot {task}: {reason}; "
        "raise federation.tolerated_failures to go on without such clients"
    )


def training_fault(
    examples: Sequence[int] | None = None,
    returned: Collection[str] | None = None,
    directions: int | None = None,
    metrics: Collection[str] = ("loss",),
) -> Fault:
    """What is wrong with a trained reply: its metrics, its arrays or their numbers.

    examples: how many each client trains on; a client that reports more would outweigh the others.
    returned: the names, among those that were sent, of the arrays that come back; all of them if not given.
    directions: how many have their importance sent beside the arrays; nothing is sent if not given.
    metrics: the names of those that it reports besides `num-examples`.
    """

    def fault(reply: Message, message: Message) -> str | None:
        try:
            count = metrics_of(reply, metrics)[_EXAMPLES]
        except LowrankError as error:
            return str(error)
        most = examples[client_of(reply.metadata.src_node_id)] if examples else None
        if most is not None and count > most:
            return f"it reports {count} examples, and has {most}"
        wrong = _array_fault(reply, message, returned, [] if directions is None else [IMPORTANCE])
        return wrong or (None if directions is None else importance_fault(reply, directions))

    return fault


def metrics_of(reply: Message, names: Collection[str]) -> dict[str, float]:
    """The metrics of a reply: `num-examples`, and finite numbers by the given names.

    Raises:
        LowrankError: it has others, or several records of them, or they are no such numbers.
    """
    records = reply.content.metric_records
    if list(records) != ["metrics"]:
        raise LowrankError(f"it sent the metric records {', '.join(records) or 'none'} instead of metrics")
    metrics = records["metrics"]
    expected = {_EXAMPLES, *names}
    if set(metrics) != expected:
        given = ", ".join(sorted(metrics)) or "nothing"
        raise LowrankError(f"it reports {given} instead of {', '.join(sorted(expected))}")
    count = metrics[_EXAMPLES]
    if type(count) is not int or count <= 0:
        raise LowrankError(f"it reports {count} examples")
    found: dict[str, float] = {_EXAMPLES: count}
    for name in names:
        value = metrics[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise LowrankError(f"it reports the {name} {value}")
        found[name] = value
    return found


def _array_fault(
    reply: Message, message: Message, returned: Collection[str] | None, added: Sequence[str]
) -> str | None:
    expected, given = array_records(message.content), array_records(reply.content)
    if list(given) != [*expected, *added]:
        return f"it sent the arrays {', '.join(given) or 'none'} instead of {', '.join([*expected, *added])}"
    for key, like in expected.items():
        record = given[key]
        if list(record) != [name for name in like if returned is None or name in returned]:
            return f"the arrays of {key} have other names than {'were sent' if returned is None else 'are due'}"
        try:
            arrays = read(record)
        except Undecodable as error:
            return f"{key}/{error}"
        for name, values in arrays.items():
            for found in (record[name], values):  # what it says it is, and what it is
                if found.dtype != like[name].dtype or tuple(found.shape) != tuple(like[name].shape):
                    return f"{key}/{name} is {_kind(found)}, not {_kind(like[name])}"
        if not finite(arrays):
            return f"{key} holds numbers that are not finite"
    return None


def _kind(array: flwr.app.Array | np.ndarray) -> str:
    return f"{array.dtype} {tuple(array.shape)}"


def finite(arrays: Arrays) -> bool:
    """Whether all floating-point numbers of the arrays are finite."""
    for values in arrays.values():
        if values.dtype.kind != "f":
            continue
        # A sum is several times cheaper than looking at every number, and finite if all of them are, overflow aside.
        total = (torch.from_numpy(values) if values.flags.writeable else torch.tensor(values)).sum().item()
        if not math.isfinite(total) and not bool(np.isfinite(values).all()):
            return False
    return True


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."
