"""Modules that stand in the place of others, and the names that a model's modules had before."""

from collections.abc import Iterator
from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """Stands in the place of `base`: what it does not have itself (`weight`, `in_features`, ...) is the base's.

    Code of transformers and diffusers reads such attributes of the layers it built.
    """

    base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While a copy or a pickle is being built there is no base yet to ask.
            if "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that was there before adapters came."""
    return module.base if isinstance(module, Wrapper) else module


def original_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as it was before adapters came: each module once, under its first name."""
    return _walk("", model, set())


def _walk(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child_name, child in module.named_children():
        yield from _walk(f"{name}.{child_name}" if name else child_name, child, seen)
