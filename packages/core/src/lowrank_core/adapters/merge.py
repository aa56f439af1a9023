"""Adapters into the weights of the layers they are on, and out again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_core.adapters.control import check_names, check_unmerged, layers_of
from lowrank_core.adapters.layer import AdaptedLayer
from lowrank_core.adapters.wrapper import original_modules
from lowrank_core.errors import LowrankError, UsageError, quoted


@dataclass(frozen=True)
class MergedLayer:
    """One layer's merge: ‖ΔW‖, and the part of it that rounding to the weight's dtype lost.

    lost: ‖merged - (W + ΔW)‖ / ‖ΔW‖, 0 where nothing is lost and about 1 where nothing of ΔW is left.
    untied: the names of layers that had this very weight, and keep it as it was.
    """

    name: str
    dtype: torch.dtype
    norm: float
    lost: float
    untied: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did to each layer; `lost` is that of all of them as one vector."""

    names: tuple[str, ...]
    layers: tuple[MergedLayer, ...]

    @property
    def lost(self) -> float:
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.lost * layer.norm for layer in self.layers)) / norm if norm else 0.0

    def __str__(self) -> str:
        lines = [
            f"{layer.name}: {str(layer.dtype).removeprefix('torch.')}, rounding lost {layer.lost:.2%} of the change"
            + (f", no longer tied to {', '.join(layer.untied)}" if layer.untied else "")
            for layer in self.layers
        ]
        return "\n".join([*lines, f"{len(self.layers)} layers merged, rounding lost {self.lost:.2%} of the change"])


@torch.no_grad()
def merge(model: nn.Module, names: Sequence[str] | str | None = None) -> MergeReport:
    """Add adapters to the weights of their layers, in place: base + Σ weight · scaling · ΔW, or DoRA's change.

    The sum is taken in float64 and rounded once, to the dtype of the weight; the report says what that lost. Adapters
    that are not merged stay beside the layer if they are in use. The merged weight is a parameter of its own: a layer
    that shared the weight keeps the old one, and the report names it. The old weight stays in memory, on the model's
    device, until `remove(model, keep_merged=True)`; `unmerge` puts it back to the bit. Trained copies of modules
    (`modules_to_save`) are in use before and after, and are no part of it.

    names: the adapters to merge; those in use if None.

    Raises:
        UsageError: a name the model does not have, nothing to merge, merged weights, weights that are computed or on
            the meta device, an embedding with max_norm (which rescales its rows when they are looked up).
        LowrankError: a merged weight is not finite in the weight's dtype. The model is then unchanged.
    """
    wanted = [names] if isinstance(names, str) else names
    check_names(model, wanted or [])
    check_unmerged(model)
    plans: list[tuple[AdaptedLayer, tuple[str, ...], nn.Parameter]] = []
    reports: list[MergedLayer] = []
    tied = _names_by_weight(model)
    for path, layer in layers_of(model).items():
        chosen = tuple(n for n in (layer.active if wanted is None else dict.fromkeys(wanted)) if n in layer.adapters)
        if chosen:
            weight, report = _merged(path, layer, chosen, tied)
            plans.append((layer, chosen, weight))
            reports.append(report)
    if not plans:
        raise UsageError("there is nothing to merge: no layer has an adapter in use; name adapters, or call set_active")
    for layer, chosen, weight in plans:
        layer.original["weight"] = cast(nn.Parameter, layer.base.weight)
        layer.base.weight = weight
        layer.merged = chosen
    return MergeReport(tuple(dict.fromkeys(n for _, chosen, _ in plans for n in chosen)), tuple(reports))


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the weights: the parameters from before come back, with their bits and their ties.

    Raises:
        UsageError: nothing is merged.
    """
    merged = [layer for layer in layers_of(model).values() if layer.merged]
    if not merged:
        raise UsageError("no adapter is merged into this model; call merge first")
    for layer in merged:
        layer.base.weight = layer.original.pop("weight")
        layer.merged = ()


def _merged(
    path: str, layer: AdaptedLayer, names: Sequence[str], tied: Mapping[int, list[str]]
) -> tuple[nn.Parameter, MergedLayer]:
    if "weight" not in dict(layer.base.named_parameters(recurse=False)):
        raise UsageError(
            f"{path} computes its weight (a parametrization, or a quantized layer), so nothing can be merged into it; "
            "remove that, or load the model unquantized"
        )
    old = cast(nn.Parameter, layer.base.weight)
    if old.is_meta:
        raise UsageError(f"{path} is on the meta device, which holds no numbers to merge; load its weight first")
    if getattr(layer.base, "max_norm", None) is not None:
        raise UsageError(
            f"{path} is an Embedding that rescales rows to max_norm {layer.base.max_norm} when they are looked up, "
            "so no merged weight is equal; merge other adapters by name"
        )
    # Some accelerators have no float64.
    device = old.device if old.device.type in ("cpu", "cuda") else torch.device("cpu")
    base = layer.base_weight().to(device, torch.float64)
    change = torch.zeros_like(base)
    for name in names:
        change += layer.adapter(name).change(base, torch.float64, device)
    exact = base + change
    new = round_once(exact, old.dtype)
    dtype = str(old.dtype).removeprefix("torch.")
    if not bool(torch.isfinite(new).all()):
        raise LowrankError(
            f"merging {quoted(names)} into {path} gives numbers that {dtype} cannot hold; "
            "lower the adapter's scale, or convert the model to a wider dtype"
        )
    norm = _norm(change)
    lost = _norm(new.to(torch.float64) - exact) / norm if norm else 0.0
    others = tuple(name for name in tied[id(old)] if name != path)
    stored = layer.geometry.as_stored(new).contiguous().to(old.device)
    return nn.Parameter(stored, old.requires_grad), MergedLayer(path, old.dtype, norm, lost, others)


def _names_by_weight(model: nn.Module) -> dict[int, list[str]]:
    """The layers that hold each weight."""
    names: dict[int, list[str]] = {}
    for name, module in original_modules(model):
        weight = cast(Any, module)._parameters.get("weight")
        if weight is not None:
            names.setdefault(id(weight), []).append(name)
    return names


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 values to the nearest of a dtype, ties to even.

    torch goes through float32 to 16 bits and fewer, and rounds twice. Here the way through float32 rounds to odd, which
    leaves the second rounding all it must know (Boldo and Melquiond, https://doi.org/10.1109/TC.2008.105).
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    near = values.to(torch.float32)
    error = values - near.to(torch.float64)
    even = near.view(torch.int32) % 2 == 0
    beyond = torch.nextafter(near, torch.where(error > 0, torch.inf, -torch.inf).to(near))
    return torch.where((error != 0) & even & near.isfinite(), beyond, near).to(dtype)


def _norm(values: Tensor) -> float:
    return float(values.square().sum().sqrt())
