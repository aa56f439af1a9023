"""Changes of weights as an adapter's factors, and how much of each the factors keep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lowrank_core.adapters.config import LoHa, LoRA
from lowrank_core.adapters.geometry import Geometry, Shape
from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files.as_lora import lora_module
from lowrank_core.files.bundle import AdapterFile, Component, ModuleAdapter, with_patterns
from lowrank_core.files.peft import CLASS_OF_COMPONENT
from lowrank_core.fitting.hadamard import fit_hadamard
from lowrank_core.fitting.low_rank import truncated

Method = Literal["lora", "loha"]
METHODS: tuple[str, ...] = get_args(Method)
Told = Callable[[str, int, int], None]
"""Told of the layer that is worked on, how many are done, and how many there are."""


@dataclass(frozen=True)
class LayerFit:
    """One layer's ΔW `shape` and its factors: ‖ΔW‖² is `energy`, and ‖ΔW - factors‖² is `lost`."""

    component: Component
    name: str
    shape: Shape
    rank: int
    energy: float
    lost: float

    @property
    def kept_energy(self) -> float:
        return 1 - self.lost / self.energy if self.energy else 1.0


def kept_energy(layers: Sequence[LayerFit]) -> float:
    """1 - Σ‖ΔW - factors‖² / Σ‖ΔW‖² over layers."""
    energy = sum(layer.energy for layer in layers)
    return 1 - sum(layer.lost for layer in layers) / energy if energy else 1.0


def check_method(method: str) -> None:
    """Raise a UsageError if changes cannot be factorized so."""
    if method not in METHODS:
        raise UsageError(f"--method is one of {', '.join(METHODS)}, got {method!r}")


def check_rank(rank: int, geometries: Mapping[str, Geometry]) -> None:
    """Refuse a rank below 1, or above that of every layer; smaller layers get factors of their own rank.

    Raises:
        UsageError: it is.
    """
    if rank < 1:
        raise UsageError(f"--rank must be at least 1, got {rank}")
    name, largest = max(
        ((name, min(geometry.matrix_shape)) for name, geometry in geometries.items()), key=lambda each: each[1]
    )
    if rank > largest:
        raise UsageError(f"--rank {rank} is more than any layer has, at most {largest} ({name}); give a smaller one")


def factored(
    pair: tuple[Tensor, Tensor], geometry: Geometry, method: Method, rank: int
) -> tuple[ModuleAdapter, float, float]:
    """A change `up · down`, `(out, R)` and `(R, in·K)` in float64, as factors in fp32 of scale 1; ‖ΔW‖² and what is
    lost of it.

    LoRA by the singular values (Eckart-Young), LoHa by `fit_hadamard`. The rank is at most the layer's.
    """
    rank = min(rank, *geometry.matrix_shape)
    if method == "lora":
        up, down, kept, lost = truncated(*pair, rank)
        return lora_module(up.float().cpu(), down.float().cpu(), geometry, 1.0), kept + lost, lost
    if geometry.kind == "embedding":
        raise LowrankError("LoHa has no form for embeddings; take --method lora")
    change = pair[0] @ pair[1]
    fit = fit_hadamard(change, rank)
    factors = {"hada_w1_a": fit.a1, "hada_w1_b": fit.b1, "hada_w2_a": fit.a2, "hada_w2_b": fit.b2}
    energy = float(change.square().sum())
    stored = {name: factor.float().cpu().contiguous() for name, factor in factors.items()}
    return ModuleAdapter(stored, rank, rank), energy, energy * fit.error**2


def as_file(method: Method, component: Component, modules: Mapping[str, ModuleAdapter]) -> AdapterFile:
    """An adapter of these modules and nothing else."""
    config = with_patterns((LoHa if method == "loha" else LoRA)(target_modules=[]), modules)
    if component in CLASS_OF_COMPONENT:
        # As PEFT writes it down; a folder of another name says so which model it is for.
        config = replace(config, other_fields={"auto_mapping": CLASS_OF_COMPONENT[component]})
    return AdapterFile(config, modules, {}, {}, component)


def on(device: torch.device | str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in float64 on a device; on the CPU where that has no float64."""
    place = torch.device(device)
    place = place if place.type in ("cpu", "cuda") else torch.device("cpu")
    return tuple(tensor.to(place, torch.float64) for tensor in tensors)
