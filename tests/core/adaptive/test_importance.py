"""Importance and allocation against their definitions written out."""

import pytest
import torch

from lowrank_core.adaptive.allocation import allocate
from lowrank_core.adaptive.importance import Importance

pytestmark = pytest.mark.usefixtures("on_device")


def test_statistics_follow_the_papers_equations():
    parameter = torch.randn(4, 3, dtype=torch.float64)
    importance = Importance({"p": parameter}, 0.8, 0.6)
    average = uncertainty = torch.zeros(4, 3, dtype=torch.float64)
    for _ in range(5):
        parameter = torch.randn(4, 3, dtype=torch.float64)
        gradient = torch.randn(4, 3, dtype=torch.float64)
        assert importance.update({"p": parameter}, {"p": gradient})
        now = (parameter * gradient).abs()
        average = 0.8 * average + 0.2 * now
        uncertainty = 0.6 * uncertainty + 0.4 * (now - average).abs()
    score = average * uncertainty
    torch.testing.assert_close(importance.score("p", 0), score.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(importance.score("p", 1), score.mean(0), rtol=1e-12, atol=0)
    importance.keep("p", 1, torch.tensor([0, 2]))
    torch.testing.assert_close(importance.score("p", 1), score.mean(0)[[0, 2]], rtol=1e-12, atol=0)


def test_parameters_without_a_gradient_keep_their_statistics():
    parameters = {"used": torch.ones(2, 2), "unused": torch.ones(2, 2), "empty": torch.ones(0, 2)}
    importance = Importance(parameters, 0.5, 0.5)
    assert importance.update(parameters, {"used": torch.ones(2, 2), "unused": None, "empty": torch.ones(0, 2)})
    assert (importance.score("used", 0) > 0).all()
    assert (importance.score("unused", 0) == 0).all()
    assert importance.score("empty", 0).shape == (0,)
    assert importance.score("empty", 1).tolist() == [0, 0]
    assert importance.update(parameters, dict.fromkeys(parameters))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_change_nothing(bad):
    parameters = {"p": torch.ones(2, 2), "q": torch.ones(3)}
    importance = Importance(parameters, 0.5, 0.5)
    importance.update(parameters, {"p": torch.ones(2, 2), "q": torch.ones(3)})
    before = importance.score("p", 0)
    assert not importance.update(parameters, {"p": torch.ones(2, 2), "q": torch.tensor([1.0, bad, 1.0])})
    assert torch.equal(importance.score("p", 0), before)


def test_half_precision_parameters_have_statistics_in_single():
    parameters = {"p": torch.ones(2, 2, dtype=torch.bfloat16)}
    importance = Importance(parameters, 0.85, 0.85)
    importance.update(parameters, {"p": torch.full((2, 2), 1e-3, dtype=torch.bfloat16)})
    assert importance.score("p", 0).dtype == torch.float32


@pytest.mark.parametrize("budget", [0, 1, 7, 11, 12])
def test_the_budgets_greatest_scores_of_all_layers_stay(budget):
    scores = [torch.randn(4) for _ in range(3)]
    masks = [sides[0] for sides in allocate([[score] for score in scores], budget)]
    threshold = torch.cat(scores).sort().values[12 - budget - 1] if budget < 12 else -float("inf")
    for mask, score in zip(masks, scores, strict=True):
        assert torch.equal(mask, score > threshold)


def test_equal_scores_keep_the_first_and_exactly_the_budget():
    masks = allocate([[torch.zeros(3)], [torch.zeros(2)]], 4)
    assert [m[0].tolist() for m in masks] == [[True, True, True], [True, False]]


def test_the_two_terms_of_a_loha_keep_equally_many_each_of_its_own_best():
    first = [torch.tensor([1.0, 9.0, 5.0]), torch.tensor([0.3, 0.1, 0.2])]
    second = [torch.tensor([4.0, 6.0]), torch.tensor([1.0, 2.0])]
    # pairs: 9.3, 5.2, 1.1 and 8, 5
    kept = allocate([first, second], 3)
    assert [[side.tolist() for side in layer] for layer in kept] == [
        [[False, True, True], [True, False, True]],
        [[False, True], [False, True]],
    ]


def test_a_layer_may_be_promised_a_least_rank():
    weak, strong = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([5.0, 6.0, 7.0])
    assert [m[0].tolist() for m in allocate([[weak], [strong]], 3)] == [[False] * 3, [True] * 3]
    kept = [m[0].tolist() for m in allocate([[weak], [strong]], 3, least=1)]
    assert kept == [[False, False, True], [False, True, True]]
