"""Modules that stand in the place of others, and the names that a model's modules had before."""

# A module used twice by one parent is seen in `_modules` alone.
# pyright: reportPrivateUsage=false

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
            return getattr(self.current, name)

    @property
    def current(self) -> nn.Module:
        """The module that this one speaks for."""
        return self.base


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


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """The wrappers in a model with the names of what they wrap, in the order of `original_modules`."""
    named = {id(module): name for name, module in original_modules(model)}
    found = {id(module.base): module for module in model.modules() if isinstance(module, Wrapper)}
    return ((name, found[key]) for key, name in named.items() if key in found)


def replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, under all the names these have; all of them or, if that fails, none."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, Wrapper)
        for name, child in parent._modules.items()
        if child is not None and child in new
    ]
    try:
        for parent, name, child in places:
            setattr(parent, name, new[child])
    except BaseException:
        for parent, name, child in places:
            parent._modules[name] = child
        raise
