"""Low-rank factors for PyTorch: layers whose weights are compositions, rank rules, initialisation.

Names are imported on first use, because importing torch takes seconds and `import lowrank_core` should not.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_core.adapters.patch import PatchReport, patch_peft, restore
    from lowrank_core.compilation import compile
    from lowrank_core.errors import LowrankError, UsageError
    from lowrank_core.factorizations import Hadamard, LowRank
    from lowrank_core.jacobian import composed_weights, jacobian_correction
    from lowrank_core.layers import FactorizedConv2d, FactorizedLinear, FactorizedLSTM, FactorizedWeight, WeightNormLSTM
    from lowrank_core.ranks import FixedRank, Gamma, Ratio
    from lowrank_core.replacement import FactorizeReport, factorize

_HOMES = {
    "adapters.patch": ("PatchReport", "patch_peft", "restore"),
    "compilation": ("compile",),
    "errors": ("LowrankError", "UsageError"),
    "factorizations": ("Hadamard", "LowRank"),
    "replacement": ("FactorizeReport", "factorize"),
    "jacobian": ("composed_weights", "jacobian_correction"),
    "layers": ("FactorizedConv2d", "FactorizedLSTM", "FactorizedLinear", "FactorizedWeight", "WeightNormLSTM"),
    "ranks": ("FixedRank", "Gamma", "Ratio"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "FactorizeReport",
    "FactorizedConv2d",
    "FactorizedLSTM",
    "FactorizedLinear",
    "FactorizedWeight",
    "FixedRank",
    "Gamma",
    "Hadamard",
    "LowRank",
    "LowrankError",
    "PatchReport",
    "Ratio",
    "UsageError",
    "WeightNormLSTM",
    "compile",
    "composed_weights",
    "factorize",
    "jacobian_correction",
    "patch_peft",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("lowrank-core")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
