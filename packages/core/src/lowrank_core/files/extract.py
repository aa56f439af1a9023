"""An adapter out of two models: what `lowrank diffusion extract` does."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank_core.errors import LowrankError
from lowrank_core.files.base import geometry_of_shape
from lowrank_core.files.bundle import Component, Layers, ModuleAdapter
from lowrank_core.files.difference import Model, TwoModels, opened, path_of
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
from lowrank_core.files.tensors import check_free
from lowrank_core.fitting.low_rank import whole_pair


@dataclass(frozen=True)
class Extraction:
    """What was written.

    layers: those that differ. unchanged: how many layers do not. left_out: other tensors that differ, which no
    adapter holds (norms, biases, embeddings), by their names in the files.
    """

    path: Path
    method: Method
    layers: tuple[LayerFit, ...]
    unchanged: int
    left_out: tuple[str, ...]

    @property
    def kept_energy(self) -> float:
        return kept_energy(self.layers)


def extract(
    base: Model,
    tuned: Model,
    out: Path,
    *,
    method: Method = "lora",
    rank: int = 16,
    form: Format = "kohya",
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    told: Told = lambda layer, done, total: None,
) -> Extraction:
    """Write what two models differ by, in linear layers and convolutions, as an adapter for the first.

    Of each model one weight at a time is in memory.

    base, tuned: folders of diffusers pipelines or of single networks, in safetensors; or networks that were found
        elsewhere.
    device: what computes, in float64.

    Raises:
        UsageError: an unknown method, a rank that no layer has, or an `out` that is read.
        LowrankError: what `opened` raises; weights that are quantized or not finite; no difference at all; `out` is
            there already and `overwrite` is not set; what writing raises.
    """
    check_method(method)
    check_free(out, overwrite, models={"BASE": path_of(base), "TUNED": path_of(tuned)})
    modules: defaultdict[Component, dict[str, ModuleAdapter]] = defaultdict(dict)
    fits: list[LayerFit] = []
    left_out: list[str] = []
    with opened(base, tuned) as pairs:
        known: dict[Component, Layers] = {
            pair.component: {_module(key): geometry_of_shape(pair.base.shapes[key]) for key in pair.base.layers}
            for pair in pairs
        }
        check_rank(rank, {name: geometry for layers in known.values() for name, geometry in layers.items()})
        total, done = sum(map(len, known.values())), 0
        for pair in pairs:
            left_out += _others_changed(pair)
            for name, geometry in known[pair.component].items():
                told(name, done, total)
                done += 1
                change = _change(pair, f"{name}.weight", device)
                if change is None:
                    continue
                module, energy, lost = factored(whole_pair(change), geometry, method, rank)
                modules[pair.component][name] = module
                fits.append(LayerFit(pair.component, name, geometry.weight_shape, module.rank, energy, lost))
    if not fits:
        also = f"; {len(left_out)} other tensors differ, which no adapter holds" if left_out else ""
        raise LowrankError(f"every layer of {tuned} is that of {base}, so there is nothing to extract{also}")
    files = [as_file(method, component, own) for component, own in modules.items()]
    path = write(files, out, form, known, overwrite=overwrite)
    return Extraction(path, method, tuple(fits), total - len(fits), tuple(left_out))


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _others_changed(pair: TwoModels) -> list[str]:
    """The names of tensors in both models, other than layers' weights, that differ."""
    others = pair.base.shapes.keys() & pair.tuned.shapes.keys() - set(pair.base.layers)
    return [name for name in sorted(others) if _differ(pair.base.read(name), pair.tuned.read(name))]


def _differ(one: Tensor, two: Tensor) -> bool:
    # An embedding is too large for float64, and no wider dtype tells more.
    dtype = torch.promote_types(one.dtype, two.dtype)
    return one.shape != two.shape or not torch.equal(one.to(dtype), two.to(dtype))


def _change(pair: TwoModels, key: str, device: torch.device | str) -> Tensor | None:
    """ΔW as the matrix `(out, in·K)` in float64 on the device; None where there is none."""
    base, tuned = pair.base.read(key), pair.tuned.read(key)
    for weight in (base, tuned):
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            kind = str(weight.dtype).removeprefix("torch.")
            raise LowrankError(f"{key} is quantized ({kind}); give both models unquantized")
    change = (on(device, tuned)[0] - on(device, base)[0]).flatten(1)
    if not torch.isfinite(change).all():
        raise LowrankError(f"{key} has numbers that are not finite; give two whole models")
    return change if change.any() else None
