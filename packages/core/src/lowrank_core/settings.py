"""From a preset or a YAML file and overrides to a checked configuration, with every fault found at once.

For the packages whose runs are pydantic models; pydantic and PyYAML come with `lowrank-core[config]`.
"""

# What YAML holds may be of any type until a model has looked at it.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from lowrank_core.errors import UsageError, shortened
from lowrank_core.parsing import parse_yaml

M = TypeVar("M", bound=BaseModel)
Tree = dict[str, Any]
_MOST_TOLD = 15
"""Faults that one error names; a typing error in a section can make a hundred."""
_MOST_RUNS = 10_000
"""Of a sweep; more would not end, and only checking them takes minutes."""


def read_tree(source: str, presets: Collection[str], read_preset: Callable[[str], str], command: str) -> Tree:
    """The keys and values of a YAML file, or of a preset by its name; `command` lists the presets.

    Raises:
        UsageError: no such preset or file, or it does not hold keys and values.
    """
    is_path = source.endswith((".yaml", ".yml")) or "/" in source or "\\" in source
    if is_path:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the configuration {source}: {error}") from None
    elif source in presets:
        text = read_preset(source)
    else:
        nearest = ", ".join(get_close_matches(source, presets, n=3, cutoff=0.4)) or ", ".join(presets)
        raise UsageError(f"no preset {source!r}; nearest: {nearest}; see them all with {command}, or name a .yaml file")
    try:
        tree = parse_yaml(text) or {}
    except ValueError as error:
        raise UsageError(f"{source} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{source} must hold keys and values, got {type(tree).__name__}")
    return tree


def assignment(text: str, option: str) -> tuple[str, Any]:
    """The key and the YAML value of `key=value`; raises UsageError, naming the option, where it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{option} takes key=value, got {text!r}")
    return key, yaml_value(value)


def yaml_value(text: str) -> Any:
    """What the text means in YAML, or the text itself."""
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def put(tree: Tree, dotted: str, value: Any) -> None:
    """Set a key such as `model.gamma`, making the sections on the way."""
    *sections, key = dotted.split(".")
    for section in sections:
        below = tree.get(section)
        if not isinstance(below, dict):
            below = tree[section] = {}
        tree = below
    tree[key] = value


def validated(model: type[M], tree: Tree, swept: Mapping[str, Any] = {}) -> list[M]:
    """One configuration for every combination of the swept keys' values, the first one first; one without a sweep.

    Raises:
        UsageError: all faults of all combinations together: unknown keys with their nearest names, and values of the
            wrong type or out of range.
    """
    types = dict(_types(model))
    names = list(types)
    mappings = {name for name, kind in types.items() if get_origin(kind) is dict}
    faults = [_unknown(key, names) for key in [*_keys(tree, mappings), *swept] if key not in names]
    for key, values in swept.items():
        if not isinstance(values, list) or not values:
            faults.append(f"sweep.{key}: needs a list of values, got {shortened(repr(values))}")
    known = _known(tree, names, mappings)
    lists = {key: values for key, values in swept.items() if isinstance(values, list) and values and key in names}
    if (count := math.prod(map(len, lists.values()))) > _MOST_RUNS:
        raise UsageError(f"sweep: its lists of values make {count} runs, more than {_MOST_RUNS}; take shorter lists")
    configs: list[M] = []
    for values in itertools.product(*lists.values()):
        try:
            configs.append(model.model_validate(with_values(known, dict(zip(lists, values, strict=True)))))
        except ValidationError as error:
            faults += [fault for fault in map(_fault, error.errors()) if fault not in faults]
    if faults:
        heading = "" if len(faults) == 1 else f"{len(faults)} faults in the configuration: "
        more = [f"and {len(faults) - _MOST_TOLD} more"] if len(faults) > _MOST_TOLD else []
        raise UsageError(heading + "; ".join([*faults[:_MOST_TOLD], *more]))
    return configs


def with_values(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """A copy of the tree with other values of some dotted keys."""
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key, value in values.items():
        put(copied, key, value)
    return copied


def _types(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _types(field.annotation, f"{prefix}{name}.")


def _keys(tree: Tree, mappings: Collection[str], prefix: str = "") -> Iterator[str]:
    """The dotted keys of everything that is no section; `mappings` are keys whose values have keys of their own."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in mappings:
            yield from _keys(value, mappings, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _known(tree: Tree, names: Sequence[str], mappings: Collection[str], prefix: str = "") -> Tree:
    return {
        key: _known(value, names, mappings, f"{prefix}{key}.")
        if isinstance(value, dict) and f"{prefix}{key}" not in mappings
        else value
        for key, value in tree.items()
        if f"{prefix}{key}" in names
    }


def _unknown(key: str, names: Sequence[str]) -> str:
    # "gama" should find "model.gamma" and "modle.gamma" too.
    leaves = {name.rpartition(".")[2]: name for name in names}
    found = get_close_matches(key, names, n=2) or [
        leaves[leaf] for leaf in get_close_matches(key.rpartition(".")[2], leaves, n=2, cutoff=0.6)
    ]
    return f"unknown key {key!r}" + (f" (nearest: {', '.join(found)})" if found else "")


def _fault(error: Any) -> str:
    location = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{location}: {message}" if location else message
    if error["type"] == "bool_parsing":
        message = "input should be true or false"
    found = "nothing" if error["input"] is None else shortened(repr(error["input"]))
    return f"{location}: {message[0].lower()}{message[1:]}, got {found}"
