"""What `lowrank infer` carries out, and how it shows it."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lowrank_core.errors import UsageError
from lowrank_core.parsing import parse_yaml

if TYPE_CHECKING:
    from lowrank_diffusion.infer.request import Request


def is_federated(path: Path) -> bool:
    """Whether this is the folder of a federated run, finished or not, or of a sweep of such runs."""
    if (path / "model.json").is_file():
        return True
    try:
        tree: Any = parse_yaml((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and "federation" in tree


def check_for_adapters(options: Mapping[str, Any]) -> None:
    """Raise a UsageError if one of these options, which only adapters take, is given to a federated run."""
    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(f"{given[0]} is for adapters, and this is a federated run, which classifies pictures")


def classify(
    run: Path, pictures: Sequence[Path], *, top: int, client: int | None, device: str, as_json: bool, quiet: bool
) -> None:
    """Print the likeliest classes of pictures."""
    import torch

    from lowrank_fl.infer import predict

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    predictions = predict(run, pictures, top=top, client=client, device=device)
    if as_json:
        rows = [{**dataclasses.asdict(found), "path": str(found.path)} for found in predictions]
        typer.echo(json.dumps({"predictions": rows}))
        return
    from lowrank_cli.tables import make_table, stdout

    table = make_table(["picture", "class", "probability"], left=2)
    for found in predictions:
        for number, guess in enumerate(found.top):
            table.add_row("" if number else str(found.path), guess.label, f"{guess.probability:.1%}")
    stdout().print(table)
    if not quiet and client is None and (run / "clients" / "personal").is_dir():
        typer.echo(
            "clients of this run have parts of the model of their own; this is the shared part over the values that "
            "those start from, and --client N uses a client's",
            err=True,
        )


def draw(request: "Request", *, as_json: bool, quiet: bool) -> None:
    """Draw, and print where the pictures are."""
    from lowrank_diffusion.infer.run import infer
    from lowrank_diffusion.infer.studio import Told

    # A line that is written over on a terminal; a log gets notes alone.
    is_live = not quiet and sys.stderr.isatty()

    def note(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    def drawn(done: int, total: int) -> None:
        if is_live:
            typer.echo(f"\rpicture {done} of {total}", err=True, nl=done == total)

    result = infer(request, Told(note, drawn))
    files = [str(path) for path in result.images]
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "images": files,
                    "grid": None if result.grid is None else str(result.grid),
                    "out": str(result.out),
                    "base": result.base,
                    "adapters": [dataclasses.asdict(adapter) for adapter in result.adapters],
                    "embeddings": [dataclasses.asdict(embedding) for embedding in result.embeddings],
                    "merged": result.merged,
                }
            )
        )
        return
    for file in [*files, *([str(result.grid)] if result.grid else [])]:
        typer.echo(file)


def serve(request: "Request", host: str, port: int, *, as_json: bool, quiet: bool) -> None:
    """Show a page to draw on until Ctrl-C, and print its address."""
    from lowrank_diffusion.infer.serve import serve

    def note(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    def ready(url: str, out: Path) -> None:
        note(f"pictures go to {out}; Ctrl-C ends the page")
        # What listens to a pipe must hear it at once; echo flushes.
        typer.echo(json.dumps({"url": url, "out": str(out)}) if as_json else url)

    serve(request, host, port, note, ready)
