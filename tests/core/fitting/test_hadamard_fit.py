"""Factors of a given Hadamard product found again, and what is as near to any other matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.fitting import fit_hadamard
from lowrank_core.fitting.gauss_newton import improve, product
from lowrank_core.fitting.low_rank import leading, truncated, whole_pair
from lowrank_core.fitting.span import as_real


def known(rows, columns, rank, seed, uniform=False):
    """A1, B1, A2, B2."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, rank), (rank, columns)] * 2
    if not uniform:
        return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    # As PEFT starts a LoHa.
    return [
        (2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1) / math.sqrt(shape[1]) for shape in shapes
    ]


def composed(fit):
    return product((fit.a1, fit.b1, fit.a2, fit.b2))


def off(target, fit):
    return float((target - composed(fit)).norm() / target.norm())


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(1, 7, 1), (12, 30, 1), (16, 16, 2), (24, 40, 2), (8, 9 * 8, 2), (48, 64, 3)],
)
def test_a_known_product_is_found_again(rows, columns, rank, uniform):
    for seed in range(2):
        target = product(known(rows, columns, rank, seed, uniform))
        fit = fit_hadamard(target, rank)
        assert off(target, fit) < 1e-6
        assert fit.error == pytest.approx(off(target, fit), abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns", "rank"), [(160, 160, 4), (320, 2880, 4), (64, 64, 4)])
def test_a_larger_one_too(rows, columns, rank):
    target = product(known(rows, columns, rank, 0))
    assert off(target, fit_hadamard(target, rank)) < 1e-6


@pytest.mark.slow
def test_where_r2_is_no_less_than_a_side_it_is_found_again_too():
    target = product(known(30, 4, 2, 0))
    assert off(target, fit_hadamard(target, 2)) < 1e-6


def test_noise_is_left_over():
    generator = torch.Generator().manual_seed(1)
    clean = product(known(48, 40, 2, 0))
    noise = torch.randn(48, 40, dtype=torch.float64, generator=generator) * 0.01 * clean.square().mean().sqrt()
    fit = fit_hadamard(clean + noise, 2)
    assert off(clean + noise, fit) < 0.01
    # Most of the noise is in no direction that the factors have.
    assert off(clean, fit) < 0.006


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 3),
    power=st.floats(-6, 6),
    seed=st.integers(0, 2**32),
)
def test_any_matrix_is_met_as_nearly_as_by_its_best_approximation_of_that_rank(rows, columns, rank, power, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, columns, dtype=torch.float64, generator=generator) * 10**power
    fit = fit_hadamard(target, rank)
    values = torch.linalg.svdvals(target)
    best = float(values[rank:].square().sum().sqrt() / values.norm())
    assert off(target, fit) <= best + 1e-7
    assert [tuple(factor.shape) for factor in (fit.a1, fit.b1)] == [(rows, rank), (rank, columns)]
    assert fit.error == pytest.approx(off(target, fit), abs=1e-7)


@pytest.mark.slow
def test_a_matrix_of_no_structure_is_met_better_than_by_its_best_approximation_of_that_rank():
    target = torch.randn(30, 20, dtype=torch.float64)
    values = torch.linalg.svdvals(target)
    assert off(target, fit_hadamard(target, 3)) < float(values[3:].square().sum().sqrt() / values.norm())


def test_the_factors_share_the_size_evenly():
    target = product(known(30, 20, 2, 0)) * 1e8
    fit = fit_hadamard(target, 2)
    sizes = [float(factor.norm()) for factor in (fit.a1, fit.b1, fit.a2, fit.b2)]
    assert sizes[0] == pytest.approx(sizes[1])
    assert sizes[2] == pytest.approx(sizes[3])
    assert float((fit.a1 @ fit.b1).norm()) == pytest.approx(float((fit.a2 @ fit.b2).norm()))


def test_the_same_seed_gives_the_same_factors():
    target = product(known(30, 20, 2, 0))
    one, two, other = (fit_hadamard(target, 2, seed=seed) for seed in (3, 3, 4))
    torch.testing.assert_close(one.a1, two.a1, rtol=0, atol=1e-9)
    assert not torch.allclose(one.a1, other.a1)


def test_nothing_is_fitted_by_nothing():
    fit = fit_hadamard(torch.zeros(5, 6), 2)
    assert fit.error == 0
    assert not composed(fit).any()


def test_a_step_is_never_for_the_worse_and_its_forecast_is_that_of_the_linear_problem():
    target = torch.randn(12, 9, dtype=torch.float64)
    pair = known(12, 9, 2, 5)
    errors = [improve(target, pair, steps=steps, good=0, least_gain=0)[1] for steps in range(6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_at_its_end_the_gradient_by_autograd_is_zero():
    target = torch.randn(8, 6, dtype=torch.float64)
    start = known(8, 6, 1, 5)
    end, error = improve(target, start, steps=60, good=0, least_gain=1e-12)

    def slope(pair):
        leaves = [factor.clone().requires_grad_() for factor in pair]
        loss = (target - product(leaves)).square().sum()
        loss.backward()
        return float(loss.detach()), max(float(leaf.grad.norm() * leaf.detach().norm()) for leaf in leaves)

    loss, steepest = slope(end)
    assert loss == pytest.approx(error**2 * float(target.square().sum()))
    assert steepest < 1e-4 * slope(start)[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_step_is_the_damped_least_squares_step_of_the_whole_jacobian(dtype):
    from lowrank_core.fitting.gauss_newton import _step

    pair = tuple(torch.randn(shape, dtype=dtype) for shape in ((5, 2), (2, 4), (5, 2), (2, 4)))
    left = torch.randn(5, 4, dtype=dtype)
    sizes = [factor.numel() for factor in pair]
    # The product is linear in each factor, so its Jacobian is its differences.
    columns = []
    for number, factor in enumerate(pair):
        for place in range(factor.numel()):
            unit = torch.zeros(factor.numel(), dtype=dtype)
            unit[place] = 1
            moved = [*pair[:number], factor + unit.view(factor.shape), *pair[number + 1 :]]
            columns.append((product(moved) - product(pair)).flatten())
    jacobian = torch.stack(columns, 1)
    normal = jacobian.mH @ jacobian
    diagonal = normal.diagonal().real.split(sizes)
    rows, others = torch.cat([diagonal[0], diagonal[2]]).mean(), torch.cat([diagonal[1], diagonal[3]]).mean()
    damping = torch.cat([torch.full((size,), float(d)) for size, d in zip(sizes, (rows, others) * 2, strict=True)])
    exact = torch.linalg.solve(normal + 0.5 * damping.diag().to(dtype), jacobian.mH @ left.flatten())
    change, foretold = _step(pair, left, 0.5)
    found = torch.cat([each.flatten() for each in change])
    # Conjugate gradients stop at a hundredth.
    assert float((found - exact).norm() / exact.norm()) < 0.03
    assert foretold == pytest.approx(float((left.flatten() - jacobian @ found).abs().square().sum()))


def test_complex_factors_of_a_real_product_become_real_ones():
    pair = known(20, 15, 2, 0)
    a1, b1, a2, b2 = (factor.to(torch.complex128) for factor in pair)
    rows = torch.polar(torch.ones(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64))
    columns = torch.polar(torch.ones(15, dtype=torch.float64), torch.randn(15, dtype=torch.float64))
    basis = torch.randn(2, 2, dtype=torch.complex128)
    turned = (a1 * rows[:, None] @ basis, basis.inverse() @ b1 * columns, a2 / rows[:, None], b2 / columns)
    real = as_real(turned)
    assert not any(factor.is_complex() for factor in real)
    torch.testing.assert_close(product(real), product(pair))


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (7, 5)])
def test_leading_vectors_span_a_matrix_of_that_rank(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 3, dtype=torch.float64) @ torch.randn(3, shape[1], dtype=torch.float64)
    basis = leading(matrix, 3, generator)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(basis @ (basis.T @ matrix), matrix)


def test_a_whole_matrix_is_cut_off_as_its_singular_values_say():
    for shape in ((9, 5), (5, 9)):
        matrix = torch.randn(shape, dtype=torch.float64)
        up, down, kept, lost = truncated(*whole_pair(matrix), 2)
        energies = torch.linalg.svdvals(matrix).square()
        assert (kept, lost) == pytest.approx((float(energies[:2].sum()), float(energies[2:].sum())))
        assert float((matrix - up @ down).square().sum()) == pytest.approx(lost)
