"""`lowrank diffusion train`: carry a run out and show what came of it."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from lowrank_cli.steps import memory, watch_steps
from lowrank_cli.tables import make_table, stdout
from lowrank_core.errors import UsageError
from lowrank_diffusion.config import DiffusionConfig, HubConfig
from lowrank_diffusion.config.hub import repository as check
from lowrank_diffusion.hub import HubPlace
from lowrank_diffusion.results import Observer, RunSummary


def carry_out(config: DiffusionConfig, out: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Run `config` and print the summary, after Ctrl-C too."""

    def work(observer: Observer) -> RunSummary:
        from lowrank_diffusion.run import run

        return run(config, out, observer)

    _show(work, as_json=as_json, quiet=quiet)


def go_on(place: Path | HubPlace, out: Path | None, overrides: Sequence[str], *, as_json: bool, quiet: bool) -> None:
    """Resume and print the summary, after Ctrl-C too; `out` and `overrides` are for a run on the hub."""

    def work(observer: Observer) -> RunSummary:
        from lowrank_diffusion.run import resume, resume_from_hub

        return resume(place, observer) if isinstance(place, Path) else resume_from_hub(place, out, overrides, observer)

    _show(work, as_json=as_json, quiet=quiet)


def push_run(
    run: Path,
    repository: str,
    *,
    private: bool,
    revision: str | None,
    with_checkpoint: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Push a run, and print where it is."""
    from lowrank_diffusion.pushing import push

    try:
        hub = HubConfig(push=check(repository), private=private, revision=revision, checkpoints=with_checkpoint)
    except ValueError as error:
        raise UsageError(str(error)) from None
    pushed = push(run, hub, lambda text: None if quiet else typer.echo(text, err=True))
    typer.echo(json.dumps(dataclasses.asdict(pushed)) if as_json else pushed.url)


def show_plan(config: DiffusionConfig, *, as_json: bool, quiet: bool) -> None:
    """Print what a run would cost; nothing is trained, written or downloaded."""
    with watch_steps(quiet=quiet) as observer:
        from lowrank_diffusion.plan import plan

        found = plan(config, observer.note)
    if as_json:
        empty = {field.name: None for field in dataclasses.fields(RunSummary)}
        typer.echo(json.dumps(empty | dataclasses.asdict(found) | {"interrupted": False}))
        return
    table = make_table([found.name, found.method])
    for label, value in (
        ("parameters trained", f"{found.trainable_params:,}"),
        ("of the UNet", f"{found.trainable_params / found.original_params:.2%}"),
        ("layers adapted", f"{found.layers:,}"),
        ("steps", f"{found.steps:,}"),
        ("pictures a step", f"{found.pictures_per_step:,}"),
        ("pictures in all", f"{found.pictures:,}"),
        ("base", memory(found.base_bytes)),
        ("adapter, gradients, optimizer", memory(found.adapter_bytes)),
        ("activations", memory(found.activation_bytes)),
        ("memory, estimated", memory(found.peak_memory_bytes)),
        ("time", "unknown before the first steps"),
    ):
        table.add_row(label, value)
    stdout().print(table)


def _show(work: Callable[[Observer], RunSummary], *, as_json: bool, quiet: bool) -> None:
    # Of the processes of a group that accelerate has started, one speaks.
    speaks = os.environ.get("RANK", "0") == "0"
    with watch_steps(quiet=quiet or not speaks) as observer:
        from lowrank_diffusion.one_run import Interrupted

        interruption = None
        try:
            summary = work(observer)
        except Interrupted as stop:
            interruption, summary = stop, stop.summary
    if speaks and as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary)))
    elif speaks:
        _print_table(summary)
        if not quiet:
            typer.echo(f"\nfiles: {summary.run_dir}")
    if interruption is not None:
        raise interruption


def _print_table(summary: RunSummary) -> None:
    validation = "" if summary.validation_loss is None else f"{summary.validation_loss:.4f}"
    before = "" if summary.base_validation_loss is None else f"{summary.base_validation_loss:.4f}"
    columns = [
        "run",
        "params",
        "steps",
        "loss",
        "validation\nloss",
        "without\nadapter",
        "images/s",
        "peak\nmemory",
        "s",
    ]
    table = make_table(columns)
    table.add_row(
        f"{summary.name}: {summary.method}" + (" (interrupted)" if summary.interrupted else ""),
        f"{summary.trainable_params:,}",
        f"{summary.steps:,}",
        f"{summary.loss:.4f}",
        validation,
        before,
        f"{summary.images_per_second:.3g}",
        memory(summary.peak_memory_bytes),
        f"{summary.seconds:.0f}",
    )
    stdout().print(table)
