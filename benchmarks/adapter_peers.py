"""What `adapters.py` and `diffusion.py` time: ours, PEFT's, PEFT's patched, and LyCORIS's in both of its modes.

All of one case hold the same factors, copied from PEFT's, so that their outputs can be compared before they are timed.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[nn.Module, str, int, Sequence[str] | None], nn.Module]
"""Of the frozen model, the method, the rank, and the names of the layers to adapt; None are all linear layers and
convolutions. The model stays as it is, and what is made of it shares its weights."""

_LYCORIS = {"lora": "LoConModule", "loha": "LohaModule", "lokr": "LokrModule"}


def peft(model: nn.Module, method: str, rank: int, names: Sequence[str] | None = None) -> nn.Module:
    from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

    names = layers_of(model) if names is None else list(names)
    torch.manual_seed(0)
    config: Any = {
        "lora": lambda: LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=False),
        "loha": lambda: LoHaConfig(r=rank, alpha=rank, target_modules=names, init_weights=False),
        "lokr": lambda: LoKrConfig(r=rank, alpha=rank, target_modules=names, init_weights=False),
        "adalora": lambda: AdaLoraConfig(
            init_r=rank,
            target_r=max(1, rank // 2),
            tinit=1,
            tfinal=1,
            total_step=10,
            lora_alpha=rank,
            target_modules=names,
            init_lora_weights=False,
        ),
    }[method]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inject_adapter_in_model(config, sharing(model))


def patched(model: nn.Module, method: str, rank: int, names: Sequence[str] | None = None) -> nn.Module:
    from lowrank_core import patch_peft

    injected = peft(model, method, rank, names)
    report = patch_peft(injected)
    assert not report.left, str(report)
    return injected


def ours(model: nn.Module, method: str, rank: int, names: Sequence[str] | None = None) -> nn.Module:
    from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA, inject

    config = {"lora": LoRA, "loha": LoHa, "lokr": LoKr, "adalora": AdaLoRA}[method]
    names = layers_of(model) if names is None else list(names)
    more = {"target_rank": max(1, rank // 2)} if method == "adalora" else {}
    adapted: Any = inject(sharing(model), config(rank=rank, alpha=rank, target_modules=names, **more))
    theirs = peft(model, method, rank, names)
    for name in names:
        for key, factor in adapted.get_submodule(name).adapters["default"].factors.items():
            held = getattr(theirs.get_submodule(name), key)["default"]
            factor.data.copy_(held.weight if isinstance(held, nn.Module) else held)
    return adapted


def lycoris_rebuild(model: nn.Module, method: str, rank: int, names: Sequence[str] | None = None) -> nn.Module:
    return _lycoris(model, method, rank, names, bypass=False)


def lycoris_bypass(model: nn.Module, method: str, rank: int, names: Sequence[str] | None = None) -> nn.Module:
    return _lycoris(model, method, rank, names, bypass=True)


def _lycoris(model: nn.Module, method: str, rank: int, names: Sequence[str] | None, *, bypass: bool) -> nn.Module:
    import lycoris.modules

    if method not in _LYCORIS:
        raise NotImplementedError(f"LyCORIS has no {method}")
    adapted, theirs = sharing(model), peft(model, method, rank, names)
    for name in layers_of(model) if names is None else names:
        layer: Any = adapted.get_submodule(name)
        kind = getattr(lycoris.modules, _LYCORIS[method])
        module = kind(name.replace(".", "_"), layer, 1.0, lora_dim=rank, alpha=rank, bypass_mode=bypass)
        module.to(layer.weight.device)
        source: Any = theirs.get_submodule(name)
        for key in source.adapter_layer_names:
            held = getattr(source, key)
            if "default" in held:
                factor = held["default"].weight if isinstance(held["default"], nn.Module) else held["default"]
                other = {"lora_A": "lora_down", "lora_B": "lora_up"}.get(key, key)
                target = getattr(module, other)
                (target.weight if isinstance(target, nn.Module) else target).data.copy_(factor)
        module.apply_to()
        layer.adapter = module  # held by the layer, so that its parameters are the model's
    return adapted


PEERS: dict[str, Build] = {
    "PEFT": peft,
    "PEFT patched": patched,
    "LyCORIS rebuild": lycoris_rebuild,
    "LyCORIS bypass": lycoris_bypass,
}


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def sharing(model: nn.Module) -> nn.Module:
    """A copy whose frozen weights are the model's own, so that many competitors fit into one memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def held_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd holds between forward and backward beyond parameters: the input, activations, composed weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(sizes.values())
