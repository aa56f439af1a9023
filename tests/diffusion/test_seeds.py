"""Every place draws its own numbers."""

import itertools
from typing import get_args

from lowrank_diffusion.seeds import Purpose, derive_seed


def test_purposes_counters_and_seeds_are_independent():
    # One number of counters, as each purpose has: a counter that is left out counts as 0.
    places = list(itertools.product((0, 1, 2**32 - 1), get_args(Purpose), itertools.product(range(3), repeat=2)))
    drawn = {derive_seed(seed, purpose, *counters) for seed, purpose, counters in places}
    assert len(drawn) == len(places)
    assert all(0 <= number < 2**63 for number in drawn)


def test_it_depends_on_nothing_else():
    assert derive_seed(3, "noise", 7, 1) == derive_seed(3, "noise", 7, 1)
