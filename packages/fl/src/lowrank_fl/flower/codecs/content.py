"""How encoded arrays lie in a message's content."""

import flwr.app
import numpy as np

from lowrank_fl.codecs import Undecodable
from lowrank_fl.flower.records import Array
from lowrank_fl.packing import Arrays

CHANGES = frozenset({"control"})
"""The records of a reply that are changes already; in every other, codecs encode the change of what was received."""

HOW = "codec"
"""The ConfigRecord of a message whose arrays are encoded: the codec's name as `down`, the `version` of the model,
under topk the version that the client holds as `held` (0 if the server counts on none), and each record's layout
under LAYOUT and its name."""
LAYOUT = "layout/"


def read(record: flwr.app.ArrayRecord) -> dict[str, np.ndarray]:
    """The arrays of a record that anyone may have sent.

    Raises:
        Undecodable: one of them is not what it says it is.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, array in record.items():
        try:
            arrays[name] = array.numpy()
        except Exception as error:  # whatever NumPy makes of the bytes
            raise Undecodable(f"{name} cannot be read ({error})") from None
    return arrays


def wrap(arrays: Arrays) -> flwr.app.ArrayRecord:
    """The arrays as a Flower record, without a copy."""
    record = flwr.app.ArrayRecord()
    for name, values in arrays.items():
        record[name] = Array(values)
    return record
