"""An adapter as it stands in a file: every format has a reader that makes this of it, and a writer of this."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from lowrank_core.adapters.config import AdapterConfig, LoHa, LoKr, LoRA
from lowrank_core.adapters.geometry import Geometry

T = TypeVar("T")
Component = Literal["", "unet", "te1", "te2"]
"""Which model of a pipeline an adapter belongs to; empty where there is only one model, or nobody said."""

Layers = Mapping[str, Geometry]
"""The layers of a model by name: what a file does not say of itself, such as a flat convolution's kernel."""


@dataclass(frozen=True)
class ModuleAdapter:
    """One layer's factors, by the form's names (`lora_A`, `hada_w1_a`, ...) and in its shapes.

    rank, alpha: what the scale is computed from. An AdaLoRA layer keeps its initial rank here and may hold fewer rows.
    magnitude: DoRA's, one number for each output or input (see `axis`), in whatever shape the file had.
    """

    factors: Mapping[str, Tensor]
    rank: int
    alpha: float
    magnitude: Tensor | None = None
    axis: Literal["out", "in"] | None = None


@dataclass(frozen=True)
class AdapterFile:
    """An adapter of one model.

    config: as the user would have written it; its patterns give the modules the ranks and alphas they have.
    modules: by the layer's name in the model.
    saved: whole parameters (`modules_to_save`, biases) by the name that the model's state dict gives them.
    metadata: the file's own, strings.
    """

    config: AdapterConfig
    modules: Mapping[str, ModuleAdapter]
    saved: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    component: Component = ""

    def scaling(self, name: str) -> float:
        """The number that multiplies a module's composed ΔW."""
        module = self.modules[name]
        return self.config.scaling(module.rank, module.alpha)

    def renamed(self, names: Mapping[str, str]) -> "AdapterFile":
        """With modules under other names, and the config's targets and patterns to fit; those not mentioned stay."""
        modules = {names.get(name, name): module for name, module in self.modules.items()}
        if modules.keys() == self.modules.keys():
            return self
        return replace(self, modules=modules, config=with_patterns(self.config, modules))


def pattern_of(name: str) -> str:
    """A key of `rank_pattern` or `alpha_pattern` that matches this one layer.

    Dots are left as they are, as everybody writes them; the caret keeps endings of other names out.
    """
    return f"^{name}"


def with_patterns(config: AdapterConfig, modules: Mapping[str, ModuleAdapter], **changes: Any) -> AdapterConfig:
    """The config whose rank, alpha and patterns give these modules what they have, and that targets just them."""
    rank = most_common(module.rank for module in modules.values())
    alpha = most_common(module.alpha for module in modules.values())
    return replace(
        config,
        rank=rank,
        alpha=alpha,
        target_modules=list(modules),
        exclude_modules=(),
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={pattern_of(name): m.rank for name, m in modules.items() if m.rank != rank},
        alpha_pattern={pattern_of(name): m.alpha for name, m in modules.items() if m.alpha != alpha},
        **changes,
    )


def most_common(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def is_tucker(config: AdapterConfig) -> bool:
    return isinstance(config, LoRA | LoHa | LoKr) and config.tucker
