"""Adapters between files and a model at hand: `load` and `save`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lowrank_core.adapters.config import AdaLoRA, AdapterConfig
from lowrank_core.adapters.control import adapters_of, configs_of, saved_of
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.inject import inject, remove
from lowrank_core.adapters.layer import Adapter
from lowrank_core.adapters.targets import find_targets, saved_names
from lowrank_core.adapters.wrapper import original_modules
from lowrank_core.errors import LowrankError, UsageError, shortened
from lowrank_core.files import grouped
from lowrank_core.files.as_lora import as_lora
from lowrank_core.files.bundle import AdapterFile, Component, Layers, ModuleAdapter, with_patterns
from lowrank_core.files.check import some
from lowrank_core.files.diffusers_file import WEIGHTS_NAME, write_diffusers
from lowrank_core.files.kohya_write import write_kohya
from lowrank_core.files.names import fit
from lowrank_core.files.peft import COMPONENT_OF_CLASS, dtype_of, ranks_and_alphas, write_peft
from lowrank_core.files.read import read
from lowrank_core.files.shapes import check_form, check_peft_split
from lowrank_core.files.tensors import check_free

Format = Literal["peft", "kohya", "lora", "diffusers"]


def component_of_model(model: nn.Module) -> Component:
    """Which model of a pipeline this is, by its class; empty if it is none of those known."""
    return COMPONENT_OF_CLASS.get(type(model).__name__, "")


def layers_of_model(model: nn.Module) -> dict[str, Geometry]:
    """The layers that can be adapted, under their names without adapters."""
    found = ((name, Geometry.of(module)) for name, module in original_modules(model))
    return {name: geometry for name, geometry in found if name and geometry is not None}


def load(model: nn.Module, path: Path | str, name: str = "default") -> nn.Module:
    """Put the adapter at a path onto a model, in place; it is then the one in use and in training.

    Reads what `lowrank_core.files.read` reads. Of a file for several models of a pipeline, the part for this one is
    taken. Factors become fp32 parameters (fp64 from fp64), whatever the file's dtype, like `inject`'s.

    Returns:
        The model.

    Raises:
        LowrankError: what reading raises; layers that the model does not have or that differ in shape; several models'
            adapters and a model of unknown class. The model is then unchanged.
        UsageError: what `inject` raises, such as a name that is taken.
    """
    layers = layers_of_model(model)
    component = component_of_model(model)
    file = _for_model(read(path, {component: layers}), component, path)
    file = grouped.from_peft(file.renamed(fit(file.modules, file.component, layers)))
    file = _with_exact_targets(model, file)
    for module_name, module in file.modules.items():
        check_form(file.config, module_name, module.factors, layers[module_name], module.rank)
    file = _without_embeddings(model, file)
    owners = saved_names(model, file.config)
    if lost := [key for key in file.saved if not any(key.startswith(f"{owner}.") for owner in owners)]:
        raise LowrankError(
            f"{path} has trained parameters that modules_to_save does not name: {some(lost)}; "
            "merge the adapter with PEFT"
        )
    inject(model, file.config, name, dtype=torch.float64 if dtype_of(file) == torch.float64 else None)
    try:
        _fill(model, file, name)
    except BaseException:
        remove(model, name)
        raise
    return model


def _for_model(files: Sequence[AdapterFile], component: Component, path: Path | str) -> AdapterFile:
    matching = [file for file in files if file.component == component]
    if len(matching) == 1:
        return matching[0]
    if len(files) == 1:
        return files[0]
    raise LowrankError(
        f"{path} holds adapters for {', '.join(file.component or 'a model' for file in files)}, and this model is none "
        "that is known; give the folder of one of them"
    )


def _with_exact_targets(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """The file with a config whose targets are just the modules that it holds factors for."""
    listed = replace(
        file.config,
        target_modules=list(file.modules),
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=(),
    )
    if not file.config.target_modules:
        return replace(file, config=listed)
    targets = {target.name for target in find_targets(model, file.config)}
    if extra := sorted(set(file.modules) - targets):
        raise LowrankError(
            f"the adapter has factors for {some(extra)}, which its target_modules do not name; correct the file"
        )
    if len(targets) == len(file.modules):
        return file
    if {target.name for target in find_targets(model, listed)} != set(file.modules):
        # A name may be the ending of another that has no factors.
        listed = replace(listed, target_modules="|".join(name.replace(".", r"\.") for name in file.modules))
    return replace(file, config=listed)


def _without_embeddings(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """The file without the base weights of adapted embeddings, which PEFT writes too, if they are the model's own."""
    modules = dict(original_modules(model))
    kept: dict[str, Tensor] = {}
    for key, tensor in file.saved.items():
        name = key.removesuffix(".base_layer.weight")
        if name == key:
            kept[key] = tensor
            continue
        weight = cast(Tensor, modules[name].weight)
        if weight.shape != tensor.shape or not torch.equal(weight.to(tensor.device, tensor.dtype), tensor):
            raise LowrankError(
                f"the adapter comes with another {name} than the model's; "
                "give the model it was trained on, or merge the adapter with PEFT"
            )
    return replace(file, saved=kept)


@torch.no_grad()
def _fill(model: nn.Module, file: AdapterFile, name: str) -> None:
    adapters = adapters_of(model, name)
    for path, module in file.modules.items():
        adapter = adapters[path]
        for key, factor in module.factors.items():
            parameter = cast("nn.Parameter | None", getattr(adapter, key, None))
            if parameter is not None and parameter.shape == factor.shape:
                parameter.copy_(factor)
            else:  # a shrunk AdaLoRA, or a LoKr of another split; every other shape has been checked
                like = next(adapter.parameters())
                setattr(adapter, key, nn.Parameter(factor.to(like, copy=True), like.requires_grad))
        for key in set(adapter.factor_names) - set(module.factors):
            delattr(adapter, key)
        adapter.factor_names = tuple(module.factors)
        if module.magnitude is not None:
            adapter.magnitude.copy_(module.magnitude.reshape(adapter.magnitude.shape))
    for owner, module in saved_of(model).items():
        held = {key.removeprefix(f"{owner}."): t for key, t in file.saved.items() if key.startswith(f"{owner}.")}
        if held:
            try:
                module.copies[name].load_state_dict(held)
            except RuntimeError as error:
                reason = shortened(str(error))
                raise LowrankError(f"the trained copy of {owner} does not fit the model: {reason}") from None


def adapter_file_of(model: nn.Module, name: str = "default") -> AdapterFile:
    """An adapter on a model, as it would stand in a file; scales set with `set_scale` are the model's and stay there.

    Raises:
        UsageError: the model has no adapter of that name.
    """
    adapters = adapters_of(model, name)
    config = configs_of(model)[name]
    if config.method in ("loha", "lokr"):  # neither PEFT nor the readers of kohya's files stabilize their ranks
        config = replace(config, rank_stabilized=False)
    # An AdaLoRA layer that has shrunk keeps the scale of its initial rank.
    first = ranks_and_alphas(config, adapters) if isinstance(config, AdaLoRA) else {}
    modules = {path: _module(a, first[path][0] if first else a.rank, config) for path, a in adapters.items()}
    if any((modules[path].rank, modules[path].alpha) != (a.rank, a.alpha) for path, a in adapters.items()):
        config = with_patterns(config, modules)
    saved = {
        f"{path}.{key}": tensor.detach()
        for path, module in saved_of(model).items()
        if name in module.copies
        for key, tensor in module.copies[name].state_dict().items()
    }
    if "auto_mapping" not in config.other_fields:
        kind = type(model)
        named = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config = replace(config, other_fields={**config.other_fields, "auto_mapping": named})
    return AdapterFile(config, modules, saved, {}, component_of_model(model))


def _module(adapter: Adapter, rank: int, config: AdapterConfig) -> ModuleAdapter:
    alpha = adapter.alpha
    if config.method == "loha":  # which has only the rank that readers see
        rank = adapter.factors["hada_w1_b"].shape[0] if "hada_t1" not in adapter.factors else rank
    if config.method in ("loha", "lokr") and config.scaling(rank, alpha) != adapter.scaling:
        alpha = adapter.scaling * rank
    magnitude = adapter.magnitude.detach().flatten() if adapter.decompose is not None else None
    factors = {key: factor.detach() for key, factor in adapter.factors.items()}
    return ModuleAdapter(factors, rank, alpha, magnitude, adapter.decompose)


def save(
    model: nn.Module, path: Path | str, format: Format = "peft", name: str = "default", *, overwrite: bool = False
) -> None:
    """Write an adapter of a model: factors, configuration, and modules trained whole where the format has a place.

    The adapter goes in as it was trained: what `set_scale` and `set_active` set is the model's and not in the file.

    format: `peft`, a PEFT folder; `kohya`, a single file for ComfyUI, LyCORIS and kohya's tools; `lora`, a PEFT folder
        of the equal LoRA; `diffusers`, that LoRA in a file for `load_lora_weights` (a folder gets
        `pytorch_lora_weights.safetensors`).

    Raises:
        UsageError: an unknown format, or a name the model does not have.
        LowrankError: something is at the path already and `overwrite` is not set; the format has no place for the
            adapter (the message names one that has); the path cannot be written to.
    """
    if format not in ("peft", "kohya", "lora", "diffusers"):
        raise UsageError(f"format must be peft, kohya, lora or diffusers, got {format!r}")
    file = adapter_file_of(model, name)
    write([file], Path(path), format, {file.component: layers_of_model(model)}, overwrite=overwrite)


def write(
    files: Sequence[AdapterFile],
    path: Path,
    format: Format,
    layers: dict[Component, Layers] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write adapters in one of the formats; PEFT folders of several models go into folders of the models' names.

    AdaLoRA becomes a LoRA wherever the format has none, which is exact.

    Returns:
        What was written: the folder, or the file.
    """
    if format == "diffusers" and path.suffix != ".safetensors":
        path = path / WEIGHTS_NAME
    check_free(path, overwrite)
    if format != "peft":
        plain = format != "kohya"
        files = [
            as_lora(file, (layers or {}).get(file.component), magnitudes=plain).file
            if plain or isinstance(file.config, AdaLoRA)
            else file
            for file in files
        ]
    if format == "kohya":
        write_kohya([grouped.from_peft(file) for file in files], path, layers)
        return path
    files = [grouped.to_peft(file, (layers or {}).get(file.component)) for file in files]
    if format == "diffusers":
        write_diffusers(files, path)
    else:
        for file in files:
            check_peft_split(file, (layers or {}).get(file.component))
        for file in files:
            write_peft(file, path / _FOLDER_OF[file.component] if len(files) > 1 else path)
    return path


_FOLDER_OF: dict[Component, str] = {"unet": "unet", "te1": "text_encoder_one", "te2": "text_encoder_two", "": "model"}
