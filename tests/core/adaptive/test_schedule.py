"""The budget's schedule against the authors' formula, and what a schedule cannot be."""

import pytest

from lowrank_core.adapters.config import AdaLoRA
from lowrank_core.adaptive import AdaptiveRank
from lowrank_core.adaptive.schedule import Schedule
from lowrank_core.errors import UsageError


def test_shares_of_a_run_become_its_steps():
    schedule = Schedule.of(AdaptiveRank(target_rank=2, warmup=0.1, settle=0.5, every=5), 200, initial=24, layers=6)
    assert schedule == Schedule(initial=24, target=12, begin=20, end=100, every=5)


@pytest.mark.parametrize(("begin", "end", "total"), [(20, 100, 200), (0, 37, 50), (3, 4, 4)])
def test_the_budget_falls_by_the_authors_cubic(begin, end, total):
    schedule = Schedule(initial=96, target=31, begin=begin, end=end, every=1)
    for step in range(total + 1):
        if step <= begin:
            expected = 96
        elif step > end:
            expected = 31
        else:
            expected = int((96 - 31) * (1 - (step - begin) / (end - begin)) ** 3 + 31)
        assert schedule.budget(step) == expected


def test_ranks_are_allocated_every_so_many_steps_and_at_the_end_of_the_fall():
    schedule = Schedule(initial=8, target=4, begin=3, end=11, every=4)
    assert [step for step in range(20) if schedule.allocates(step)] == [4, 8, 11]
    never = Schedule(initial=4, target=4, begin=3, end=11, every=4)
    assert not any(never.allocates(step) for step in range(20))


def test_an_adaloras_configuration_says_the_same():
    config = AdaLoRA(rank=6, target_rank=3, warmup=0.2, settle=0.3, every=2, orthogonality=0.1, target_modules=["q"])
    assert AdaptiveRank.of(config) == AdaptiveRank(target_rank=3, warmup=0.2, settle=0.3, every=2, orthogonality=0.1)


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        ({"target_rank": 5}, 100, "target_rank 5 over 3 layers is a budget of 15, but their ranks start at 12"),
        ({"warmup": 0.5, "settle": 0.49}, 10, "10 steps leave none between a warmup of 5 and the 5 to settle"),
        ({"settle": 0.5}, 3, "of 3 steps, 2 to settle leave only the first, and importance is known after it"),
        ({}, -1, "total_steps must be a whole number of optimizer steps, at least 2, got -1; give the length"),
        ({}, 1, "at least 2, got 1"),
        ({}, 100.0, "at least 2, got 100.0"),
        ({}, True, "at least 2, got True"),
        ({"every": 50}, 100, "every 50 steps never comes within the 40 in which ranks fall; lower every"),
    ],
)
def test_schedules_that_the_run_has_no_steps_for_are_refused(config, steps, message):
    with pytest.raises(UsageError, match=message):
        Schedule.of(AdaptiveRank(**{"target_rank": 2, **config}), steps, initial=12, layers=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_rank": 0}, "target_rank must be at least 1, got 0"),
        (
            {"warmup": 0.6, "settle": 0.4},
            "warmup and settle are shares of the run that leave some of it, got 0.6 and 0.4",
        ),
        ({"settle": -0.1}, "warmup and settle are shares of the run that leave some of it, got 0.1 and -0.1"),
        ({"every": 0}, "every must be at least 1 step, got 0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.5}, r"beta2 must be in \[0, 1\), got -0.5"),
        ({"orthogonality": -1}, "orthogonality must not be negative, got -1"),
        ({"shrink_every": 0}, "shrink_every must be at least 1 step and goes with shrink, got 0 with shrink=None"),
        ({"shrink_every": 5, "shrink": False}, "goes with shrink, got 5 with shrink=False"),
    ],
)
def test_values_out_of_range_are_refused(config, message):
    with pytest.raises(UsageError, match=message):
        AdaptiveRank(**config)
