"""torch.compile for a model's repeated blocks: each kind of block is compiled once, whatever the model's depth."""

# torch leaves the types of modules it yields partly open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from torch import nn


def compile(model: nn.Module, **options: Any) -> list[str]:
    """Compile the repeated blocks of `model` in place, or the whole model where nothing repeats; returns their names.

    A first step then waits for one block's compilation instead of the model's. The blocks are the classes that
    diffusers lists in `_repeated_blocks`, else the outermost modules that lie more than once, with the same parameters,
    in a ModuleList or Sequential. Attributes and state dict keep their names, as with `nn.Module.compile`, which takes
    the options (`mode`, `fullgraph`, `dynamic`, `backend`).
    """
    blocks = list(_blocks(model))
    for _, block in blocks:
        block.compile(**options)
    if not blocks:
        model.compile(**options)
    return [name for name, _ in blocks] or [""]


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    named = cast(tuple[str, ...], getattr(model, "_repeated_blocks", None) or ())
    if named:
        yield from ((name, module) for name, module in model.named_modules() if type(module).__name__ in named)
        return
    structures = {
        f"{name}.{key}" if name else key: _structure(child)
        for name, parent in model.named_modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential)
        for key, child in parent.named_children()
        if next(child.children(), None) is not None
    }
    counts = Counter(structures.values())
    chosen: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in chosen)
        if not inside and name in structures and counts[structures[name]] > 1:
            chosen.append(name)
            yield name, module


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What two modules share that one compiled graph serves: class, and the parameters' names and shapes."""
    return type(module), *((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
