"""Put adapters onto a model and take them off."""

import copy
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lowrank_core.adapters.config import AdapterConfig
from lowrank_core.adapters.control import (
    Record,
    check_names,
    check_unmerged,
    keep_record,
    layers_of,
    record_of,
    saved_of,
    set_active,
)
from lowrank_core.adapters.fastpath import switch_off, switch_on
from lowrank_core.adapters.layer import AdaptedLayer, Adapter
from lowrank_core.adapters.saved import SavedModule
from lowrank_core.adapters.targets import Target, find_targets, saved_names
from lowrank_core.adapters.wrapper import original_modules, replace
from lowrank_core.errors import UsageError


def inject(
    model: nn.Module, config: AdapterConfig, name: str = "default", *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Put an adapter on the layers that `config` means, in place, and make it the one in use and in training.

    Every other parameter is frozen, except copies of `modules_to_save`. Several adapters may be put on a model under
    names of their own; `set_active` combines them. Weights may be on the meta device: the factors are then too.

    A layer is replaced by an `AdaptedLayer` under all its names. Weights that layers share stay shared, and an adapter
    on one of the layers (an embedding, say) changes that layer alone, not the other (the output).

    Args:
        model: any module that holds layers; a layer itself cannot be replaced in place.
        config: `LoRA`, `LoHa`, `LoKr` or `AdaLoRA`.
        name: what to call the adapter; a key of torch's ModuleDict, so without dots.
        dtype: the factors'; float32 unless given, float64 on float64 layers.

    Returns:
        The model.

    Raises:
        UsageError: what `find_targets` raises; a name taken or not usable; a dtype that is not of real numbers; merged
            weights; an adapter on a layer inside a module that another trains whole. The model is then unchanged.
    """
    if not isinstance(config, AdapterConfig) or not config.method:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"config must be a LoRA, LoHa, LoKr or AdaLoRA of lowrank_core, got {type(config).__name__}")
    record = record_of(model)
    if name in record.configs:
        raise UsageError(f"the model has an adapter {name!r} already; choose another name, or remove that one first")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise UsageError(f"an adapter's name is a word without dots that nn.ModuleDict has no use for, got {name!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"the factors' dtype must be a floating point one, got {dtype}")
    check_unmerged(model)
    targets = find_targets(model, config)
    layers, saved = layers_of(model), saved_of(model)
    originals = dict(original_modules(model))
    wanted = saved_names(model, config)
    _check_apart([t.name for t in targets], list(saved))
    _check_apart(list(layers), wanted)

    # All that can fail is built first.
    adapters = {target.name: _adapter(target, config, dtype) for target in targets}
    new: dict[nn.Module, nn.Module] = {}
    for target in targets:
        if target.name not in layers:
            new[target.module] = layers[target.name] = AdaptedLayer(target.module, target.geometry)
    copies = {path: _copy(path, originals[path]) for path in wanted}
    for path in wanted:
        if path not in saved:
            new[originals[path]] = saved[path] = SavedModule(originals[path])
    trainable = record.trainable
    if not record.configs:  # under all names: merging may untie what shares a parameter
        named = model.named_parameters(remove_duplicate=False)
        trainable = frozenset(path for path, parameter in named if parameter.requires_grad)
    replace(model, new)
    if not record.configs:
        model.requires_grad_(False)
    for path, adapter in adapters.items():
        layers[path].adapters[name] = adapter
    for path, copied in copies.items():
        saved[path].copies[name] = copied
    switched = record.switched + switch_off(model, adapters)
    keep_record(model, Record({**record.configs, name: config}, trainable, switched))
    set_active(model, name)
    return model


def remove(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> nn.Module:
    """Take an adapter (all of them, if None) off a model, in place; where none is left, the original layer returns.

    The original layers are the very objects, with the very weights, and parameters that were trainable before the first
    adapter came are so again after the last one went. An adapter that was not removed stays in use only if it was.

    keep_merged: after `merge`, let the layers keep their merged weights, and let the copies of `modules_to_save` that
        are in use take the modules' places; for all adapters at once.

    Returns:
        The model.

    Raises:
        UsageError: a name the model does not have, merged weights without `keep_merged`, or one name with it.
    """
    check_names(model, [] if name is None else [name])
    if not keep_merged:
        check_unmerged(model)
    elif name is not None:
        raise UsageError(f"keep_merged removes all adapters at once, got the name {name!r}; leave the name out")
    record = record_of(model)
    gone = [name] if name is not None else list(record.configs)
    layers, saved = layers_of(model).values(), saved_of(model).values()
    parts = [(layer, layer.adapters) for layer in layers] + [(module, module.copies) for module in saved]
    # A copy of a module was trained with the adapters: where their weights stay, it does too.
    kept: dict[nn.Module, nn.Module] = {module: module.current for module in saved} if keep_merged else {}
    for wrapper, held in parts:
        for one in gone:
            if one in held:
                del held[one]
        wrapper.active = [one for one in wrapper.active if one not in gone]
    replace(model, {wrapper: kept.get(wrapper, wrapper.base) for wrapper, held in parts if not held})
    left = {key: config for key, config in record.configs.items() if key not in gone}
    keep_record(model, Record(left, record.trainable, record.switched))
    if not left:
        switch_on(model, record.switched)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path in record.trainable)
    return model


def _adapter(target: Target, config: AdapterConfig, dtype: torch.dtype | None) -> Adapter:
    weight = cast(Tensor, target.module.weight)
    adapter = Adapter(
        config.form,
        target.geometry,
        target.rank,
        target.alpha,
        config.scaling(target.rank, target.alpha),
        decompose=config.weight_decompose,
        dropout=config.dropout,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
        # The peers divide by what rank dropout keeps for LoHa always, for LoKr on request, for LoRA never.
        rescale=config.method == "loha" or bool(getattr(config, "rank_dropout_scale", False)),
        device=weight.device,
        dtype=dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32),
    )
    adapter.reset(config.init_weights, target.geometry.as_stored(weight))
    return adapter.train(target.module.training)


def _copy(path: str, module: nn.Module) -> nn.Module:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise UsageError(
            f"modules_to_save names {path}, a {type(module).__name__} that is never called; name what it holds"
        )
    if any(not parameter.is_floating_point() for parameter in module.parameters()):
        raise UsageError(f"modules_to_save names {path}, which holds quantized weights; load the model unquantized")
    return copy.deepcopy(module)


def _check_apart(adapted: Iterable[str], saved: Iterable[str]) -> None:
    """Raise a UsageError for an adapted layer within a module that is trained whole."""
    for path in adapted:
        for whole in saved:
            if path == whole or path.startswith(f"{whole}."):
                raise UsageError(
                    f"one adapter would train {whole} whole and another adapts {path} in it; "
                    "exclude the layer, or leave the module out of modules_to_save"
                )
