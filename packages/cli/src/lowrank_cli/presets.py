"""A table of presets."""

import json
from collections.abc import Mapping

import typer

from lowrank_cli.tables import make_table, stdout


def show_presets(found: Mapping[str, str], what: str, *, as_json: bool) -> None:
    """Print presets and their descriptions, under the heading `what`."""
    if as_json:
        typer.echo(json.dumps({"presets": [{"name": name, "description": line} for name, line in found.items()]}))
        return
    table = make_table(["preset", what], left=2)
    for name, line in found.items():
        table.add_row(name, line)
    stdout().print(table)
