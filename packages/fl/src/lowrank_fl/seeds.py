"""Where every random number of a run comes from: the run's seed and the name of the place it is used in."""

from typing import Literal

import numpy as np

Purpose = Literal[
    "model",
    "partition",
    "sampling",
    "client",
    "data",
    "held_out",
    "codec",
    "personal",
    "server_codec",
    "test",
    "adapter",
    "update",
    "noise",
    "failures",
    "attack",
]
_PURPOSES: dict[Purpose, int] = {
    "model": 0,
    "partition": 1,
    "sampling": 2,
    "client": 3,
    "data": 4,
    "held_out": 5,
    "codec": 6,
    "personal": 7,
    "server_codec": 8,
    "test": 9,
    "adapter": 10,
    "update": 11,
    "noise": 12,
    "failures": 13,
    "attack": 14,
}


def derive_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """A 64-bit seed for one purpose, independent of every other; for a client the counters are round and client.

    It depends on nothing else, so the order in which clients run, and where, changes no number.
    """
    state = np.random.SeedSequence([seed, _PURPOSES[purpose], *counters]).generate_state(1, np.uint64)
    return int(state[0]) >> 1  # torch takes 64 bits, Python's and NumPy's older generators 63
