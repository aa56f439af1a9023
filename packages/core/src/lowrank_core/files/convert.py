"""From one form of file to another, without a model: what `lowrank convert` does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from lowrank_core.adapters.config import AdaLoRA
from lowrank_core.errors import UsageError
from lowrank_core.files.as_lora import LoRAExport, as_lora
from lowrank_core.files.base import base_layers, fitted, part_for
from lowrank_core.files.bundle import AdapterFile, Component, Layers
from lowrank_core.files.diffusers_file import WEIGHTS_NAME
from lowrank_core.files.merged import write_merged
from lowrank_core.files.model import write
from lowrank_core.files.read import read
from lowrank_core.files.tensors import check_free, read_shapes

Target = Literal["peft", "kohya", "lora", "diffusers", "merged"]
TARGETS: tuple[str, ...] = get_args(Target)


@dataclass(frozen=True)
class Conversion:
    """What was written.

    rank: the largest of a module, None for merged weights. exact: nothing was cut off, beyond rounding to the stored
    dtype. lost_energy: of the squares of the scaled ΔW, the share that truncation took, or rounding if weights merged.
    """

    format: Target
    path: Path
    keys: int
    rank: int | None
    exact: bool
    lost_energy: float


def convert(
    source: Path,
    dest: Path,
    to: Target,
    *,
    base: Path | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write the adapter at `source` to `dest` in another form.

    base: the folder of the model (or diffusers pipeline) it is for: merged weights need it, plain LoRAs of flat
        convolutions do, and it settles names that SDXL does not have.
    rank: write a plain LoRA cut off at this rank (for kohya, lora and diffusers).

    Raises:
        UsageError: an unknown form, merged weights without a base, a rank where none is meant, or a `dest` that is
            read.
        LowrankError: what reading and writing raise; `dest` is there already and `overwrite` is not set.
    """
    if to not in TARGETS:
        raise UsageError(f"the form must be one of {', '.join(TARGETS)}, got {to!r}")
    if to == "merged" and base is None:
        raise UsageError("merged weights need the model's own; give its folder (--base FOLDER)")
    if rank is not None and to in ("peft", "merged"):
        raise UsageError(f"a rank is for plain LoRAs, and {to} keeps the adapter as it is; use --to lora")
    check_free(
        dest / WEIGHTS_NAME if to == "diffusers" and dest.suffix != ".safetensors" else dest,
        overwrite,
        adapters={"SOURCE": source},
        models={} if base is None else {"--base": base},
    )
    models = None if base is None else base_layers(base)
    files = read(source, models, whole=True)
    layers: dict[Component, Layers] | None = None
    if models is not None:
        parts: list[Component] = [part_for(file.component, models, file.modules) for file in files]
        files = [_for_part(fitted(file, models[part]), part) for file, part in zip(files, parts, strict=True)]
        layers = {file.component: models[part] for file, part in zip(files, parts, strict=True)}
    if to == "merged":
        assert base is not None
        report = write_merged(files, base, dest)
        return Conversion(to, dest, report.keys, None, report.lost == 0, report.lost_energy)
    exports = _exports(files, to, layers, rank)
    written = write([export.file for export in exports], dest, to, layers, overwrite=overwrite)
    energy, lost = sum(export.energy for export in exports), sum(export.lost for export in exports)
    return Conversion(
        to,
        written,
        _count(written),
        max(export.rank for export in exports),
        all(export.exact for export in exports),
        lost / energy if energy else 0.0,
    )


def _for_part(file: AdapterFile, part: Component) -> AdapterFile:
    return file if file.component else replace(file, component=part)


def _exports(
    files: Sequence[AdapterFile], to: Target, layers: dict[Component, Layers] | None, rank: int | None
) -> list[LoRAExport]:
    exports: list[LoRAExport] = []
    for file in files:
        if to in ("lora", "diffusers") or (to == "kohya" and (rank is not None or isinstance(file.config, AdaLoRA))):
            own = None if layers is None else layers[file.component]
            exports.append(as_lora(file, own, rank, magnitudes=to == "diffusers" or (to == "lora" and rank is None)))
        else:
            exports.append(LoRAExport(file, max(module.rank for module in file.modules.values()), True, 0.0, 0.0))
    return exports


def _count(path: Path) -> int:
    found = [path] if path.is_file() else sorted(path.rglob("adapter_model.safetensors"))
    return sum(len(read_shapes(file)) for file in found)
