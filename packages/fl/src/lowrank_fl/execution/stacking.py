"""Models of linear layers as functions of their parameters, which can be stacked client by client."""

import copy
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_core import LowrankError
from lowrank_core.adapters.layer import AdaptedLayer, Adapter
from lowrank_core.layers import FactorizedLinear, FactorizedWeight

Named = dict[str, Tensor]

_STACKED = (nn.Linear, FactorizedLinear, FactorizedWeight, Adapter)


def check_stackable(model: nn.Module) -> None:
    """See that every layer with numbers of its own is linear, and that no layer draws any.

    A convolution over weights that differ by client becomes a grouped one, which trains slowly; torch's LSTM has no
    batching rule; a dropout would draw other numbers than it draws for one client alone.

    Raises:
        LowrankError: it names the first layer that is another.
    """
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        draws = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if draws or (own and not isinstance(module, _STACKED)):
            raise LowrankError(
                f"engine.execution batched trains models of linear layers, and {name or 'the model'} is a "
                f"{type(module).__name__}; use model.name=mlp or engine.execution=sequential"
            )


def as_function(model: nn.Module) -> Callable[[tuple[Named, ...], Tensor], Tensor]:
    """`f(parameters, inputs)`, which is `model(inputs)` with these parameters in place of its own, under `vmap` too.

    The model must be one that `check_stackable` lets through; its own numbers play no part.
    """
    shell = copy.deepcopy(model).train()
    for module in shell.modules():
        if isinstance(module, AdaptedLayer):
            # The fused ways of an adapted layer are autograd functions that vmap does not see through.
            module.forward = partial(_adapted, module)  # pyright: ignore[reportAttributeAccessIssue]
    return lambda parameters, inputs: functional_call(shell, parameters, (inputs,))


def _adapted(layer: AdaptedLayer, input: Tensor) -> Tensor:
    """The layer's output from composed ΔW, `(batch, in)` to `(batch, out)`."""
    output = cast(Tensor, layer.base(input))
    for name in layer.active:
        output = output + F.linear(input, layer.adapter(name).compose())
    return output


def stack(tensors: Named, count: int) -> Named:
    """Each tensor `count` times, `(count, *shape)`, in memory of its own."""
    return {name: torch.stack([tensor.detach()] * count) for name, tensor in tensors.items()}
