"""One step of a client's training, by torch alone: loss, gradients, their correction and the update."""

# torch's operations on lists of tensors, which its own optimizers take, have names with an underscore.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_core import composed_weights, jacobian_correction
from lowrank_fl.config import Precision
from lowrank_fl.drift import Drift


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor, precision: Precision) -> Tensor:
    """Mean cross-entropy of one batch, its forward pass in that precision."""
    with in_precision(precision, inputs.device):
        return F.cross_entropy(model(inputs), labels)


def in_precision(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """What forward passes run in; a backward pass follows its forward one, and belongs outside."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def backward(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    lr: float,
    jacobian_lambda: float = 0.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Leave the gradients of the cross-entropy, and of the Jacobian correction of that weight; return the loss alone.

    The correction is FedPara's: a model without Hadamard weights has none.
    """
    if not jacobian_lambda:
        loss = loss_of(model, inputs, labels, precision)
        loss.backward()
        return loss.detach()
    with composed_weights(model) as composed:
        loss = loss_of(model, inputs, labels, precision)
    loss.backward()
    for weight in composed:
        # One by one, which comes to the same: all weights' graphs at once are another 600 MB for VGG16.
        (jacobian_lambda * jacobian_correction([weight], lr)).backward()
    return loss.detach()


@contextmanager
def training_only(model: nn.Module, names: Collection[str] | None) -> Generator[None]:
    """Inside the block no parameter outside `names` is trained, and a norm's statistics outside them are put back
    after it; without names everything is trained.
    """
    if names is None:
        yield
        return
    frozen = [p for name, p in model.named_parameters() if p.requires_grad and name not in names]
    statistics = [(buffer, buffer.clone()) for name, buffer in model.named_buffers() if name not in names]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for buffer, before in statistics:
            buffer.copy_(before)


class SGD:
    """Stochastic gradient descent with torch.optim.SGD's formula: v = m·v + (g + d·w), w = w - lr·v.

    torch.optim itself imports torch's compiler at its first step, four seconds in every worker process.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocities: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient, the same ones at every step, and forget the gradients."""
        parameters = [parameter for parameter in self.parameters if parameter.grad is not None]
        if not parameters:
            return
        # All in one call, which is a loop in C++ on a CPU and few kernels on a GPU.
        updates = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        if self.weight_decay:
            updates = torch._foreach_add(updates, parameters, alpha=self.weight_decay)
        if self.momentum:
            if self.velocities:
                torch._foreach_mul_(self.velocities, self.momentum)
                torch._foreach_add_(self.velocities, updates)
            else:
                self.velocities = [update.clone() for update in updates]
            updates = self.velocities
        torch._foreach_add_(parameters, updates, alpha=-self.lr)
        for parameter in parameters:
            parameter.grad = None


def correction(parameters: Mapping[str, Tensor], drift: Drift) -> Callable[[], None]:
    """What adds a drift's correction to the gradients."""
    start: Mapping[str, Tensor] = {}
    if drift.proximal:
        start = drift.received or {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def correct() -> None:
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            if drift.proximal:
                parameter.grad.add_(parameter - start[name], alpha=drift.proximal)
            if name in drift.offsets:
                parameter.grad.add_(drift.offsets[name])

    return correct
