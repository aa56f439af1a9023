"""Several adapters as one: what `lowrank diffusion merge` does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowrank_core.adapters.geometry import Geometry
from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files import grouped
from lowrank_core.files.as_lora import exact_pair
from lowrank_core.files.base import base_layers, fitted, part_for
from lowrank_core.files.bundle import AdapterFile, Component, Layers, ModuleAdapter
from lowrank_core.files.check import some
from lowrank_core.files.factored import (
    LayerFit,
    Method,
    Told,
    as_file,
    check_method,
    check_rank,
    factored,
    kept_energy,
    on,
)
from lowrank_core.files.model import Format, write
from lowrank_core.files.names import with_text_level
from lowrank_core.files.read import read
from lowrank_core.files.shapes import check_kernels_known, geometry_of
from lowrank_core.files.tensors import check_free


@dataclass(frozen=True)
class Combination:
    """What was written. Without a rank to cut off at every layer keeps all its energy."""

    path: Path
    method: Method
    layers: tuple[LayerFit, ...]

    @property
    def rank(self) -> int:
        return max(layer.rank for layer in self.layers)

    @property
    def kept_energy(self) -> float:
        return kept_energy(self.layers)


@dataclass(frozen=True)
class _Part:
    """What one adapter adds to a layer: weight · scaling · ΔW as up · down, and where it comes from."""

    up: Tensor
    down: Tensor
    geometry: Geometry
    source: Path


_Layer = tuple[Component, str]


def combine(
    sources: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    *,
    method: Method = "lora",
    rank: int | None = None,
    form: Format = "kohya",
    base: Path | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    told: Told = lambda layer, done, total: None,
) -> Combination:
    """Write the one adapter whose ΔW is the weighted sum of those of several.

    As a LoRA it is exact: a sum of products is one product of all their factors side by side, so ranks add up, to at
    most the layer's own. A rank cuts it off by its singular values; a LoHa has to be fitted at one.

    sources: adapters of any method, in any form that `read` reads.
    weights: one for each.
    base: the model they are for: settles names that SDXL does not have, and kernels of flat convolutions.

    Raises:
        UsageError: not as many weights as sources, none but zero, an unknown method, a LoHa without a rank, a rank
            that no layer has, an `out` that is read.
        LowrankError: what reading raises; adapters for layers of different shapes; weight decomposition and modules
            trained whole, which have no weighted sum of this kind; `out` is there and `overwrite` is not set.
    """
    check_method(method)
    if len(weights) != len(sources):
        raise UsageError(
            f"--weights has {len(weights)} numbers for {len(sources)} adapters; give one for each, such as 0.7,0.3"
        )
    if not any(weights):
        raise UsageError("--weights are all 0, so there is nothing to merge; give one that is not")
    if method == "loha" and rank is None:
        raise UsageError(
            "a LoHa is fitted at a rank; give it with --rank, or take --method lora, which is exact without one"
        )
    check_free(
        out,
        overwrite,
        adapters={f"adapter {number}": source for number, source in enumerate(sources, 1)},
        models={} if base is None else {"--base": base},
    )
    models = None if base is None else base_layers(base)
    parts: dict[_Layer, list[_Part]] = {}
    for source, weight in zip(sources, weights, strict=True):
        if weight:
            for layer, part in _parts(source, weight, models, device):
                parts.setdefault(layer, []).append(part)
    parts = _with_one_unet(parts)
    for (_, name), own in parts.items():
        _check_shapes(name, own)
    if rank is not None:
        check_rank(rank, {name: own[0].geometry for (_, name), own in parts.items()})
    modules: dict[Component, dict[str, ModuleAdapter]] = {}
    fits: list[LayerFit] = []
    for done, ((component, name), own) in enumerate(parts.items()):
        told(name, done, len(parts))
        geometry = own[0].geometry
        up, down = torch.cat([part.up for part in own], 1), torch.cat([part.down for part in own], 0)
        module, energy, lost = factored((up, down), geometry, method, up.shape[1] if rank is None else rank)
        modules.setdefault(component, {})[name] = module
        fits.append(LayerFit(component, name, geometry.weight_shape, module.rank, energy, lost))
    files = [as_file(method, component, own) for component, own in modules.items()]
    known: dict[Component, Layers] = {
        component: {name: own[0].geometry for (part, name), own in parts.items() if part == component}
        for component in modules
    }
    return Combination(write(files, out, form, known, overwrite=overwrite), method, tuple(fits))


def _parts(
    source: Path, weight: float, models: Mapping[Component, Layers] | None, device: torch.device | str
) -> list[tuple[_Layer, _Part]]:
    """What one adapter adds, layer by layer."""
    parts: list[tuple[_Layer, _Part]] = []
    for file in read(source, models, whole=True):
        layers: Layers | None = None
        if models is not None:
            component = part_for(file.component, models, file.modules)
            layers = models[component]
            file = replace(fitted(file, layers), component=component)
        else:
            if file.component in ("te1", "te2"):
                file = file.renamed({name: with_text_level(name) for name in file.modules})
            check_kernels_known(file.config, {name: module.factors for name, module in file.modules.items()})
        _check_summable(file, source)
        file = grouped.from_peft(file)
        for name, module in file.modules.items():
            geometry = geometry_of(file.config, name, module.factors, layers)
            factors = dict(zip(module.factors, on(device, *module.factors.values()), strict=True))
            up, down = exact_pair(file.config.form, factors, geometry)
            parts.append(((file.component, name), _Part(weight * file.scaling(name) * up, down, geometry, source)))
    return parts


def _check_summable(file: AdapterFile, source: Path) -> None:
    if file.config.weight_decompose:
        raise LowrankError(
            f"{source} has weight decomposition (DoRA), which is no sum with the base's weights; merge it into them "
            "(lowrank convert --to merged)"
        )
    if file.saved:
        raise LowrankError(
            f"{source} has modules trained whole ({some(file.saved, 2)}), which only replace the base's; merge it into "
            "the base's weights (lowrank convert --to merged)"
        )


def _with_one_unet(parts: dict[_Layer, list[_Part]]) -> dict[_Layer, list[_Part]]:
    """With what does not say which model it is for taken for the UNet's, as by `infer`, where others do say."""
    if len({component for component, _ in parts}) == 1:
        return parts
    named: dict[_Layer, list[_Part]] = {}
    for (component, name), own in parts.items():
        named.setdefault((component or "unet", name), []).extend(own)
    return named


def _check_shapes(name: str, parts: Sequence[_Part]) -> None:
    first = parts[0]
    for other in parts[1:]:
        shapes = [part.geometry.weight_shape for part in (first, other)]
        if shapes[0] != shapes[1] or first.geometry.kind != other.geometry.kind:
            sizes = [" x ".join(map(str, shape)) for shape in shapes]
            raise LowrankError(
                f"{name} is {sizes[0]} for {first.source} and {sizes[1]} for {other.source}; "
                "adapters of different models have no sum"
            )
