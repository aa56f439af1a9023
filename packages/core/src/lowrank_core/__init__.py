"""Low-rank factors for PyTorch: layers whose weights are compositions, rank rules, initialisation.

Names are imported on first use, because importing torch takes seconds and `import lowrank_core` should not.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_core.adapters.config import AdaLoRA, LoHa, LoKr, LoRA
    from lowrank_core.adapters.control import (
        adapters_of,
        configs_of,
        disable,
        set_active,
        set_scale,
        trainable_parameters,
    )
    from lowrank_core.adapters.inject import inject, remove
    from lowrank_core.adapters.layer import AdaptedLayer, Adapter
    from lowrank_core.adapters.merge import MergeReport, merge, unmerge
    from lowrank_core.adapters.patch import PatchReport, patch_peft, restore
    from lowrank_core.adapters.targets import Target, find_targets
    from lowrank_core.adapters.tensors import load_state_dict_into, state_dict_of
    from lowrank_core.adaptive import AdaptiveRank, RankAllocator, adapt_ranks, fit_ranks, rank_pattern
    from lowrank_core.compilation import compile
    from lowrank_core.errors import LowrankError, UsageError
    from lowrank_core.factorizations import Hadamard, Kronecker, LowRank, Svd
    from lowrank_core.files import load, save
    from lowrank_core.jacobian import composed_weights, jacobian_correction
    from lowrank_core.layers import FactorizedConv2d, FactorizedLinear, FactorizedLSTM, FactorizedWeight, WeightNormLSTM
    from lowrank_core.ranks import FixedRank, Gamma, Ratio
    from lowrank_core.replacement import FactorizeReport, factorize

_HOMES = {
    "adapters.config": ("AdaLoRA", "LoHa", "LoKr", "LoRA"),
    "adapters.control": ("adapters_of", "configs_of", "disable", "set_active", "set_scale", "trainable_parameters"),
    "adapters.inject": ("inject", "remove"),
    "adapters.layer": ("AdaptedLayer", "Adapter"),
    "adapters.merge": ("MergeReport", "merge", "unmerge"),
    "adapters.targets": ("Target", "find_targets"),
    "adapters.tensors": ("load_state_dict_into", "state_dict_of"),
    "adapters.patch": ("PatchReport", "patch_peft", "restore"),
    "adaptive": ("AdaptiveRank", "RankAllocator", "adapt_ranks", "fit_ranks", "rank_pattern"),
    "compilation": ("compile",),
    "errors": ("LowrankError", "UsageError"),
    "files": ("load", "save"),
    "factorizations": ("Hadamard", "Kronecker", "LowRank", "Svd"),
    "replacement": ("FactorizeReport", "factorize"),
    "jacobian": ("composed_weights", "jacobian_correction"),
    "layers": ("FactorizedConv2d", "FactorizedLSTM", "FactorizedLinear", "FactorizedWeight", "WeightNormLSTM"),
    "ranks": ("FixedRank", "Gamma", "Ratio"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdaLoRA",
    "AdaptedLayer",
    "Adapter",
    "AdaptiveRank",
    "FactorizeReport",
    "FactorizedConv2d",
    "FactorizedLSTM",
    "FactorizedLinear",
    "FactorizedWeight",
    "FixedRank",
    "Gamma",
    "Hadamard",
    "Kronecker",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRank",
    "LowrankError",
    "MergeReport",
    "PatchReport",
    "RankAllocator",
    "Ratio",
    "Svd",
    "Target",
    "UsageError",
    "WeightNormLSTM",
    "adapt_ranks",
    "adapters_of",
    "compile",
    "composed_weights",
    "configs_of",
    "disable",
    "factorize",
    "find_targets",
    "fit_ranks",
    "inject",
    "jacobian_correction",
    "load",
    "load_state_dict_into",
    "merge",
    "patch_peft",
    "rank_pattern",
    "remove",
    "restore",
    "save",
    "set_active",
    "set_scale",
    "state_dict_of",
    "trainable_parameters",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("lowrank-core")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
