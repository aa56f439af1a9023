"""Taking directions out of a parameter that is being trained."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_core.errors import LowrankError


def keep_directions(parameter: Tensor, dim: int, index: Tensor, optimizer: Optimizer) -> None:
    """Keep only `index` along `dim` of a parameter, of its gradient, and of its state in the optimizer.

    It stays the same object at the same place in the optimizer's groups, so that schedulers and the model go on.
    What holds a copy of its own of the parameter's size does not: buckets of DistributedDataParallel, running averages
    of weights, a gradient that was read out before.

    Raises:
        LowrankError: the optimizer keeps a state of another layout; nothing is changed.
    """
    state = cast(dict[str, Any], optimizer.state.get(parameter, {}))
    dims = state_dims(parameter, dim, state)
    for key, along in dims.items():
        if along is not None:
            state[key] = state[key].index_select(along, index.to(state[key].device))
    gradient = None if parameter.grad is None else parameter.grad.index_select(dim, index)
    replace_data(parameter, parameter.detach().index_select(dim, index))
    parameter.grad = gradient


def replace_data(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter data of another shape; its gradient is dropped.

    While any old loss is alive, the parameter keeps a node in its graph that accepts gradients of the old
    shape only. torch makes a new one when the dtype changes, but not when the shape does: hence the detour.
    """
    parameter.grad = None
    other = torch.float16 if data.dtype == torch.float32 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data


def state_dims(parameter: Tensor, dim: int, state: Mapping[str, Any]) -> dict[str, int | None]:
    """The dimension of each of an optimizer's state tensors that counts the directions; None where none does.

    Tensors of the parameter's shape (Adam's moments, SGD's momentum), the same with some sizes 1 (torch's
    Adafactor), and transformers' Adafactor, which drops a dimension and says so by `_row` or `_col`.

    Raises:
        LowrankError: a state of another layout.
    """
    shape = parameter.shape
    dims: dict[str, int | None] = {}
    for key, value in state.items():
        if value is None or isinstance(value, bool | int | float | str):
            continue
        if isinstance(value, Tensor) and (value.ndim == 0 or (value.numel() == 1 and parameter.numel() != 1)):
            dims[key] = None
        elif isinstance(value, Tensor) and value.ndim == len(shape) and _spans(value.shape, shape):
            dims[key] = dim if value.shape[dim] == shape[dim] else None
        elif isinstance(value, Tensor) and key.endswith("_row") and value.shape == shape[:-1]:
            dims[key] = dim if dim < len(shape) - 1 else None
        elif isinstance(value, Tensor) and key.endswith("_col") and value.shape == (*shape[:-2], shape[-1]):
            dims[key] = {len(shape) - 1: len(shape) - 2, len(shape) - 2: None}.get(dim, dim)
        else:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LowrankError(
                f"the optimizer's {key} for a parameter of shape {tuple(shape)} is {found}, which does not tell "
                "directions apart; use another optimizer or shrink=False"
            )
    return dims


def _spans(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return all(size in (1, full) for size, full in zip(shape, whole, strict=True))
