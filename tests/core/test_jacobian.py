"""The Jacobian correction against Eq. 9 written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_core import composed_weights, factorize, jacobian_correction


def test_the_correction_is_equation_9_with_the_papers_jacobians():
    model = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64))
    factorize(model, "fedpara", rank=1)
    weight = model[0].weight
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 4, (6,))
    lr = 0.3
    with composed_weights(model) as composed:
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    correction = jacobian_correction(composed, lr)

    # The paper's appendix B, symbol by symbol.
    x1, y1, x2, y2 = (weight.factors[name] for name in ("x1", "y1", "x2", "y2"))
    w1, w2 = x1 @ y1.T, x2 @ y2.T
    w = (w1 * w2).detach().requires_grad_()
    (j_w,) = torch.autograd.grad(F.cross_entropy(F.linear(x, w, model[0].bias), y), w)
    j_w1, j_w2 = j_w * w2, j_w * w1
    stepped_1 = (x1 - lr * j_w1 @ y1) @ (y1 - lr * j_w1.T @ x1).T
    stepped_2 = (x2 - lr * j_w2 @ y2) @ (y2 - lr * j_w2.T @ x2).T
    expected = 0.5 * (stepped_1 * stepped_2 - (w1 * w2 - lr * j_w)).square().sum()
    torch.testing.assert_close(correction, expected, rtol=1e-12, atol=0)
    factors = list(weight.parameters())
    for got, wanted in zip(
        torch.autograd.grad(correction, factors), torch.autograd.grad(expected, factors), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("tanh", [False, True])
def test_the_correction_covers_every_hadamard_layer_and_is_zero_for_a_step_of_zero(tanh):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    factorize(model, "fedpara", rank=1, tanh=tanh)
    with composed_weights(model) as composed:
        loss = F.cross_entropy(model(torch.randn(2, 3, 6, 6)), torch.tensor([0, 1]))
    loss.backward()
    assert len(composed) == 2
    assert jacobian_correction(composed, 0.0).item() == 0
    assert jacobian_correction(composed, 0.1).item() > 0


def test_minimising_the_correction_brings_a_factor_step_nearer_to_the_dense_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    factorize(model, "fedpara", rank=1)
    x, y = torch.randn(32, 6), torch.randint(0, 6, (32,))
    parameters = list(model[0].weight.parameters())
    values = []
    for _ in range(30):
        model.zero_grad()
        with composed_weights(model) as composed:
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        correction = jacobian_correction(composed, 0.5)
        values.append(correction.item())
        for parameter, gradient in zip(parameters, torch.autograd.grad(correction, parameters), strict=True):
            parameter.data -= 0.001 * gradient
    assert values[-1] < values[0]


def test_hooks_are_gone_after_the_block():
    model = nn.Sequential(nn.Linear(4, 4))
    factorize(model, "fedpara", rank=1)
    with composed_weights(model) as composed:
        pass
    model(torch.randn(1, 4))
    assert composed == []
