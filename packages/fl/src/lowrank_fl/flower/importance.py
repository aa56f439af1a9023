"""The importances of AdaLoRA's directions as a record of a reply."""

import numpy as np
from flwr.app import Message, RecordDict

from lowrank_fl.codecs import Undecodable
from lowrank_fl.flower.codecs.content import read
from lowrank_fl.flower.records import array_records, to_arrays

IMPORTANCE, SCORES = "importance", "scores"
"""The record of a reply, and its one array: float32 `(directions,)`, layer after layer. No codec touches it."""


def importance_fault(reply: Message, directions: int) -> str | None:
    """What is wrong with a reply's importances, which are to be of so many directions."""
    record = array_records(reply.content)[IMPORTANCE]
    if list(record) != [SCORES]:
        return f"the arrays of {IMPORTANCE} have other names than {SCORES}"
    try:
        found = read(record)[SCORES]
    except Undecodable as error:
        return f"{IMPORTANCE}/{error}"
    if found.dtype != np.float32 or found.shape != (directions,):
        return f"{IMPORTANCE} is {found.dtype} {found.shape}, not float32 ({directions},)"
    if not bool(((found >= 0) & np.isfinite(found)).all()):
        return f"{IMPORTANCE} holds numbers that are negative or not finite"
    return None


def take_importance(reply: Message) -> np.ndarray:
    """Take the importances out of a sound reply, in which a strategy expects the model's arrays alone."""
    scores = to_arrays(array_records(reply.content)[IMPORTANCE])[SCORES]
    reply.content = RecordDict({key: record for key, record in reply.content.items() if key != IMPORTANCE})
    return scores
