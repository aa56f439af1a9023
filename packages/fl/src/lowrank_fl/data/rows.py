"""Which rows are kept, and which are held out for testing."""

from collections.abc import Sequence

import numpy as np

from lowrank_core.errors import LowrankError, UsageError
from lowrank_fl.data.examples import Examples

# A number of its own, so that these draws are not the first draws of another use of the seed.
_STREAM = 1


def kept_rows(rows: int, max_examples: int | None, seed: int) -> np.ndarray:
    """Row numbers, ascending, of a random `max_examples` out of `rows`; all of them when it is None.

    The choice depends on the arguments alone.
    """
    if max_examples is None or max_examples >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng([seed, _STREAM]).permutation(rows)[:max_examples])


def held_out(labels: np.ndarray, every: int = 5) -> np.ndarray:
    """Boolean `(n,)`: every fifth example of each class, in row order, is for testing.

    So the split is stratified, near 80/20, and the same for every seed and every release of
    every library.
    """
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[every - 1 :: every]] = True
    return test


def of_classes(examples: Examples, classes: Sequence[int | str]) -> Examples:
    """The training and test examples of these classes alone, by number or by name; labels keep their numbers.

    Raises:
        UsageError: the data set does not have one of these classes.
        LowrankError: there are test examples, and none of them is of these classes.
    """
    numbers: list[int] = []
    for wanted in classes:
        number = examples.classes.index(wanted) if wanted in examples.classes else wanted
        if not isinstance(number, int) or number >= len(examples.classes):
            last = len(examples.classes) - 1
            raise UsageError(
                f"data.classes names {wanted!r}, and {examples.name} has the classes 0 to {last}, "
                f"{examples.classes[0]!r} to {examples.classes[last]!r}; name some of these, by number or by name"
            )
        numbers.append(number)
    kept = examples.chosen(np.isin(examples.labels, numbers), np.isin(examples.test_labels, numbers))
    if len(examples.test_labels) and not len(kept.test_labels):
        raise LowrankError(
            f"no test example of {examples.name} is of the classes {list(classes)} (data.classes); add some"
        )
    return kept
