"""Models as commands take them: a folder, or `tiny`."""

from pathlib import Path

import typer

from lowrank_core.files import NamedFolder
from lowrank_core.files.difference import path_of


def model_folder(source: str, name: str) -> Path | NamedFolder:
    """A folder on this machine; `tiny` is the base that comes with the package."""
    if Path(source).exists() or source != "tiny":
        return Path(source).expanduser()
    from lowrank_diffusion.base_files import base_folder

    return NamedFolder(base_folder(source, None, typer.echo, name), source)


def base_path(base: str | None) -> Path | None:
    """What `--base` means."""
    return None if base is None else path_of(model_folder(base, "--base"))
