"""From a preset or a YAML file, overrides and flags to a run's configuration, with every fault found at once."""

from collections.abc import Sequence

from lowrank_core.settings import assignment, put, read_tree, validated
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.presets import presets, read_preset


def load_config(
    source: str | None, overrides: Sequence[str] = (), *, seed: int | None = None, processes: int | None = None
) -> DiffusionConfig:
    """The configuration that a command line means.

    Args:
        source: a preset's name or the path of a YAML file; None is `quickstart`.
        overrides: `dotted.key=value` with YAML values.
        seed: a flag, which wins over everything before it.
        processes: another one, `train.processes`.

    Raises:
        UsageError: an unknown preset, a file that is missing or no mapping, and, all together, unknown keys with
            their nearest names and values of the wrong type or out of range.
    """
    tree = read_tree(source or "quickstart", presets(), read_preset, "lowrank diffusion presets")
    for override in overrides:
        put(tree, *assignment(override, "-o"))
    if seed is not None:
        tree["seed"] = seed
    if processes is not None:
        put(tree, "train.processes", processes)
    return validated(DiffusionConfig, tree)[0]
