"""Composed weights against the plain formula, and the ranks they reach (FedPara, Figure 6)."""

import hypothesis.strategies as st
import pytest
import torch
from formulas import plain_weight
from hypothesis import HealthCheck, given, settings

from lowrank_core.factorizations import Factorization, Hadamard, Kronecker, LowRank, Svd, num_parameters

pytestmark = pytest.mark.usefixtures("on_device")

FACTORIZATIONS = [LowRank(), Hadamard(), Hadamard(tanh=True), Hadamard(plus_one=True), Svd(), Kronecker()]
SHAPES = [(5, 7), (7, 5), (6, 4, 1, 1), (6, 4, 3, 3), (4, 6, 3, 2), (1, 1, 3, 3), (3, 1)]


def random_factors(factorization: Factorization, shape: tuple[int, ...], rank: int) -> dict[str, torch.Tensor]:
    shapes = factorization.shapes(shape, rank)
    return {name: torch.randn(s, dtype=torch.float64, requires_grad=True) for name, s in shapes.items()}


@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_composing_gives_the_plain_formula_and_its_gradients(factorization, shape, rank):
    factors = random_factors(factorization, shape, rank)
    fast = factorization.compose(factors, shape)
    plain = plain_weight(factorization, factors, shape)
    assert fast.shape == shape
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(shape, dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(fast, list(factors.values()), upstream),
        torch.autograd.grad(plain, list(factors.values()), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 9),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (2, 3)]),
    rank=st.integers(1, 4),
    factorization=st.sampled_from(FACTORIZATIONS),
)
# Every example is made on the device that the test was given.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_shape_composes_and_counts_what_its_factors_hold(outputs, inputs, kernel, rank, factorization):
    shape = (outputs, inputs, *kernel)
    factors = random_factors(factorization, shape, rank)
    torch.testing.assert_close(factorization.compose(factors, shape), plain_weight(factorization, factors, shape))
    assert sum(f.numel() for f in factors.values()) == num_parameters(factorization, shape, rank)


def test_the_example_of_the_paper_has_its_numbers_of_parameters():
    # Table 1: a 256 x 256 layer, R = 16; FedPara 16K of 66K, for a 3x3 kernel 21K of 590K.
    assert num_parameters(Hadamard(), (256, 256), 16) == 16_384
    assert num_parameters(Hadamard(), (256, 256, 3, 3), 16) == 20_992


def test_hadamard_reaches_rank_squared_in_every_one_of_a_thousand_draws():
    # Figure 6 has 100 x 100 and R = 10; a third of that is as telling, and the figure's own size follows below.
    side, rank = 36, 6
    x1, y1, x2, y2 = torch.randn(4, 1000, side, rank, dtype=torch.float64)
    assert (torch.linalg.matrix_rank((x1 @ y1.mT) * (x2 @ y2.mT)) == side).all()
    assert Hadamard().reachable_rank((side, side), rank) == side


@pytest.mark.slow
def test_figure_6():
    x1, y1, x2, y2 = torch.randn(4, 1000, 100, 10, dtype=torch.float64)
    assert (torch.linalg.matrix_rank((x1 @ y1.mT) * (x2 @ y2.mT)) == 100).all()


@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=str)
@pytest.mark.parametrize("shape", [(30, 40), (40, 12, 3, 3)], ids=str)
def test_the_reachable_rank_is_the_numerical_rank_of_a_random_draw(factorization, shape):
    factors = random_factors(factorization, shape, 4)
    weight = factorization.compose(factors, shape).detach().flatten(1)
    assert torch.linalg.matrix_rank(weight) == factorization.reachable_rank(shape, 4)


def test_tanh_and_plus_one_exclude_each_other():
    with pytest.raises(ValueError, match="tanh and plus_one exclude each other: pFedPara has no tanh variant"):
        Hadamard(tanh=True, plus_one=True)
