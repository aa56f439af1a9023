"""The command `lowrank`: its groups, its version, and what an error looks like."""

# Click's generics leave Typer's options partly unknown.
# pyright: reportUnknownMemberType=false

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from lowrank_cli import diffusion, fl
from lowrank_cli.convert import convert
from lowrank_cli.count_params import count_params
from lowrank_cli.doctor import doctor
from lowrank_cli.help import GroupsFirst, SectionedCommand
from lowrank_cli.infer import infer

app = typer.Typer(
    name="lowrank",
    cls=GroupsFirst,
    help="Train, shrink, share and run neural networks through low-rank factors.",
    epilog="Example: lowrank fl run",
    no_args_is_help=True,
    # Typer 0.20 and Click 8.5 would each add their own guess to an unknown command.
    suggest_commands=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    # Rich's help and tracebacks cost 0.3 s and read brackets as markup.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(fl.app, name="fl")
app.add_typer(diffusion.app, name="diffusion")
app.command(
    cls=SectionedCommand,
    short_help="Draw pictures with adapters, or classify pictures.",
    epilog='Example: lowrank infer runs/pets --prompt "a cat on a red sofa" --images 4',
)(infer)
app.command(
    "count-params",
    cls=SectionedCommand,
    short_help="Count what a method costs on a model.",
    epilog="Example: lowrank count-params vgg16 --method fedpara --gamma 0.1,0.5",
)(count_params)
app.command(
    cls=SectionedCommand,
    short_help="Convert an adapter from one file form to another.",
    epilog="Example: lowrank convert runs/pets/unet pets.safetensors --to kohya",
)(convert)
app.command(
    cls=SectionedCommand,
    short_help="Say what this machine has for runs, and what it lacks.",
    epilog="Example: lowrank doctor",
)(doctor)

_EXTRAS = {"lowrank_fl": "fl", "lowrank_diffusion": "diffusion"}


def _print_version(wanted: bool) -> None:
    if wanted:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        typer.echo(f"lowrank {version('lowrank')}")
        others = [f"python {platform.python_version()}"]
        for name in ("torch", "flwr", "diffusers", "transformers", "peft"):
            try:
                others.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                others.append(f"{name} not installed")
        typer.echo(", ".join(others))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version, and those of torch and others, and exit.",
        ),
    ] = False,
) -> None: ...


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. What the user can mend ends in one sentence on stderr, all else in a traceback."""
    try:
        app(arguments, prog_name="lowrank")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        _fail(f'this command is not installed; get it with: pip install "lowrank[{extra}]"', 1)
    except Exception as error:
        # Whoever raised a LowrankError has imported its module; importing it here would need an extra.
        errors = sys.modules.get("lowrank_core.errors")
        if errors is None or not isinstance(error, errors.LowrankError):
            raise
        _fail(str(error), getattr(error, "exit_code", 1))
    except SystemExit as stop:
        if stop.code == 130:
            typer.echo("interrupted", err=True)
        raise


def _fail(sentence: str, code: int) -> NoReturn:
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {sentence}", err=True)
    sys.exit(code)
