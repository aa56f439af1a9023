"""torch's own shortcuts past the layers of a transformer, which would pass adapters by."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lowrank_core.adapters.wrapper import original_modules

_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",  # 0 and nothing else stops it, and nothing else reads it
    nn.TransformerEncoder: "use_nested_tensor",  # its layers would get tensors that only the shortcut takes
}

Switched = tuple[tuple[str, str, Any], ...]


def switch_off(model: nn.Module, adapted: Iterable[str]) -> Switched:
    """Have torch's transformer layers call the adapted layers in them, also in evaluation. Returns what to restore.

    `nn.TransformerEncoderLayer` in evaluation hands the weights of its layers to one kernel, and calls none of them.
    """
    adapted = list(adapted)
    switched: list[tuple[str, str, Any]] = []
    for name, module in original_modules(model):
        prefix = f"{name}." if name else ""
        for kind, attribute in _SWITCHES.items():
            if isinstance(module, kind) and any(path.startswith(prefix) for path in adapted):
                switched.append((name, attribute, getattr(module, attribute)))
                setattr(module, attribute, 0)
    return tuple(switched)


def switch_on(model: nn.Module, switched: Switched) -> None:
    """Undo `switch_off`."""
    modules = dict(original_modules(model))
    # The last to be switched off found a 0 where an earlier one had been.
    for name, attribute, value in reversed(switched):
        setattr(modules[name], attribute, value)
