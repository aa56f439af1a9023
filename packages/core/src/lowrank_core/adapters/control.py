"""What is on a model, and what of it is in use."""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from lowrank_core.adapters.config import AdapterConfig
from lowrank_core.adapters.fastpath import Switched
from lowrank_core.adapters.layer import AdaptedLayer, Adapter
from lowrank_core.adapters.saved import SavedModule
from lowrank_core.adapters.wrapper import wrappers
from lowrank_core.errors import UsageError, quoted


@dataclass
class Record:
    """What `inject` notes on a model: the adapters' configurations, and what was different before."""

    configs: dict[str, AdapterConfig] = field(default_factory=dict[str, AdapterConfig])
    trainable: frozenset[str] = frozenset()
    switched: Switched = ()


def record_of(model: nn.Module) -> Record:
    """The model's record; an empty one that is not kept where there is none."""
    record = getattr(model, "lowrank_adapters", None)
    return record if isinstance(record, Record) else Record()


def keep_record(model: nn.Module, record: Record) -> None:
    """Note a record on the model, or nothing where it is empty."""
    if record.configs:
        cast(Any, model).lowrank_adapters = record
    elif hasattr(model, "lowrank_adapters"):
        del model.lowrank_adapters


def configs_of(model: nn.Module) -> dict[str, AdapterConfig]:
    """The adapters that `inject` put on this model, by name."""
    return dict(record_of(model).configs)


def layers_of(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers that carry adapters, by the names they had before."""
    return {name: module for name, module in wrappers(model) if isinstance(module, AdaptedLayer)}


def saved_of(model: nn.Module) -> dict[str, SavedModule]:
    """The modules that are trained whole, by the names they had before."""
    return {name: module for name, module in wrappers(model) if isinstance(module, SavedModule)}


def adapters_of(model: nn.Module, name: str | None = None) -> dict[str, Adapter]:
    """The adapter called `name` (the only one, if None) layer by layer, under the names of the original model.

    Raises:
        UsageError: there is no such adapter, or several and none is named.
    """
    if name is None:
        names = list(configs_of(model))
        if len(names) > 1:
            raise UsageError(f"the model has {len(names)} adapters, {quoted(names)}; say which one is meant")
        name = names[0] if names else "default"
    check_names(model, [name])
    return {path: layer.adapter(name) for path, layer in layers_of(model).items() if name in layer.adapters}


def set_active(model: nn.Module, names: Sequence[str] | str, weights: Sequence[float] | None = None) -> None:
    """Use these adapters, summed, and no others; they alone are trainable.

    weights: a factor for each, as `set_scale` sets it; left as they are if None.

    Raises:
        UsageError: a name the model does not have, as many weights as names are not given, adapters that both train a
            copy of one module, or merged weights.
    """
    names = [names] if isinstance(names, str) else list(names)
    check_names(model, names)
    check_unmerged(model)
    if weights is not None and len(weights) != len(names):
        raise UsageError(f"weights must have one number for each adapter, got {len(weights)} for {quoted(names)}")
    saved, layers = saved_of(model), layers_of(model)
    for path, module in saved.items():
        several = [name for name in names if name in module.copies]
        if len(several) > 1:
            raise UsageError(
                f"{quoted(several)} each train a copy of {path}, and it can be only one; activate one of them"
            )
    for layer in layers.values():
        layer.active = [name for name in names if name in layer.adapters]
    for module in saved.values():
        module.active = [name for name in names if name in module.copies]
    for parts in [layer.adapters for layer in layers.values()] + [module.copies for module in saved.values()]:
        for name, part in parts.items():
            part.requires_grad_(name in names)
    for name, weight in zip(names, weights or (), strict=False):
        set_scale(model, weight, name)


def set_scale(model: nn.Module, scale: float, name: str | None = None) -> None:
    """Let an adapter (all of them, if None) count `scale` times, on top of its own alpha / rank; 1 is as trained.

    Raises:
        UsageError: a name the model does not have, a scale that is not finite, or merged weights.
    """
    if not math.isfinite(scale):
        raise UsageError(f"scale must be a finite number, got {scale}")
    check_names(model, [] if name is None else [name])
    check_unmerged(model)
    for layer in layers_of(model).values():
        for adapter_name in layer.adapters:
            if name in (None, adapter_name):
                layer.adapter(adapter_name).weight = float(scale)


@contextmanager
def disable(model: nn.Module) -> Generator[None]:
    """Within the block the model is what it was without adapters, trained copies of modules included.

    Raises:
        UsageError: the model has no adapters, or merged weights.
    """
    check_names(model, [])
    check_unmerged(model)
    modules = [*layers_of(model).values(), *saved_of(model).values()]
    before = [module.disabled for module in modules]
    try:
        for module in modules:
            module.disabled = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.disabled = value


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should get: the parameters that require gradients, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raise a UsageError for a model without adapters, or a name that none of them has."""
    known = list(configs_of(model))
    if not known:
        raise UsageError("the model has no adapters; inject one first")
    for name in names:
        if name not in known:
            raise UsageError(f"the model has no adapter {name!r}, only {quoted(known)}; name one of these")


def check_unmerged(model: nn.Module) -> None:
    """Raise a UsageError if adapters are merged into a layer."""
    for path, layer in layers_of(model).items():
        if layer.merged:
            raise UsageError(f"{quoted(layer.merged)} is merged into {path}; unmerge the model first")
