"""A run's configuration as others may see it: this machine's folders are in none of its keys."""

from pathlib import Path
from typing import Any

from lowrank_diffusion.config import DiffusionConfig

_PLACES = ("base.path", "base.config", "base.vae", "data.path", "prior.path", "cache.folder", "adapter.init_from")
"""The keys that may name a file or folder."""


def published(config: DiffusionConfig) -> dict[str, Any]:
    """The configuration as JSON; of paths that lead out of the current folder the last names alone."""
    tree = config.model_dump(mode="json")
    for place in _PLACES:
        section, key = place.split(".")
        if (value := tree[section][key]) is not None:
            tree[section][key] = without_folders(value)
    return tree


def without_folders(place: str) -> str:
    """A hub id, or a path below the current folder, as it is; of other paths their last names."""
    if Path(place).is_absolute() or place.startswith(("~", ".")) or ".." in Path(place).parts:
        return Path(place).expanduser().resolve().name
    return place
