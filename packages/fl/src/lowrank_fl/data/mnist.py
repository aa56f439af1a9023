"""MNIST and EMNIST through torchvision, which reads their IDX files."""

from typing import Any

import numpy as np

from lowrank_fl.config import DataConfig
from lowrank_fl.data.cache import cache_folder, download
from lowrank_fl.data.examples import Examples
from lowrank_fl.data.pixels import picture_examples
from lowrank_fl.data.rows import kept_rows


def load_mnist(data: DataConfig, seed: int) -> Examples:
    """Pixels `(n, 1, 28, 28)`: MNIST's 10 digits, or EMNIST's `byclass` split of 62 digits and letters.

    References: LeCun et al., http://yann.lecun.com/exdb/mnist; Cohen et al., EMNIST, 2017,
    https://arxiv.org/abs/1702.05373

    Raises:
        LowrankError: the download fails.
    """
    # torchvision takes seconds to import.
    from torchvision.datasets import EMNIST, MNIST

    options: dict[str, Any] = {"split": "byclass"} if data.name == "emnist" else {}
    published = EMNIST if data.name == "emnist" else MNIST
    url = EMNIST.url if data.name == "emnist" else MNIST.mirrors[0]
    folder = cache_folder()
    try:
        splits = [published(folder, train=train, **options) for train in (True, False)]
    # torchvision's way to say that the files are not there.
    except RuntimeError:
        with download(data.name, url, folder):
            splits = [published(folder, train=train, download=True, **options) for train in (True, False)]

    train, test = ((split.data.numpy()[:, None], split.targets.numpy()) for split in splits)
    if data.name == "emnist":
        # EMNIST's files hold every picture transposed.
        train, test = ((np.swapaxes(pixels, 2, 3), labels) for pixels, labels in (train, test))
    kept = kept_rows(len(train[1]), data.max_examples, seed)
    # MNIST's classes read "7 - seven".
    classes = tuple(name.split(" - ")[0] for name in splits[0].classes)
    return picture_examples(data.name, (train[0][kept], train[1][kept]), test, classes)
