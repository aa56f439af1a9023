"""All directions whose number is adapted, and what can be done to them."""

# torch leaves the types of a few of its methods partly open.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowrank_core.adaptive.groups import Factor, Group, Side, find_groups
from lowrank_core.adaptive.importance import Importance
from lowrank_core.adaptive.patterns import note_peft_lohas, note_rank
from lowrank_core.adaptive.resizing import keep_directions, replace_data, state_dims
from lowrank_core.errors import LowrankError


class Directions:
    """The groups of one model and the optimizer that trains them."""

    def __init__(self, groups: Sequence[Group], optimizer: Optimizer) -> None:
        self.groups, self.optimizer = list(groups), optimizer
        self.sides: list[tuple[Group, Side]] = [(group, side) for group in groups for side in group.sides]
        self.factors: dict[str, Factor] = {name: f for group in groups for name, f in group.factors.items()}
        self.orthonormal = [(factor.parameter, factor.dim) for group in groups for factor in group.orthonormal]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: factor.parameter for name, factor in self.factors.items()}

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        return {name: factor.parameter.grad for name, factor in self.factors.items()}

    @property
    def initial(self) -> int:
        return sum(len(group.sides[0].present) for group in self.groups)

    def mark(self, masks: Sequence[Sequence[Tensor]]) -> None:
        """Note which directions an allocation keeps."""
        for group, found in zip(self.groups, masks, strict=True):
            for side, mask in zip(group.sides, found, strict=True):
                side.mask = mask

    @torch.no_grad()
    def switch_off(self) -> None:
        """Zero the values of what the last allocation did not keep."""
        for _, side in self.sides:
            if side.mask is not None:
                shape = [1] * side.value.parameter.ndim
                shape[side.value.dim] = -1
                side.value.parameter.masked_fill_(~side.mask.view(shape), 0.0)

    def check_optimizer(self) -> None:
        """Raise a LowrankError where the optimizer keeps a state that cannot be cut."""
        for factor in self.factors.values():
            state_dims(factor.parameter, factor.dim, self.optimizer.state.get(factor.parameter, {}))

    def check_sizes(self) -> None:
        """Raise a LowrankError where weights of another rank were loaded behind the allocator's back."""
        for group, side in self.sides:
            for leaf, factor in side.factors.items():
                if factor.rank != sum(side.present):
                    raise LowrankError(
                        f"{group.name}.{leaf} has rank {factor.rank}, but the rank allocator left it "
                        f"{sum(side.present)}; after loading other weights, load the optimizer's state of the same "
                        "checkpoint"
                    )

    def forget_empty_gradients(self) -> None:
        """Take the gradients from factors of rank 0: some optimizers divide by the number of elements."""
        for factor in self.factors.values():
            if not factor.parameter.numel():
                factor.parameter.grad = None

    def remove(self, importance: Importance | None) -> int:
        """Take what is switched off out of the parameters; returns how many numbers they lost."""
        self.check_optimizer()
        before = sum(factor.parameter.numel() for factor in self.factors.values())
        for group, side in self.sides:
            if side.mask is not None:
                self.keep(group, side, side.mask.tolist(), importance)
        return before - sum(factor.parameter.numel() for factor in self.factors.values())

    def keep(self, group: Group, side: Side, kept: Sequence[bool], importance: Importance | None = None) -> None:
        """Keep those of a side's directions."""
        index = torch.tensor(kept, dtype=torch.bool, device=side.value.parameter.device).nonzero().flatten()
        for leaf, factor in side.factors.items():
            keep_directions(factor.parameter, factor.dim, index, self.optimizer)
            if importance is not None:
                importance.keep(f"{group.name}.{leaf}", factor.dim, index)
        stays = iter(kept)
        side.present = [here and next(stays) for here in side.present]
        side.mask = None if side.mask is None else side.mask.index_select(0, index)

    def state_dict(self) -> dict[str, Any]:
        return {
            "layers": [group.name for group in self.groups],
            "present": [list(side.present) for _, side in self.sides],
            "masks": [None if side.mask is None else side.mask.tolist() for _, side in self.sides],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut every side to the directions that were present; the parameters may have been cut already."""
        names = [group.name for group in self.groups]
        if state["layers"] != names:
            raise LowrankError(
                f"this rank allocation was saved for the layers {_brief(state['layers'])}, but the model adapts "
                f"{_brief(names)}; adapt the ranks of the same adapters"
            )
        for (group, side), present in zip(self.sides, state["present"], strict=True):
            # A state that says nothing new may meet weights that are ahead of it: accelerate loads what it just saved.
            if present != side.present and side.rank not in (sum(present), len(present)):
                raise LowrankError(
                    f"{group.name} has rank {side.rank}, but its saved allocation has {sum(present)} of "
                    f"{len(present)}; load the model's weights of the same checkpoint first"
                )
        for (group, side), present, mask in zip(self.sides, state["present"], state["masks"], strict=True):
            if present != side.present and side.rank > sum(present):
                self.keep(group, side, present)
            side.present = list(present)
            device = side.value.parameter.device
            side.mask = None if mask is None else torch.tensor(mask, dtype=torch.bool, device=device)

    def follow_loaded_ranks(self) -> Iterator[RemovableHandle]:
        """Hooks under which the modules' `load_state_dict` takes weights of another rank."""
        for factor in self.factors.values():
            yield factor.owner.register_load_state_dict_pre_hook(partial(_fit, factor))


def fit_ranks(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Give every layer whose rank can adapt the rank it has in `state_dict`, which the model can load then.

    For a model that is built anew to go on with, or to use, what an allocator has shrunk. Where `adapt_ranks` was
    called already, the model's `load_state_dict` does this by itself.
    """
    prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    groups = find_groups(model)
    for group in groups:
        for side in group.sides:
            for factor in side.factors.values():
                _fit(factor, factor.owner, state_dict, prefixes[factor.owner])
        note_rank(group)
    note_peft_lohas(model, groups)


def _fit(factor: Factor, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded, give a factor the rank that they have."""
    saved, own = state_dict.get(prefix + factor.leaf), factor.parameter
    if not isinstance(saved, Tensor) or saved.shape == own.shape or saved.ndim != own.ndim:
        return
    shape = list(own.shape)
    shape[factor.dim] = saved.shape[factor.dim]
    if tuple(shape) == tuple(saved.shape):
        replace_data(own, own.detach().new_zeros(shape))


def _brief(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"
