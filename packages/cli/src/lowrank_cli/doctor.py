"""`lowrank doctor`: what this machine has for the work, and what to do about what it lacks."""

# Click's generics leave Typer's options partly unknown.
# pyright: reportUnknownMemberType=false

import json

import typer

from lowrank_cli.fl import Json


def doctor(as_json: Json = False) -> None:
    """Say which versions, devices, memory and disk there are, and check what runs need.

    Nothing is downloaded or changed. The exit status is 1 where something needed is missing.
    """
    from lowrank_cli.examining import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps(found.tree()))
    else:
        for title, rows in found.sections().items():
            typer.echo(f"{title}:")
            width = max(map(len, rows))
            for name, text in rows.items():
                typer.echo(f"  {name:{width}}  {text}")
        for check in found.checks:
            typer.echo(f"{check.outcome:7}  {check.name}: {check.text}")
    if any(check.outcome == "missing" for check in found.checks):
        raise typer.Exit(1)
