"""An adapter on a network of ours: its layers are frozen, the adapter, norms and the last layer are trained."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lowrank_core.adapters import config as core
from lowrank_core.adapters.control import adapters_of, configs_of
from lowrank_core.adapters.inject import inject
from lowrank_core.adapters.wrapper import original_modules
from lowrank_core.errors import UsageError
from lowrank_core.files import adapter_file_of, write
from lowrank_core.files.model import layers_of_model
from lowrank_core.replacement import FactorizedEntry, FactorizeReport
from lowrank_fl.config import AdapterConfig
from lowrank_fl.models.build import head_of
from lowrank_fl.models.pretrained import Pretrained, last_layer

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)  # pyright: ignore[reportPrivateUsage]


def put_adapter(model: nn.Module, network: str, adapter: AdapterConfig, *, seed: int) -> FactorizeReport:
    """Put the adapter on a network, in place, drawn from `seed`; what is not trained is frozen afterwards.

    A base layer `NAME` becomes `NAME.base`, with the factors `NAME.adapters.default.*` beside it; every other name
    stays. LoRA on a network that was just drawn is FLoCoRA (Ribeiro Grativol et al., 2024,
    https://arxiv.org/abs/2406.14082).

    network: the model's name.

    Returns:
        The layers with an adapter, as `factorize` reports those that it changes; `params` of a layer are the adapter's.

    Names are those within the network where another library has made it.

    Raises:
        UsageError: `adapter.target` means no layer, or one that cannot be adapted.
    """
    model, head = _inner(model, network)
    original_params = _count(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject(
                model,
                _method_of(adapter)(
                    rank=adapter.rank,
                    alpha=adapter.alpha,
                    target_modules=_targets(model, network, head, adapter),
                    exclude_modules=[head] if adapter.head else (),
                    init_weights=adapter.init or ("lycoris" if adapter.method == "loha" else "peft"),
                ),
            )
        except UsageError as error:
            # They are this configuration's keys under the names that core and PEFT give them.
            said = str(error).replace("target_modules", "adapter.target")
            said = said.replace("exclude_modules or modules_to_save names", "adapter.head leaves out")
            raise UsageError(said) from None
        if adapter.method == "adalora":
            _make_orthonormal(model)
    for path in trained_whole(model, head, adapter):
        model.get_submodule(path).requires_grad_(True)
    changed = tuple(
        FactorizedEntry(
            path,
            type(model.get_submodule(f"{path}.base")).__name__,
            one.geometry.weight_shape,
            one.rank,
            one.form.max_rank(one.geometry, one.rank),
            sum(p.numel() for p in model.get_submodule(f"{path}.base").parameters()),
            _count(one),
        )
        for path, one in adapters_of(model).items()
    )
    return FactorizeReport(changed, (), original_params, _count(model))


@torch.no_grad()
def _make_orthonormal(model: nn.Module) -> None:
    """Draw the rows of A and the columns of B, in ΔW = B diag(E) A, orthonormal; E stays zero.

    PEFT draws them so small that E's gradient is nearly none, which Adam makes up for and SGD, with which clients
    train, does not.
    """
    for one in adapters_of(model).values():
        for name in ("lora_A", "lora_B"):
            nn.init.orthogonal_(one.factors[name])


def trained_whole(model: nn.Module, head: str, adapter: AdapterConfig) -> list[str]:
    """The modules that are trained whole beside the adapter: norms, and the last layer if `adapter.head`."""
    norms = [name for name, module in original_modules(model) if isinstance(module, _NORMS)]
    return norms + ([head] if adapter.head else [])


def write_adapter(model: nn.Module, network: str, adapter: AdapterConfig, folder: Path) -> None:
    """The adapter of such a model as a PEFT folder; what is trained whole is in it as `modules_to_save`."""
    model, head = _inner(model, network)
    whole = trained_whole(model, head, adapter)
    saved = {
        f"{path}.{key}": tensor.detach()
        for path in whole
        for key, tensor in model.get_submodule(path).state_dict().items()
    }
    config = replace(configs_of(model)["default"], modules_to_save=whole)
    file = replace(adapter_file_of(model), saved=saved)
    file = replace(file, config=replace(config, other_fields=file.config.other_fields))
    write([file], folder, "peft", {file.component: layers_of_model(model)}, overwrite=True)


def _method_of(adapter: AdapterConfig) -> Callable[..., core.AdapterConfig]:
    """The adapter's configuration in core, but for what all methods share."""
    assert adapter.method is not None
    if adapter.method != "adalora":
        return {"lora": core.LoRA, "loha": core.LoHa, "lokr": core.LoKr}[adapter.method]
    return partial(
        core.AdaLoRA,
        target_rank=adapter.last_rank,
        warmup=adapter.warmup,
        settle=adapter.settle,
        orthogonality=adapter.orthogonality,
    )


def _inner(model: nn.Module, network: str) -> tuple[nn.Module, str]:
    """What the adapter goes onto, and its last layer: of another library's network that network itself, so that the
    names are those that this library knows.
    """
    if isinstance(model, Pretrained):
        return model.network, last_layer(model.network)
    return model, head_of(network, model)


def _targets(model: nn.Module, network: str, head: str, adapter: AdapterConfig) -> Sequence[str] | str:
    if adapter.target is not None:
        return adapter.target
    out = head if adapter.head else None
    found = [n for n, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d) and n != out]
    if not found:
        raise UsageError(
            f"model {network!r} has no Linear or Conv2d for an adapter besides its last layer; name other layers in "
            "adapter.target, or set adapter.head=false"
        )
    return found


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
