"""Labels as they stand in a column, numbered from 0 without gaps."""

from typing import Any

import numpy as np

from lowrank_core.errors import LowrankError


def number_classes(
    train: list[Any], test: list[Any], names: list[str] | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Train labels, test labels (int64) and the classes' names, in ascending order of what stood there.

    `names` are a ClassLabel's. The classes are those that occur in training: a column may name 62
    characters and hold ten digits, and a model should have no outputs that nothing trains.

    Example: `number_classes([7, 3, 7], [3], None)` is `[1, 0, 1], [0], ("3", "7")`.

    Raises:
        LowrankError: a row has no label, or a test label never occurs in training.
    """
    for split, labels in (("train", train), ("test", test)):
        for row, label in enumerate(labels):
            # -1 is how a ClassLabel says that a row's label is withheld.
            if label is None or (names is not None and label < 0):
                raise LowrankError(
                    f"row {row} of the {split} split has no label; remove the rows without labels, "
                    "or name another column as data.label_key"
                )
    present = sorted(set(train))
    name_of = {value: names[value] if names is not None else str(value) for value in present}
    unseen = sorted(set(test) - set(present))
    if unseen:
        said = ", ".join(names[value] if names is not None else str(value) for value in unseen[:5])
        raise LowrankError(
            f"the test split has {len(unseen)} classes that no training example has ({said}); "
            "both splits must hold the same classes"
        )
    number = {value: index for index, value in enumerate(present)}
    train_labels, test_labels = (
        np.fromiter((number[label] for label in labels), dtype=np.int64, count=len(labels)) for labels in (train, test)
    )
    return train_labels, test_labels, tuple(name_of[value] for value in present)
