"""What `lowrank diffusion merge` and `extract` carry out, and how they show it."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import typer

from lowrank_cli.models import base_path, model_folder
from lowrank_cli.steps import watch_steps
from lowrank_cli.tables import make_table, stdout
from lowrank_core.errors import UsageError
from lowrank_core.files import Combination, Extraction, LayerFit, combine, extract

_FORMS = ("kohya", "peft", "diffusers")
_SHOWN = 20


def merge_adapters(
    adapters: Sequence[Path],
    weights: str | None,
    out: Path | None,
    *,
    method: str,
    rank: int | None,
    form: str | None,
    base: str | None,
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the weighted sum of adapters, and print what it keeps."""
    if not adapters or out is None:
        raise UsageError(
            "merge takes adapters and a place for their sum; give both: merge A B --out MERGED.safetensors"
        )
    counted = _numbers(weights) if weights is not None else [1.0] * len(adapters)

    def work(told: Callable[[str, int, int], None]) -> Combination:
        return combine(
            adapters,
            counted,
            out,
            method=cast(Any, method),
            rank=rank,
            form=cast(Any, _form(form, out)),
            base=base_path(base),
            device=_device(device),
            overwrite=overwrite,
            told=told,
        )

    found = _watched(work, "merging", quiet=quiet)
    if as_json:
        typer.echo(json.dumps(_as_json(found) | {"rank": found.rank, "weights": counted}))
        return
    if rank is not None:
        _print_layers(found.layers)
    typer.echo(
        f"{found.path}: {found.method} of {len(adapters)} adapters in {len(found.layers)} layers, rank {found.rank}, "
        + ("exact" if rank is None else f"{found.kept_energy:.2%} of the energy kept")
    )


def extract_adapter(
    base: str | None,
    tuned: str | None,
    out: Path | None,
    *,
    method: str,
    rank: int,
    form: str | None,
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the difference of two models as an adapter, and print what it keeps."""
    if base is None or tuned is None or out is None:
        raise UsageError(
            "extract takes two models and a place for the adapter; give all three: "
            "extract BASE TUNED --out ADAPTER.safetensors"
        )
    from lowrank_diffusion.unpacking import unpacked

    models = (
        unpacked(base, "BASE") or model_folder(base, "BASE"),
        unpacked(tuned, "TUNED") or model_folder(tuned, "TUNED"),
    )

    def work(told: Callable[[str, int, int], None]) -> Extraction:
        return extract(
            *models,
            out,
            method=cast(Any, method),
            rank=rank,
            form=cast(Any, _form(form, out)),
            device=_device(device),
            overwrite=overwrite,
            told=told,
        )

    found = _watched(work, "extracting", quiet=quiet)
    if as_json:
        typer.echo(json.dumps(_as_json(found) | {"unchanged": found.unchanged, "left_out": found.left_out}))
        return
    _print_layers(found.layers)
    typer.echo(
        f"{found.path}: {found.method} of {len(found.layers)} layers, {found.kept_energy:.2%} of the energy kept; "
        f"{found.unchanged} layers do not differ"
    )
    if found.left_out and not quiet:
        typer.echo(
            f"{len(found.left_out)} other tensors differ, which no adapter holds, such as {found.left_out[0]}", err=True
        )


def _numbers(weights: str) -> list[float]:
    try:
        found = [float(number) for number in weights.split(",")]
    except ValueError:
        found = [float("nan")]
    if any(number != number or abs(number) == float("inf") for number in found):
        raise UsageError(f"--weights are numbers with commas between, such as 0.7,0.3, got {weights!r}")
    return found


def _form(form: str | None, out: Path) -> str:
    if form is None:
        return "kohya" if out.suffix == ".safetensors" else "peft"
    if form not in _FORMS:
        raise UsageError(f"--form is one of {', '.join(_FORMS)}, got {form!r}")
    return form


def _device(name: str) -> Any:
    from lowrank_diffusion.infer.request import device_of

    return device_of(name)


def _watched(work: Callable[[Callable[[str, int, int], None]], Any], doing: str, *, quiet: bool) -> Any:
    with watch_steps(quiet=quiet) as observer:
        return work(lambda layer, done, total: observer.stage(f"{doing} {layer}", done, total))


def _as_json(found: Combination | Extraction) -> dict[str, Any]:
    layers = [dataclasses.asdict(layer) | {"kept_energy": layer.kept_energy} for layer in _worst_first(found.layers)]
    return {"out": str(found.path), "method": found.method, "kept_energy": found.kept_energy, "layers": layers}


def _worst_first(layers: Sequence[LayerFit]) -> list[LayerFit]:
    return sorted(layers, key=lambda layer: layer.kept_energy)


def _print_layers(layers: Sequence[LayerFit]) -> None:
    table = make_table(["layer", "of", "shape", "rank", "energy kept"], left=2)
    for layer in _worst_first(layers)[:_SHOWN]:
        shape = " x ".join(map(str, layer.shape))
        table.add_row(layer.name, layer.component, shape, str(layer.rank), f"{layer.kept_energy:.2%}")
    stdout().print(table)
    if len(layers) > _SHOWN:
        typer.echo(f"and {len(layers) - _SHOWN} layers that keep as much or more; --json has them all")
