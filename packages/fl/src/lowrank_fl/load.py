"""From a preset or a YAML file, overrides and flags to a run's configuration, with every fault found at once."""

import itertools
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lowrank_core import UsageError
from lowrank_fl.config import RunConfig
from lowrank_fl.presets import presets, read_preset


def load_config(
    source: str | None,
    overrides: Sequence[str] = (),
    *,
    seed: int | None = None,
    engine: str | None = None,
    local_nodes: int | None = None,
    sweep: Sequence[str] = (),
) -> RunConfig:
    """The configuration that a command line means.

    Args:
        source: a preset's name or the path of a YAML file; None is `quickstart`.
        overrides: `dotted.key=value` with YAML values; a key that `source` sweeps is swept no longer.
        seed, engine, local_nodes: flags, which win over everything before them; `local_nodes` means superlink.
        sweep: `dotted.key=a,b,c`.

    Raises:
        UsageError: an unknown preset, a file that is missing or no mapping, and, all together, unknown keys with
            their nearest names and values of the wrong type or out of range.
    """
    tree = _read(source or "quickstart")
    swept: dict[str, Any] = dict(tree.pop("sweep", None) or {})
    for override in overrides:
        key, value = _split(override, "-o")
        swept.pop(key, None)
        _set(tree, key, value)
    for text in sweep:
        key, value = _split(text, "--sweep")
        swept[key] = value if isinstance(value, list) else [_yaml(part) for part in text.partition("=")[2].split(",")]
    if local_nodes is not None:
        _set(tree, "engine.local_nodes", local_nodes)
        engine = engine or "superlink"
    if engine is not None:
        _set(tree, "engine.kind", engine)
    if seed is not None:
        swept.pop("seed", None)
        tree["seed"] = seed
    return _validate(tree, swept)


def expand(config: RunConfig) -> list[tuple[RunConfig, dict[str, Any]]]:
    """The single runs of a sweep, each with its values of the swept keys; one run and no values outside a sweep."""
    tree = config.model_dump(exclude={"sweep"})
    runs: list[tuple[RunConfig, dict[str, Any]]] = []
    for values in itertools.product(*config.sweep.values()):
        swept = dict(zip(config.sweep, values, strict=True))
        runs.append((_validate(_with(tree, swept), {}), swept))
    return runs


def _validate(tree: dict[str, Any], swept: dict[str, Any]) -> RunConfig:
    names = list(_names(RunConfig))
    faults = [_unknown(key, names) for key in [*_keys(tree), *swept] if key not in names]
    for key, values in swept.items():
        if not isinstance(values, list) or not values:
            faults.append(f"sweep.{key}: needs a list of values, got {values!r}")
    known = _known(tree, names)
    lists = {key: values for key, values in swept.items() if isinstance(values, list) and values and key in names}
    configs: list[RunConfig] = []
    for values in itertools.product(*lists.values()):
        try:
            configs.append(RunConfig.model_validate(_with(known, dict(zip(lists, values, strict=True)))))
        except ValidationError as error:
            faults += [fault for fault in map(_fault, error.errors()) if fault not in faults]
    if faults:
        heading = "" if len(faults) == 1 else f"{len(faults)} faults in the configuration: "
        raise UsageError(heading + "; ".join(faults))
    # The keys that are swept stand at their first values, which are as valid as the others.
    return configs[0].model_copy(update={"sweep": swept})


def _read(source: str) -> dict[str, Any]:
    is_path = source.endswith((".yaml", ".yml")) or "/" in source or "\\" in source
    if is_path:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the configuration {source}: {error}") from None
    elif source in presets():
        text = read_preset(source)
    else:
        nearest = ", ".join(get_close_matches(source, presets(), n=3, cutoff=0.4)) or ", ".join(presets())
        raise UsageError(
            f"no preset {source!r}; nearest: {nearest}; see them all with lowrank fl presets, or name a .yaml file"
        )
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{source} must hold keys and values, got {type(tree).__name__}")
    return tree


def _split(text: str, option: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{option} takes key=value, got {text!r}")
    return key, _yaml(value)


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        below = tree.get(section)
        if not isinstance(below, dict):
            below = tree[section] = {}
        tree = below
    tree[key] = value


def _with(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key, value in values.items():
        _set(copied, key, value)
    return copied


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")


def _keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _known(tree: dict[str, Any], names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _known(value, names, f"{prefix}{key}.") if isinstance(value, dict) else value
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
    return f"{location}: {message[0].lower()}{message[1:]}, got {error['input']!r}"
