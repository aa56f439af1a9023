"""The rank rules against the authors' notebook, hand-sized numbers and their own definitions."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lowrank_core import FixedRank, Gamma, Ratio, UsageError
from lowrank_core.factorizations import Hadamard, Kronecker, LowRank, Svd, num_parameters
from lowrank_core.ranks import largest_rank, parse_budget, rank_for, smallest_rank

SHAPES = st.one_of(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 300), st.integers(1, 300), st.just(3), st.just(3)),
)


@pytest.mark.parametrize(
    ("ratio", "parameters"), [(0.1, 60192), (0.3, 178050), (0.5, 296434), (0.7, 414792), (0.9, 533192)]
)
def test_ratio_gives_the_notebooks_numbers_for_its_256_channel_convolution(ratio, parameters):
    shape = (256, 256, 3, 3)
    assert num_parameters(Hadamard(), shape, Ratio(ratio)(shape)) == parameters


def test_gamma_gives_the_paper_mlps_ranks():
    # 784-256: r_min 16, r_max 96, halfway 56. 256-62: r_min 8, r_max 24, halfway 16.
    assert Gamma(0.5)((256, 784)) == 56
    assert Gamma(0.5)((62, 256)) == 16


@given(SHAPES, st.integers(1, 10**6))
def test_the_largest_rank_fits_and_the_next_does_not(shape, parameters):
    for factorization in (Hadamard(), LowRank(), Svd(), Kronecker()):
        rank = largest_rank(shape, parameters, factorization)
        assert rank == 0 or num_parameters(factorization, shape, rank) <= parameters
        assert num_parameters(factorization, shape, rank + 1) > parameters


@given(SHAPES)
def test_gamma_runs_from_the_smallest_rank_to_the_largest(shape):
    assert Gamma(0.0)(shape) == smallest_rank(shape)
    assert Gamma(1.0)(shape) == max(1, largest_rank(shape, math.prod(shape), Hadamard()))


@given(SHAPES)
def test_the_smallest_rank_squared_covers_the_smaller_side(shape):
    rank, side = smallest_rank(shape), min(shape[:2])
    assert rank**2 >= side > (rank - 1) ** 2


@given(SHAPES, st.floats(0, 1), st.sampled_from([LowRank(), Svd(), Kronecker()]))
def test_other_factors_cost_what_fedparas_cost_as_nearly_as_a_whole_rank_allows(shape, gamma, other):
    target = num_parameters(Hadamard(), shape, rank_for(Gamma(gamma), Hadamard(), shape))
    rank = rank_for(Gamma(gamma), other, shape)
    distance = abs(num_parameters(other, shape, rank) - target)
    for near in (rank - 1, rank + 1):
        assert near < 1 or distance <= abs(num_parameters(other, shape, near) - target)


def test_a_fixed_rank_is_the_same_for_every_factorization():
    assert rank_for(FixedRank(7), LowRank(), (64, 64)) == rank_for(FixedRank(7), Hadamard(), (64, 64)) == 7


@pytest.mark.parametrize(
    ("budget", "parameters"),
    [(1000, 1000), ("1000", 1000), ("1.5M", 1_500_000), ("6MB", 1_500_000), ("2kb", 500), ("1 G", 10**9)],
)
def test_budgets_read_as_parameters_or_as_bytes_of_four_each(budget, parameters):
    assert parse_budget(budget) == parameters


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gamma(1.5), "gamma must lie between 0 and 1, got 1.5"),
        (lambda: Ratio(-0.1), "ratio must lie between 0 and 1, got -0.1"),
        (lambda: FixedRank(0), "rank must be at least 1, got 0"),
        (lambda: parse_budget("lots"), "budget 'lots' is neither a number of parameters"),
        (lambda: parse_budget("5 MBM"), "budget '5 MBM' is neither a number of parameters"),
        (lambda: parse_budget("3B"), "budget must be at least one parameter, got '3B'"),
    ],
)
def test_rules_refuse_what_they_cannot_mean(call, message):
    with pytest.raises(UsageError, match=message):
        call()
