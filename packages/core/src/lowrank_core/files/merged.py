"""Adapters merged into the weights of their base: folders that load without any of this."""

import os
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank_core.adapters.dora import decomposed_change
from lowrank_core.adapters.merge import round_once
from lowrank_core.errors import LowrankError
from lowrank_core.files import grouped
from lowrank_core.files.base import FOLDER_OF, base_layers, fitted, geometry_of_shape, part_for, weight_files
from lowrank_core.files.bundle import AdapterFile, Component
from lowrank_core.files.check import some
from lowrank_core.files.shapes import geometry_of
from lowrank_core.files.tensors import read_tensors, write_tensors


@dataclass
class Rounding:
    """energy: of what the adapters add, the sum of its squares; lost: of what rounding to the base's dtype took."""

    keys: int = 0
    energy: float = 0.0
    lost: float = 0.0

    @property
    def lost_energy(self) -> float:
        return self.lost / self.energy if self.energy else 0.0


def write_merged(files: Sequence[AdapterFile], base: Path, out: Path) -> Rounding:
    """Write the base with W + s·ΔW (or DoRA's m ⊙ (W + s·ΔW) / ‖W + s·ΔW‖) in place of each adapted W.

    Sums are taken in float64 and rounded once, to the base's dtype. Files keep their names; everything else in the
    base's folder (configurations, tokenizers, other models) is copied.

    Raises:
        LowrankError: a base without weights, or without the layers that the adapters are for; factors that do not fit.
    """
    sources, layers = weight_files(base), base_layers(base)
    parts: dict[Component, list[AdapterFile]] = {}
    for file in files:
        part = part_for(file.component, sources, file.modules)
        parts.setdefault(part, []).append(grouped.from_peft(fitted(file, layers[part])))
    with _whole_or_not_at_all(out) as folder:
        report = _write(parts, sources, folder, base)
        if base.is_dir():
            _copy_others(base, folder, {path for part in parts for path in sources[part]})
    return report


def _write(
    parts: Mapping[Component, Sequence[AdapterFile]],
    sources: Mapping[Component, Sequence[Path]],
    out: Path,
    base: Path,
) -> Rounding:
    report = Rounding()
    expected = {(part, key) for part, held in parts.items() for file in held for key in file.saved}
    for part, held in parts.items():
        folder = out / FOLDER_OF[part] if part and base.is_dir() else out
        for source in sources[part]:
            tensors, metadata = read_tensors(source)
            merged = {key: _merged(key, tensor, held, report) for key, tensor in tensors.items()}
            expected -= {(part, key) for key in tensors}
            report.keys += len(merged)
            write_tensors(folder / source.name, merged, metadata)
    if expected:
        raise LowrankError(f"the base has no {some(key for _, key in expected)}; give the model it was trained on")
    return report


@contextmanager
def _whole_or_not_at_all(out: Path) -> Generator[Path]:
    """A folder to write to that becomes `out` at the end, unless something fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise LowrankError(f"cannot write to {out}: {error.strerror}; choose another place") from None
    try:
        yield part
        part.chmod(0o755)
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _merged(key: str, weight: Tensor, files: Sequence[AdapterFile], report: Rounding) -> Tensor:
    name = key.removesuffix(".weight")
    for file in files:
        if key in file.saved:
            return file.saved[key].to(weight.dtype)
        if key.endswith(".weight") and name in file.modules:
            if not weight.is_floating_point():
                raise LowrankError(f"{key} is quantized ({weight.dtype}); give the base model unquantized")
            change = change_of(file, name, weight)
            exact = weight.double() + change
            rounded = round_once(exact, weight.dtype)
            if not torch.isfinite(rounded).all():
                raise LowrankError(
                    f"merging into {key} gives numbers that {str(weight.dtype).removeprefix('torch.')} cannot hold; "
                    "give the base model in a wider dtype"
                )
            report.energy += float(change.square().sum())
            report.lost += float((rounded.double() - exact).square().sum())
            weight = rounded
    return weight


def change_of(file: AdapterFile, name: str, weight: Tensor) -> Tensor:
    """What an adapter adds to a stored weight, in float64."""
    module = file.modules[name]
    geometry = geometry_of(file.config, name, module.factors, {name: geometry_of_shape(tuple(weight.shape))})
    factors: Mapping[str, Tensor] = {key: factor.double() for key, factor in module.factors.items()}
    change = file.scaling(name) * file.config.form.compose(factors, geometry)
    if module.magnitude is not None:
        ones = (1,) * (change.dim() - 2)
        magnitude = module.magnitude.double().reshape((1, -1, *ones) if module.axis == "in" else (-1, 1, *ones))
        change = decomposed_change(geometry.as_stored(weight.double()), change, magnitude)
    return geometry.as_stored(change)


def _copy_others(base: Path, out: Path, changed: set[Path]) -> None:
    for path in sorted(base.rglob("*")):
        target = out / path.relative_to(base)
        # Other variants of a merged model would be loaded in its place by whoever asks for them.
        stale = path.suffix == ".safetensors" and path.parent in {source.parent for source in changed}
        if path.is_dir() or path in changed or stale:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
