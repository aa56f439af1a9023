"""The penalty's gradient against autograd."""

import pytest
import torch

from lowrank_core.adaptive.orthogonality import add_orthogonality_gradient, orthogonality

pytestmark = pytest.mark.usefixtures("on_device")


def factors(dtype=torch.float64):
    shapes = [((3, 7), 0), ((5, 3), 1), ((2, 2), 0), ((4, 1), 1), ((1, 6), 0)]
    return [(torch.randn(shape, dtype=dtype, requires_grad=True), dim) for shape, dim in shapes]


def test_the_value_is_the_authors():
    found = factors()
    expected = 0.0
    for factor, dim in found:
        square = factor @ factor.T if dim == 0 else factor.T @ factor
        expected += torch.linalg.norm(square - torch.eye(len(square))) / len(found)
    torch.testing.assert_close(orthogonality(found), expected)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_gradient_is_autograds(scale):
    found = factors()
    expected = torch.autograd.grad(0.3 * orthogonality(found), [factor for factor, _ in found])
    before = [torch.randn_like(factor) for factor, _ in found]
    for (factor, _), gradient in zip(found, before, strict=True):
        factor.grad = gradient.clone()
    add_orthogonality_gradient(found, 0.3, None if scale is None else torch.tensor(scale))
    for (factor, _), old, new in zip(found, before, expected, strict=True):
        torch.testing.assert_close(factor.grad, old + (scale or 1) * new, rtol=1e-12, atol=1e-12)


def test_an_orthonormal_factor_has_no_gradient_and_an_unused_one_gets_none():
    found = [(torch.eye(3, 5, requires_grad=True), 0), (torch.randn(4, 2, requires_grad=True), 1)]
    found[0][0].grad = torch.zeros(3, 5)
    add_orthogonality_gradient(found, 1.0)
    assert (found[0][0].grad == 0).all()
    assert found[1][0].grad is None


def test_half_precision_factors_are_multiplied_in_single():
    ((factor, _),) = found = [(torch.randn(3, 40, requires_grad=True), 0)]
    half = factor.detach().bfloat16().requires_grad_()
    half.grad = torch.zeros_like(half)
    add_orthogonality_gradient([(half, 0)], 1.0)
    exact = half.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(orthogonality([(exact, 0)]), exact)
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, expected.bfloat16())
    assert found
