"""scikit-learn's handwritten digits: 1,797 real pictures of 8x8 that need no download."""

from typing import Any

import numpy as np

from lowrank_fl.config import DataConfig
from lowrank_fl.data.examples import Examples
from lowrank_fl.data.pixels import picture_examples
from lowrank_fl.data.rows import held_out, kept_rows


def load_digits(data: DataConfig, seed: int) -> Examples:
    """Pixels `(n, 1, 8, 8)` in scikit-learn's units, 0 to 16; 1,442 for training, 355 for testing.

    Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998,
    https://doi.org/10.24432/C50P49
    """
    # scikit-learn takes a second to import.
    from sklearn.datasets import load_digits as scikit_digits

    # Its type depends on its arguments in a way that no checker follows.
    digits: Any = scikit_digits()
    pixels = digits.images.astype(np.uint8)[:, None]
    test = held_out(digits.target)
    train = np.flatnonzero(~test)
    train = train[kept_rows(len(train), data.max_examples, seed)]
    return picture_examples(
        data.name,
        (pixels[train], digits.target[train]),
        (pixels[test], digits.target[test]),
        tuple(str(name) for name in digits.target_names),
        white=16,
    )
