"""From a preset or a YAML file, overrides and flags to a run's configuration, with every fault found at once."""

import itertools
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

from lowrank_core import UsageError
from lowrank_core.errors import shortened
from lowrank_core.settings import assignment, put, read_tree, validated, with_values, yaml_value
from lowrank_fl.config import EngineConfig, Execution, RunConfig
from lowrank_fl.presets import presets, read_preset

_EXECUTIONS = ("auto", *get_args(Execution))


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
        seed: a flag, which wins over everything before it.
        engine: another one, an `engine.kind` or an `engine.execution`.
        local_nodes: another one, which means superlink.
        sweep: `dotted.key=a,b,c`.

    Raises:
        UsageError: an unknown preset, a file that is missing or no mapping, and, all together, unknown keys with
            their nearest names and values of the wrong type or out of range.
    """
    tree = read_tree(source or "quickstart", presets(), read_preset, "lowrank fl presets")
    swept: Any = tree.pop("sweep", None) or {}
    if not isinstance(swept, dict):
        raise UsageError(f"sweep takes keys and their lists of values, got {shortened(repr(swept))}")
    swept = {str(key): values for key, values in cast("dict[Any, Any]", swept).items()}
    for override in overrides:
        key, value = assignment(override, "-o")
        if key == "sweep":
            if not isinstance(value, dict):
                raise UsageError(f"-o sweep takes keys and their lists of values, {{}} for none, got {value!r}")
            swept = dict(cast("dict[str, Any]", value))
            continue
        swept.pop(key, None)
        put(tree, key, value)
    for text in sweep:
        key, value = assignment(text, "--sweep")
        swept[key] = (
            value if isinstance(value, list) else [yaml_value(part) for part in text.partition("=")[2].split(",")]
        )
    if local_nodes is not None:
        put(tree, "engine.local_nodes", local_nodes)
        engine = engine or "superlink"
    if engine is not None:
        put(tree, _engine_key(engine), engine)
    if seed is not None:
        swept.pop("seed", None)
        tree["seed"] = seed
    # The keys that are swept stand at their first values, which are as valid as the others.
    return validated(RunConfig, tree, swept)[0].model_copy(update={"sweep": swept})


def _engine_key(engine: str) -> str:
    kinds = get_args(EngineConfig.model_fields["kind"].annotation)
    if engine in kinds:
        return "engine.kind"
    if engine in _EXECUTIONS:
        return "engine.execution"
    found = ", ".join(get_close_matches(engine, (*kinds, *_EXECUTIONS)))
    raise UsageError(
        f"--engine takes {', '.join(kinds)}, or how local trains: {', '.join(_EXECUTIONS)}; got {shortened(engine)!r}"
        + (f" (nearest: {found})" if found else "")
    )


def load_to_resume(file: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run to go on with, from its folder, with what may change on the way.

    Raises:
        UsageError: an override of anything else, of a swept key, or one that `load_config` refuses.
    """
    config = load_config(str(file))
    for override in overrides:
        key, _ = assignment(override, "-o")
        free = key in ("rounds", "federation.tolerated_failures") or key.startswith("engine.")
        scheduled = key == "rounds" and any(single.adapter.method == "adalora" for single, _ in expand(config))
        if not free or key in ("engine.threads", "engine.execution") or key in config.sweep or scheduled:
            why = "is swept" if key in config.sweep else "would make it another run"
            why = "is what the schedule of AdaLoRA's ranks is in shares of" if scheduled else why
            raise UsageError(
                "--resume takes -o for rounds, federation.tolerated_failures and engine.* but engine.threads and "
                f"engine.execution, and {key} {why}; leave it out, or start a new run"
            )
    return load_config(str(file), overrides)


def expand(config: RunConfig) -> list[tuple[RunConfig, dict[str, Any]]]:
    """The single runs of a sweep, each with its values of the swept keys; one run and no values outside a sweep."""
    tree = config.model_dump(exclude={"sweep"})
    runs: list[tuple[RunConfig, dict[str, Any]]] = []
    for values in itertools.product(*config.sweep.values()):
        swept = dict(zip(config.sweep, values, strict=True))
        runs.append((validated(RunConfig, with_values(tree, swept))[0], swept))
    return runs
