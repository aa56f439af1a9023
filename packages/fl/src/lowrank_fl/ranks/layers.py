"""The directions of AdaLoRA's adapters among a model's arrays: which arrays share them, how many there are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_core.adapters.config import AdaLoRA
from lowrank_core.adapters.control import configs_of
from lowrank_core.adaptive import fit_ranks
from lowrank_core.adaptive.groups import Group, find_groups
from lowrank_fl.models.pretrained import Pretrained

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RankedLayer:
    """One layer's adapter, ΔW = Σ_i e_i b_i a_iᵀ over its directions i."""

    name: str
    """The layer's, in the network."""
    dims: Mapping[str, int]
    """By array, the dimension that counts directions."""

    def rank(self, arrays: Mapping[str, np.ndarray] | Mapping[str, Tensor]) -> int:
        """The directions that these arrays hold."""
        name, dim = next(iter(self.dims.items()))
        return arrays[name].shape[dim]


def adalora_of(model: nn.Module) -> AdaLoRA | None:
    """The AdaLoRA that is on the model; None where another adapter or none is."""
    # Another library's network has its adapters itself.
    config = configs_of(model.network if isinstance(model, Pretrained) else model).get("default")
    return config if isinstance(config, AdaLoRA) else None


def ranked_layers(groups: Iterable[Group]) -> list[RankedLayer]:
    """The layers of these groups, in their order; those of another library's network under that library's names."""
    layers: list[RankedLayer] = []
    for group in groups:
        name = group.name.rpartition(".adapters.")[0].removeprefix("network.")
        layers.append(RankedLayer(name, {array: factor.dim for array, factor in group.factors.items()}))
    return layers


def keep(arrays: Arrays, layers: Sequence[RankedLayer], kept: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """All arrays, those of `layers` with the directions alone that `kept` marks, one mask for each layer."""
    cut = {
        name: np.compress(mask, arrays[name], axis=dim)
        for layer, mask in zip(layers, kept, strict=True)
        for name, dim in layer.dims.items()
    }
    return {name: cut.get(name, array) for name, array in arrays.items()}


def fit(model: nn.Module, arrays: Mapping[str, np.ndarray] | Mapping[str, Tensor]) -> bool:
    """Give the adapters of an AdaLoRA model the ranks of these arrays, which it can load then; whether that was due.

    Where it was, their parameters are zero afterwards, and tensors that shared memory with them do so no longer.
    """
    if adalora_of(model) is None:
        return False
    layers = ranked_layers(find_groups(model))
    held = dict(model.named_parameters())
    if all(array not in arrays or held[array].shape == arrays[array].shape for one in layers for array in one.dims):
        return False
    fit_ranks(model, {name: torch.as_tensor(array) for name, array in arrays.items()})
    return True
