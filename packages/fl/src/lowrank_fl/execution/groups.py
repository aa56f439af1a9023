"""Which clients of a round are handed to a process together."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def grouped(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """The items in their order, in groups of at most so many and of nearly one size.

    Who trains together never depends on the number of workers, because it can change the last bits of what comes of it.
    """
    count = -(-len(items) // most)
    bounds = [len(items) * number // count for number in range(count + 1)] if count else [0]
    return [items[start:stop] for start, stop in itertools.pairwise(bounds)]
