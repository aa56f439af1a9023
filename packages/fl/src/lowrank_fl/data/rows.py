"""Which rows are kept, and which are held out for testing."""

import numpy as np

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
