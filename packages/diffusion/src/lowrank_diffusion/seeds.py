"""Where every random number of a run comes from: the run's seed and the name of the place it is used in."""

from typing import Literal

import numpy as np

Purpose = Literal[
    "order",
    "noise",
    "time",
    "caption",
    "crop",
    "vae",
    "split",
    "sample",
    "validation",
    "flip",
    "max_images",
    "adapter",
    "dropout",
    "prior",
    "pivotal",
]
_PURPOSES: dict[Purpose, int] = {
    "order": 0,
    "noise": 1,
    "time": 2,
    "caption": 3,
    "crop": 4,
    "vae": 5,
    "split": 6,
    "sample": 7,
    "validation": 8,
    "flip": 9,
    "max_images": 10,
    "adapter": 11,
    "dropout": 12,
    "prior": 13,
    "pivotal": 14,
}


def derive_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """A 63-bit seed for one purpose, independent of every other; in training the counters are step and example.

    It depends on nothing else, so how a batch is split, and over how many processes, changes no number.
    """
    state = np.random.SeedSequence([seed, _PURPOSES[purpose], *counters]).generate_state(1, np.uint64)
    return int(state[0]) >> 1  # torch takes 64 bits, Python's and NumPy's older generators 63
