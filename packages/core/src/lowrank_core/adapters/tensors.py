"""An adapter's tensors by name, out of a model and into it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank_core.adapters.control import adapters_of, check_names, check_unmerged, saved_of
from lowrank_core.adapters.geometry import Shape
from lowrank_core.adapters.layer import Adapter
from lowrank_core.errors import LowrankError


def state_dict_of(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors, detached and not copied, as `<layer's name in the original model>.<factor>`.

    DoRA's magnitudes are `<layer>.magnitude`; trained copies of modules keep their own keys, `<module>.<parameter>`.

    Raises:
        UsageError: the model has no such adapter.
    """
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters_of(model, name).items():
        tensors |= {f"{path}.{key}": value.detach() for key, value in adapter.named_parameters()}
    for path, module in saved_of(model).items():
        if name in module.copies:
            tensors |= {f"{path}.{key}": value.detach() for key, value in module.copies[name].state_dict().items()}
    return tensors


@torch.no_grad()
def load_state_dict_into(model: nn.Module, tensors: Mapping[str, Tensor], name: str = "default") -> None:
    """Fill an adapter with tensors named as `state_dict_of` names them, converted to its dtype and device.

    AdaLoRA's factors and a flat LoHa's may have fewer directions than the model's, as `adapt_ranks` leaves them: these
    then shrink, as new parameters, and the scale stays that of the rank that was injected.

    Raises:
        UsageError: the model has no such adapter, or it is merged.
        LowrankError: tensors are missing, unexpected, of another shape or not of real numbers, or the model is on the
            meta device; nothing is loaded.
    """
    check_names(model, [name])
    check_unmerged(model)
    adapters = adapters_of(model, name)
    own = state_dict_of(model, name)
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    for path, adapter in adapters.items():
        shapes |= {f"{path}.{factor}": shape for factor, shape in _loadable(adapter, path, tensors).items()}
    _check_keys([key for key in own if key not in tensors], "lacks", name)
    _check_keys([key for key in tensors if key not in own], "has no place for", name)
    if any(value.is_meta for value in own.values()):
        raise LowrankError(f"adapter {name!r} is on the meta device, which holds no numbers; call model.to_empty first")
    for key, shape in shapes.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise LowrankError(
                f"{key} has shape {list(tensor.shape)} where adapter {name!r} has {list(shape)}; "
                "inject it with the rank and the method that the tensors were made with"
            )
        if tensor.is_floating_point() != own[key].is_floating_point() or tensor.is_complex():
            raise LowrankError(
                f"{key} holds {tensor.dtype} where adapter {name!r} has {own[key].dtype}; convert it first"
            )
    for path, adapter in adapters.items():
        for factor in adapter.factor_names:
            key = f"{path}.{factor}"
            if own[key].shape != tensors[key].shape:
                old: Tensor = getattr(adapter, factor)
                setattr(adapter, factor, nn.Parameter(tensors[key].to(old, copy=True), old.requires_grad))
    for key, value in own.items():
        if value.shape == tensors[key].shape:
            value.copy_(tensors[key])


def _loadable(adapter: Adapter, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shapes that an adapter's factors may take: those it has, or AdaLoRA's and LoHa's with fewer directions."""
    counts = {"adalora": "lora_E", "loha": "hada_w1_b"}.get(adapter.form.method)
    values = tensors.get(f"{path}.{counts}")
    least = int(adapter.form.method == "loha")
    if values is None or "hada_t1" in adapter.factors or values.dim() != 2:
        return {}
    if not least <= values.shape[0] <= adapter.rank:
        return {}
    return adapter.form.shapes(adapter.geometry, values.shape[0])


def _check_keys(keys: list[str], verb: str, name: str) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        subject = f"what is loaded into adapter {name!r} {verb}" if verb == "lacks" else f"adapter {name!r} {verb}"
        raise LowrankError(
            f"{subject} {', '.join(keys[:3])}{more}; load what was saved from the same model and targets"
        )
