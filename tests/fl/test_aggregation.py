"""The mathematics of averaging factors, against formulas written out: the gap, one factor at a time, refits."""

import math

import numpy as np
import pytest
import torch
from formulas import plain_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_core import factorize
from lowrank_core.factorizations import Hadamard, Kronecker, LowRank, Svd
from lowrank_fl.aggregation import FactorAggregation, trained_in_turn
from lowrank_fl.aggregation.gap import Relative, means
from lowrank_fl.aggregation.one_factor import turns
from lowrank_fl.aggregation.refit import changes, refit
from lowrank_fl.aggregation.weights import Weight, factorized_weights
from lowrank_fl.config import AggregationConfig
from lowrank_fl.state import state_of

MULTILINEAR = {
    "lowrank": LowRank(),
    "fedpara": Hadamard(),
    "pfedpara": Hadamard(plus_one=True),
    "svd": Svd(),
    "kronecker": Kronecker(),
}
SHAPES = [(9, 6), (8, 6, 1, 1), (8, 6, 3, 2)]
"""A matrix, a 1x1 kernel, which is composed as a matrix, and a kernel with a core."""


def weight_of(method, shape, rank=2):
    factorization = MULTILINEAR[method]
    return Weight("layer", factorization, shape, tuple(factorization.shapes(shape, rank)))


def draw(weight, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = weight.factorization.shapes(weight.shape, rank)
    return {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}


def shifted(factors, by, seed, only=None):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: f + by * torch.randn(f.shape, generator=generator, dtype=f.dtype) if only in (None, name) else f
        for name, f in factors.items()
    }


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(sorted(MULTILINEAR)),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (1, 4)]),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    rank=st.integers(1, 5),
    examples=st.lists(st.integers(1, 500), min_size=1, max_size=5),
    turn=st.integers(0, 11),
)
def test_where_one_factor_differs_the_mean_of_factors_composes_to_the_mean_of_weights(
    method, kernel, sizes, rank, examples, turn
):
    weight = weight_of(method, (*sizes, *kernel), rank)
    factors, name = draw(weight, rank), weight.factors[turn % len(weight.factors)]
    clients = [shifted(factors, 1.0, seed, only=name) for seed in range(len(examples))]
    shares = [count / sum(examples) for count in examples]
    mean = means(weight, zip(shares, clients, strict=True))
    expected = sum(
        p * plain_weight(weight.factorization, own, weight.shape) for p, own in zip(shares, clients, strict=True)
    )
    torch.testing.assert_close(mean.weight, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(weight.compose(mean.factors), expected, rtol=1e-11, atol=1e-11)


def test_where_two_factors_differ_it_does_not():
    weight = weight_of("fedpara", (9, 6))
    mean = means(weight, [(0.5, shifted(draw(weight), 1.0, seed)) for seed in (1, 2)])
    assert (weight.compose(mean.factors) - mean.weight).norm() > 0.1 * mean.weight.norm()


def test_of_tanh_not_even_one_factor_may_differ():
    weight = Weight("layer", Hadamard(tanh=True), (9, 6), ("x1", "y1", "x2", "y2"))
    mean = means(weight, [(0.5, shifted(draw(weight), 1.0, seed, only="x1")) for seed in (1, 2)])
    assert (weight.compose(mean.factors) - mean.weight).norm() > 0.01 * mean.weight.norm()


def small_net(method="fedpara", *, tanh=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 1), nn.Flatten(), nn.Linear(12, 5))
    factorize(net, method, rank=2, include=("0", "2"), tanh=tanh)
    return net


def test_a_turn_trains_one_factor_of_each_weight_and_all_of_the_rest():
    net = small_net()
    weights = {weight.path: weight for weight in factorized_weights(net)}
    assert {path: len(weight.factors) for path, weight in weights.items()} == {"0.weight": 6, "2.weight": 4}
    assert turns(net) == 12
    seen = dict.fromkeys(state_of(net), 0)
    for turn in range(12):
        names = trained_in_turn(net, turn)
        assert [sum(n.startswith(path) for n in names) for path in weights] == [1, 1]
        assert {"0.bias", "1.running_mean", "1.weight", "4.weight", "4.bias"} <= names
        for name in names:
            seen[name] += 1
    factors = {
        weight.name(factor): 12 // len(weight.factors) for weight in weights.values() for factor in weight.factors
    }
    assert seen == {name: factors.get(name, 12) for name in seen}


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara", "svd", "kronecker", "tanh"])
def test_the_gap_is_the_formula_written_out(method):
    net = small_net("fedpara" if method == "tanh" else method, tanh=method == "tanh")
    sent = {name: tensor.numpy().copy() for name, tensor in state_of(net).items()}
    rng = np.random.default_rng(0)
    examples = [30, 1, 9]
    trained = [{n: a + 0.1 * rng.standard_normal(a.shape).astype(a.dtype) for n, a in sent.items()} for _ in examples]
    found = FactorAggregation(AggregationConfig(gap=True), net).combine(sent, list(zip(examples, trained, strict=True)))

    def composed(weight, arrays):
        factors = {f: torch.from_numpy(arrays[weight.name(f)]).double() for f in weight.factors}
        return plain_weight(weight.factorization, factors, weight.shape)

    mean = {n: sum(p * arrays[n].astype(float) for p, arrays in zip(examples, trained, strict=True)) / 40 for n in sent}
    errors, updates = {}, {}
    for weight in factorized_weights(net):
        mean_weight = sum(p * composed(weight, arrays) for p, arrays in zip(examples, trained, strict=True)) / 40
        errors[weight.path] = (mean_weight - composed(weight, mean)).norm().item()
        updates[weight.path] = (mean_weight - composed(weight, sent)).norm().item()
    assert found.layer_gaps == pytest.approx({path: errors[path] / updates[path] for path in errors}, rel=1e-9)
    assert found.gap == pytest.approx(math.hypot(*errors.values()) / math.hypot(*updates.values()), rel=1e-9)
    assert found.gap > 0.01
    assert (found.residual, found.refitted) == (None, {})


def test_a_gap_beside_no_update_is_not_a_number():
    zero, one = torch.zeros(2), torch.ones(2)
    found = Relative()
    assert found.add(zero, zero) == 0
    assert found.add(one, zero) is None
    assert found.add(one, 2 * one) == 0.5
    assert found.ratio == math.sqrt(0.5)


def test_nothing_is_looked_at_unless_asked_for():
    net = small_net()
    sent = {name: tensor.numpy() for name, tensor in state_of(net).items()}
    found = FactorAggregation(AggregationConfig(), net).combine(sent, [(1, {})])
    assert (found.gap, found.layer_gaps, found.residual, found.refitted) == (None, {}, None, {})


CASES = [(method, shape) for method in MULTILINEAR for shape in SHAPES]


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_a_refit_is_never_farther_from_the_mean_and_nearer_with_every_sweep(method, shape):
    weight = weight_of(method, shape)
    factors = draw(weight)
    mean = means(weight, [(0.25, shifted(factors, 0.5, seed)) for seed in range(4)])
    found = [refit(weight, mean.factors, mean.weight, sweeps) for sweeps in range(5)]
    left = [(weight.compose(each) - mean.weight).norm().item() for each in found]
    assert left[1] < left[0]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_the_change_of_a_factor_finds_a_weight_from_which_it_alone_is_off(method, shape):
    weight = weight_of(method, shape)
    factors = draw(weight)
    target = plain_weight(weight.factorization, factors, shape)
    for name, change in changes(weight).items():
        start = shifted(factors, 1.0, 3, only=name)
        found = weight.compose(start | {name: start[name] + change(start, target - weight.compose(start))})
        torch.testing.assert_close(found, target, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["lowrank", "svd"])
def test_a_refit_finds_a_matrix_of_its_rank_from_anywhere(method):
    weight = weight_of(method, (9, 6))
    target, start = weight.compose(draw(weight)), draw(weight, seed=1)
    found = weight.compose(refit(weight, start, target, sweeps=2))
    torch.testing.assert_close(found, target, rtol=1e-9, atol=1e-9)


def test_a_refit_at_its_goal_stays_there():
    weight = weight_of("fedpara", (8, 6, 3, 2))
    factors = draw(weight)
    found = refit(weight, factors, weight.compose(factors), sweeps=2)
    assert all(torch.equal(found[name], factors[name]) for name in factors)


def test_a_refit_of_zeros_stays_finite():
    weight = weight_of("fedpara", (8, 6, 3, 2))
    zeros = {name: torch.zeros_like(factor) for name, factor in draw(weight).items()}
    found = refit(weight, zeros, torch.ones(8, 6, 3, 2, dtype=torch.float64), sweeps=2)
    assert all(torch.equal(found[name], zeros[name]) for name in zeros)


def test_a_large_core_changes_less_but_in_the_same_direction(monkeypatch):
    weight = weight_of("fedpara", (8, 6, 3, 2))
    target, start = weight.compose(draw(weight)), draw(weight, seed=1)
    exact = refit(weight, start, target, 1)
    monkeypatch.setattr("lowrank_fl.aggregation.refit._LARGEST_CORE", 1)
    bounded = refit(weight, start, target, 1)
    assert not torch.equal(bounded["t1"], start["t1"])
    errors = [(weight.compose(factors) - target).norm() for factors in (exact, bounded, start)]
    assert errors == sorted(errors)


def test_a_refitted_model_has_its_own_dtype_and_says_what_is_left():
    net = small_net()
    sent = {name: tensor.numpy().copy() for name, tensor in state_of(net).items()}
    rng = np.random.default_rng(0)
    trained = [(2, {n: a + 0.2 * rng.standard_normal(a.shape).astype(a.dtype) for n, a in sent.items()}) for _ in "ab"]
    found = FactorAggregation(AggregationConfig(kind="refit"), net).combine(sent, trained)
    weights = factorized_weights(net)
    assert set(found.refitted) == {weight.name(factor) for weight in weights for factor in weight.factors}
    assert {array.dtype for array in found.refitted.values()} == {np.dtype(np.float32)}
    assert 0 < found.residual < found.gap
    left = Relative()
    for weight in weights:
        mean = sum(weight.compose(weight.read(arrays)) for _, arrays in trained) / 2
        left.add(mean - weight.compose(weight.read(found.refitted)), mean - weight.compose(weight.read(sent)))
    assert found.residual == pytest.approx(left.ratio, rel=1e-9)
