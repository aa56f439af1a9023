"""Reading single files of kohya's sd-scripts, LyCORIS and ComfyUI: `lora_unet_..._to_q.hada_w1_a` and the like."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_core.adapters.config import AdapterConfig, LoHa, LoKr, LoRA
from lowrank_core.errors import LowrankError
from lowrank_core.files.bundle import AdapterFile, Component, ModuleAdapter, with_patterns
from lowrank_core.files.check import FACTOR_NAMES, check_factors, some
from lowrank_core.files.kron import factor_of, full_rank, unwrapped_sides
from lowrank_core.files.names import Names, fit, names_for, resolve, split_prefix
from lowrank_core.files.peft_config import from_json
from lowrank_core.parsing import parse_json

CONFIGS_KEY = "lowrank.adapter_configs"
MODULES_KEY = "lowrank.modules"
_LEAVES = {
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "lora_mid.weight": "lora_mid",
    **{name: name for method in ("loha", "lokr") for name in FACTOR_NAMES[method]},
}
_METHODS = {"lora": LoRA, "loha": LoHa, "lokr": LoKr}
_SCALED = {"lora": ("lora_B",), "loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}
"""What LyCORIS's `scalar` multiplies when it is folded in, as its own files of version 3 and later have it."""


@dataclass
class _Raw:
    """What the file holds of one module."""

    factors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    alpha: float | None = None
    scalar: Tensor | None = None
    dora: Tensor | None = None

    @property
    def method(self) -> str:
        return next(method for method in _METHODS if self.factors.keys() & FACTOR_NAMES[method])


def is_kohya(keys: Mapping[str, Any]) -> bool:
    """Whether the keys are those of such a file: at least one has its prefix and ends in a factor's name."""
    return any(split_prefix(module) and leaf in _LEAVES for module, _, leaf in (k.partition(".") for k in keys))


def read_kohya(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    known: Names | None = None,
    *,
    whole: bool = False,
) -> list[AdapterFile]:
    """The adapters in a file, one for each model it speaks of.

    Block names may be sgm's or diffusers'. `alpha` is a module's own, its rank where there is none; a LoKr of two whole
    sides counts once, whatever its alpha, as in LyCORIS and ComfyUI. A file that we wrote carries PEFT's configuration,
    from which ranks, alphas and factors come back to the bit.

    known: the names of the modules of the models at hand: parts of the file for other models are left out. Without it
        all of them are read, and names are those of SDXL, or the file's own.
    whole: raise instead of leaving a part out.

    Raises:
        LowrankError: keys that are no adapter's or match no module, factors that are missing or do not fit, algorithms
            mixed within a model.
    """
    raw, foreign = _collect(tensors)
    if foreign:
        raise LowrankError(f"{path} has keys that belong to no LoRA, LoHa or LoKr module: {some(foreign)}")
    own: dict[str, dict[str, Any]] = _own(metadata, CONFIGS_KEY, path, dict)
    written: dict[str, str] = _own(metadata, MODULES_KEY, path, str)
    if len(set(written.values())) < len(written):
        raise LowrankError(f"{path} gives two modules one name in {MODULES_KEY} of its metadata; write the file anew")
    parts: defaultdict[Component, dict[str, _Raw]] = defaultdict(dict)
    for module, held in raw.items():
        component, flat = cast("tuple[Component, str]", split_prefix(module))
        parts[component][module if module in written else flat] = held
    files: list[AdapterFile] = []
    for component, modules in parts.items():
        at_hand = names_for(component, known, single=len(parts) == 1, whole=whole)
        if known is not None and at_hand is None:
            continue  # for a model that is not at hand
        names = {module: written[module] for module in modules if module in written}
        names |= resolve([module for module in modules if module not in names], component, at_hand)
        held = {names[module]: each for module, each in modules.items()}
        file = _file(held, own.get(component), metadata, component, path)
        files.append(file if at_hand is None else file.renamed(fit(file.modules, component, at_hand)))
    return files


def _own(metadata: Mapping[str, str], key: str, path: Path, kind: type) -> dict[str, Any]:
    """What we wrote into a file's metadata, names with values of that kind."""
    try:
        value = parse_json(metadata.get(key, "{}"))
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(one, kind) for one in cast("dict[str, Any]", value).values()):
        raise LowrankError(
            f"{path} has {key} in its metadata that is not JSON of ours; copy or download the file again"
        )
    return cast("dict[str, Any]", value)


def _collect(tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Raw], list[str]]:
    """The tensors by module, and the keys that are no adapter's."""
    raw: defaultdict[str, _Raw] = defaultdict(_Raw)
    foreign: list[str] = []
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        if not split_prefix(module):
            foreign.append(key)
        elif leaf in _LEAVES:
            raw[module].factors[_LEAVES[leaf]] = tensor
        elif leaf == "alpha" and tensor.numel() == 1:
            raw[module].alpha = float(tensor)
        elif leaf == "scalar" and tensor.numel() == 1:
            raw[module].scalar = tensor
        elif leaf == "dora_scale":
            raw[module].dora = tensor
        else:
            foreign.append(key)
    for module, held in list(raw.items()):
        if not held.factors:
            foreign.append(f"{module} (without factors)")
    return dict(raw), foreign


def _file(
    held: dict[str, _Raw], own: Any, metadata: Mapping[str, str], component: Component, path: Path
) -> AdapterFile:
    methods: defaultdict[str, list[str]] = defaultdict(list)
    for name, each in held.items():
        methods[each.method].append(name)
    if len(methods) > 1:
        found = "; ".join(f"{method} for {some(names, 2)}" for method, names in methods.items())
        raise LowrankError(f"{path} mixes algorithms ({found}); an adapter here has one, so split the file by them")
    method = next(iter(methods))
    config: AdapterConfig | None = from_json(own) if own is not None else None
    if config is not None and config.method != method:
        raise LowrankError(f"{path} holds {method} factors, but its metadata says {config.method}; write the file anew")
    for name, each in held.items():
        _normalise(method, name, each)
    decomposed = {name: _axis(name, each.dora) for name, each in held.items() if each.dora is not None}
    if decomposed and (len(decomposed) < len(held) or len(set(decomposed.values())) > 1):
        raise LowrankError(f"{path} has dora_scale for some modules only, or along two axes; write the file anew")
    modules: dict[str, ModuleAdapter] = {}
    for name, each in held.items():
        rank, alpha = _rank_and_alpha(method, name, each)
        axis: Any = decomposed.get(name)
        modules[name] = ModuleAdapter(each.factors, rank, alpha, each.dora, axis)
    if config is not None:
        return replace(
            AdapterFile(config, modules, {}, dict(metadata), component), modules=_as_configured(config, modules, path)
        )
    changes: dict[str, Any] = {"weight_decompose": next(iter(decomposed.values()), None)}
    if method == "lokr":
        changes["decompose_both"] = any("lokr_w1_a" in each.factors for each in held.values())
        changes["factor"] = factor_of({name: each.factors for name, each in held.items()})
    cores = ("lora_mid", "hada_t1", "lokr_t2")
    changes["tucker"] = any(core in each.factors for each in held.values() for core in cores)
    config = with_patterns(_METHODS[method](target_modules=[]), modules, **changes)
    return AdapterFile(config, modules, {}, dict(metadata), component)


def _normalise(method: str, name: str, raw: _Raw) -> None:
    """Old ways of writing, brought to the present one: a single core for both sides, a scalar apart, short kernels."""
    factors = raw.factors
    if "hada_t1" in factors and "hada_t2" not in factors:
        factors["hada_t2"] = factors["hada_t1"]
    for core in ("hada_t1", "hada_t2", "lokr_t2"):
        if core in factors and factors[core].dim() == 3:
            factors[core] = factors[core].unsqueeze(-1)  # PEFT keeps a second dimension of one
    if raw.scalar is not None:
        scaled = next((key for key in _SCALED[method] if key in factors), None)
        if scaled is not None:
            factors[scaled] = factors[scaled] * raw.scalar.to(factors[scaled].dtype)
    check_factors(method, name, factors)


def _rank_and_alpha(method: str, name: str, raw: _Raw) -> tuple[int, float]:
    if raw.alpha is not None and not math.isfinite(raw.alpha):
        raise LowrankError(f"{name} has alpha {raw.alpha}, expected a finite number; correct the file")
    if method == "lokr" and {"lokr_w1", "lokr_w2"} <= raw.factors.keys():
        # Both sides whole: the file's readers apply no scale, and the rank is any that leaves the sides whole.
        rank = full_rank(raw.factors)
        return rank, rank
    rank = check_factors(method, name, raw.factors)
    if method == "lokr":
        side = "lokr_w2_b" if "lokr_w2_b" in raw.factors else "lokr_w1_b"
        rank = raw.factors[side].shape[0]
    # LyCORIS takes an alpha of zero as none.
    alpha = raw.alpha or rank
    if not alpha > 0:
        raise LowrankError(f"{name} has alpha {alpha}, expected a positive number; correct the file")
    return rank, int(alpha) if float(alpha).is_integer() else alpha


def _as_configured(config: AdapterConfig, modules: Mapping[str, ModuleAdapter], path: Path) -> dict[str, ModuleAdapter]:
    """The modules with the ranks and alphas of the configuration that travelled with the file."""
    from lowrank_core.files.peft import ranks_and_alphas

    configured: dict[str, ModuleAdapter] = {}
    said = ranks_and_alphas(config, modules)
    for name, module in modules.items():
        rank, alpha = said[name]
        if module.axis != config.weight_decompose:
            what = "has magnitudes" if module.axis else "has no magnitudes"
            raise LowrankError(f"{path} {what} for {name}, but its metadata says otherwise; write it anew")
        factors = dict(module.factors)
        if isinstance(config, LoKr):
            factors = unwrapped_sides(factors, config.scaling(rank, alpha), rank)
        elif rank != module.rank:
            raise LowrankError(f"{path} has rank {module.rank} for {name}, but its metadata says {rank}; write it anew")
        configured[name] = replace(module, factors=factors, rank=rank, alpha=alpha)
    return configured


def _axis(name: str, dora: Tensor | None) -> str:
    """Which axis a `dora_scale` is of, by its shape: `(out, 1, ...)` or `(1, in, ...)`; of one number, the outputs."""
    shape = () if dora is None else tuple(dora.shape)
    if len(shape) >= 2 and max(shape) == torch.Size(shape).numel():
        return "in" if shape[0] == 1 and shape[1] > 1 else "out"
    if len(shape) == 1:
        return "out"
    raise LowrankError(f"{name} has dora_scale of shape {shape}, expected (out, 1, ...) or (1, in, ...)")
