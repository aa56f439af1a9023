"""The Jacobian correction of FedPara as a loss term (appendix B, Eq. 9)."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_core.factorizations import Hadamard
from lowrank_core.layers.weight import FactorizedWeight

Composed = list[tuple[FactorizedWeight, Tensor]]


@contextmanager
def composed_weights(model: nn.Module) -> Generator[Composed]:
    """Collect the Hadamard weights that forward passes compose inside the block; each will keep its gradient.

    A weight of frozen factors has none, and is left out.
    """
    composed: Composed = []

    def keep(module: FactorizedWeight, _: object, weight: Tensor) -> None:
        if weight.requires_grad:
            weight.retain_grad()
            composed.append((module, weight))

    hooks = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, FactorizedWeight) and isinstance(module.factorization, Hadamard)
    ]
    try:
        yield composed
    finally:
        for hook in hooks:
            hook.remove()


def jacobian_correction(composed: Composed, lr: float) -> Tensor:
    """½ Σ ‖W' - (W - η·J_W)‖² over the composed weights, a scalar to be scaled by λ and added to the loss.

    J_W is the loss's gradient with respect to the composed weight, so call this after the loss's backward;
    W' is the weight that the factors compose to after one SGD step of rate η = `lr`, X' = X - η·J_X with
    J_X1 = (J_W ⊙ W2) Y1 and its kin. J_W counts as a constant: the paper does not say whether to differentiate
    through it, and doing so would take a second backward pass through the whole network.

        with composed_weights(model) as composed:
            loss = criterion(model(x), y)
        loss.backward()
        (strength * jacobian_correction(composed, lr)).backward()
    """
    assert composed, "the model composed no Hadamard weight"
    terms: list[Tensor] = []
    for module, recorded in composed:
        assert recorded.grad is not None, "run the loss's backward before the Jacobian correction"
        factors = module.factors
        weight = module.factorization.compose(factors, module.shape)
        gradient = recorded.grad.detach().to(weight.dtype)  # lower in an autocast block
        jacobians = torch.autograd.grad(weight, list(factors.values()), gradient, create_graph=True)
        stepped = {name: factor - lr * j for (name, factor), j in zip(factors.items(), jacobians, strict=True)}
        after = module.factorization.compose(stepped, module.shape)
        terms.append((after - weight + lr * gradient).square().sum())
    return 0.5 * torch.stack(terms).sum()
