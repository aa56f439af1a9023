"""What the initialisations compose to."""

import math

import pytest
import torch

from lowrank_core.errors import UsageError
from lowrank_core.factorizations import Hadamard, Kronecker, LowRank, Svd
from lowrank_core.init import calibrated_stds, he_variance, init_factors, tanh_variance
from lowrank_core.ranks import Gamma, rank_for

VGG16 = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]
FACTORIZATIONS = [LowRank(), Hadamard(), Hadamard(tanh=True), Hadamard(plus_one=True), Svd(), Kronecker()]
GAMMAS = [n / 10 for n in range(1, 10)]


def drawn(factorization, shape, rank, init="calibrated", dtype=torch.float32):
    factors = {name: torch.empty(s, dtype=dtype) for name, s in factorization.shapes(shape, rank).items()}
    init_factors(factors, factorization, shape, init)
    return factors


def term_variance(stds, kernel, rank, branch=""):
    variances = [stds[f"{factor}{branch}"] ** 2 for factor in ("x", "y", *(("t",) if kernel else ()))]
    return rank ** len(variances[1:]) * math.prod(variances)


@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=str)
@pytest.mark.parametrize("channels", VGG16, ids=str)
def test_the_expected_variance_of_the_composed_weight_is_hes_for_every_vgg16_layer(factorization, channels):
    shape = (*channels, 3, 3)
    for gamma in GAMMAS:
        rank = rank_for(Gamma(gamma), factorization, shape)
        stds = calibrated_stds(factorization, shape, rank)
        if isinstance(factorization, LowRank):
            expected = term_variance(stds, True, rank)
        elif isinstance(factorization, Svd | Kronecker):
            expected = rank * math.prod(std**2 for std in stds.values())
        else:
            first, second = (term_variance(stds, True, rank, branch) for branch in (1, 2))
            if factorization.tanh:
                expected = tanh_variance(first) * tanh_variance(second)
            else:
                expected = first * (second + factorization.plus_one)
        assert expected == pytest.approx(he_variance(shape), rel=1e-6)


@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=str)
@pytest.mark.parametrize("channels", VGG16[:4], ids=str)
def test_a_calibrated_draw_has_hes_variance_for_every_vgg16_layer(factorization, channels):
    shape = (*channels, 3, 3)
    for gamma in GAMMAS:
        rank = rank_for(Gamma(gamma), factorization, shape)
        weight = factorization.compose(drawn(factorization, shape, rank), shape)
        assert weight.square().mean().item() == pytest.approx(he_variance(shape), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=str)
@pytest.mark.parametrize("channels", VGG16[4:], ids=str)
def test_a_calibrated_draw_has_hes_variance_for_vgg16s_widest_layers(factorization, channels):
    test_a_calibrated_draw_has_hes_variance_for_every_vgg16_layer(factorization, channels)


def test_the_expectation_agrees_with_many_draws():
    # 3000 layers of rank 2, where single draws vary most: their mean is the expectation.
    shape, rank = (6, 5), 2
    stds = calibrated_stds(Hadamard(), shape, rank)
    x1, x2 = (torch.randn(3000, 6, rank) * stds[name] for name in ("x1", "x2"))
    y1, y2 = (torch.randn(3000, 5, rank) * stds[name] for name in ("y1", "y2"))
    mean_square = ((x1 @ y1.mT) * (x2 @ y2.mT)).square().mean().item()
    assert mean_square == pytest.approx(he_variance(shape), rel=0.05)


@pytest.mark.parametrize("shape", [(8, 2), (4, 1), (16, 1, 1, 1)], ids=str)
def test_a_tanh_weight_with_very_few_inputs_is_drawn_as_large_as_tanh_allows(shape):
    weight = Hadamard(tanh=True).compose(drawn(Hadamard(tanh=True), shape, 2), shape)
    assert weight.isfinite().all()
    assert weight.square().mean().item() == pytest.approx(min(he_variance(shape), 0.64), rel=0.01)


def test_the_papers_draw_composes_to_a_few_percent_of_he_and_flowers_to_about_he():
    for channels in ((64, 64), (256, 256)):
        shape = (*channels, 3, 3)
        rank = Gamma(0.1)(shape)
        he = math.sqrt(he_variance(shape))
        paper = Hadamard().compose(drawn(Hadamard(), shape, rank, "paper"), shape).std().item() / he
        flower = Hadamard().compose(drawn(Hadamard(), shape, rank, "flower"), shape).std().item() / he
        assert 0.005 < paper < 0.05
        assert 0.5 < flower < 2.0


def test_the_papers_and_flowers_factors_follow_their_formulas():
    shape, rank = (400, 300, 3, 3), 40
    paper, flower = drawn(Hadamard(), shape, rank, "paper"), drawn(Hadamard(), shape, rank, "flower")
    assert paper["x1"].var().item() == pytest.approx(2 / 400, rel=0.1)
    assert paper["y2"].var().item() == pytest.approx(2 / 300, rel=0.1)
    assert paper["t1"].var().item() == pytest.approx(2 / (40 * 9), rel=0.1)
    assert flower["x1"].var().item() == pytest.approx(2 / 40, rel=0.1)
    assert flower["t2"].var().item() == pytest.approx(2 / (40 * 9), rel=0.1)


def test_factors_on_the_meta_device_are_left_alone():
    factors = {name: torch.empty(s, device="meta") for name, s in Hadamard().shapes((8, 8), 2).items()}
    init_factors(factors, Hadamard(), (8, 8))


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(ValueError, match="init must be calibrated, paper or flower, got 'xavier'"):
        drawn(Hadamard(), (4, 4), 1, "xavier")


@pytest.mark.parametrize("factorization", [Svd(), Kronecker()], ids=str)
def test_fedparas_initialisations_say_nothing_of_other_factors(factorization):
    with pytest.raises(
        UsageError,
        match=r"init 'paper' says how FedPara's factors are drawn, not those of (Svd|Kronecker); use",
    ):
        drawn(factorization, (8, 8), 2, "paper")


def test_the_directions_of_an_svd_have_length_one_and_its_values_the_scale():
    factors = drawn(Svd(), (400, 300, 3, 3), 40)
    assert factors["left"].norm(dim=0).mean().item() == pytest.approx(1, rel=0.02)
    assert factors["right"].norm(dim=1).mean().item() == pytest.approx(1, rel=0.02)
    assert factors["values"].square().mean().item() == pytest.approx(2 * 400 / 40, rel=0.5)
