"""`lowrank convert`: adapters from one form of file to another."""

# Click's generics leave Typer's options partly unknown.
# pyright: reportUnknownMemberType=false

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lowrank_cli.fl import Json, Quiet
from lowrank_cli.help import option

FORMS = "peft, kohya, lora, diffusers or merged"


def convert(
    source: Annotated[Path | None, typer.Argument(metavar="SOURCE", show_default=False)] = None,
    dest: Annotated[Path | None, typer.Argument(metavar="DEST", show_default=False)] = None,
    to: Annotated[
        str | None,
        option(f"What to write: {FORMS}.", "Conversion", "FORM"),
    ] = None,
    base: Annotated[
        str | None,
        option("The model the adapter is for: a folder of safetensors, or tiny.", "Conversion", "FOLDER"),
    ] = None,
    rank: Annotated[
        int | None,
        option("Cut the plain LoRA off at this rank, and say what that loses.", "Conversion", "N"),
    ] = None,
    overwrite: Annotated[bool, option("Write over what is at DEST.", "Output", name="--overwrite")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert an adapter between file forms; SOURCE may be in any of them.

    peft is PEFT's folder, kohya the single file of ComfyUI and LyCORIS, lora a PEFT folder of the equal plain LoRA,
    diffusers that LoRA as load_lora_weights reads it, and merged the weights of --base with the adapter in them.
    """
    from lowrank_core.errors import UsageError

    # Typer imports rich to write that a parameter is required.
    if source is None or dest is None or to is None:
        raise UsageError(f"convert takes SOURCE, DEST and --to; give all three, and for --to one of {FORMS}")
    from lowrank_cli.models import base_path
    from lowrank_core.files import convert as carry_out

    done = carry_out(source, dest, cast(Any, to), base=base_path(base), rank=rank, overwrite=overwrite)
    if as_json:
        fields = ("format", "keys", "rank", "exact", "lost_energy")
        typer.echo(json.dumps({name: getattr(done, name) for name in fields}))
        return
    size = "" if done.rank is None else f", rank {done.rank}"
    lost = "exact" if done.exact else f"{done.lost_energy:.3g} of the energy lost"
    typer.echo(f"{done.path}: {done.keys} tensors{size}, {lost}")
    if not quiet and done.rank is not None and done.exact and to in ("lora", "diffusers") and done.rank > _LARGE:
        typer.echo(f"an exact LoRA of rank {done.rank} is large; --rank N cuts it off and says what is lost", err=True)


_LARGE = 256
