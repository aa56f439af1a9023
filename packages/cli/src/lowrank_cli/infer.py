"""`lowrank infer`: pictures from adapters, or the classes of pictures from a federated run."""

# Click's generics leave Typer's options partly unknown.
# pyright: reportUnknownMemberType=false

from pathlib import Path
from typing import Annotated

import typer

from lowrank_cli.diffusion import Device
from lowrank_cli.fl import Json, Quiet

_DRAWING = "Pictures from adapters"
_CLASSES = "Classes from a federated run"
_PAGE = "A page to draw on"


def infer(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN_OR_ADAPTER... [PICTURE...]", show_default=False)] = [],  # noqa: B006
    prompt: Annotated[
        list[str], typer.Option(help="What to draw; repeat for more.", show_default=False, rich_help_panel=_DRAWING)
    ] = [],  # noqa: B006
    negative: Annotated[
        str | None, typer.Option(help="What to keep away from.", show_default=False, rich_help_panel=_DRAWING)
    ] = None,
    weight: Annotated[
        list[float],
        typer.Option(
            metavar="NUMBER",
            help="How much an adapter counts, 1 if not given; once for each adapter, in their order.",
            show_default=False,
            rich_help_panel=_DRAWING,
        ),
    ] = [],  # noqa: B006
    embedding: Annotated[
        list[str],
        typer.Option(
            metavar="FILE[:WORD]",
            help="Embeddings of a word that prompts then may have; repeat for more; a run brings its own.",
            show_default=False,
            rich_help_panel=_DRAWING,
        ),
    ] = [],  # noqa: B006
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_ID",
            help="The model below: a diffusers folder, a whole model's file, a hub id or tiny; a run knows its own.",
            show_default=False,
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    base_config: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_ID",
            help="Where a model's file gets configurations and tokenizers from; its family's if not given.",
            show_default=False,
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_ID", help="Another VAE than the base's.", show_default=False, rich_help_panel=_DRAWING
        ),
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--no-merge",
            help="Merge adapters into the weights; if not given, where rounding loses under 1% of the change.",
            show_default=False,
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Seed of all noise; 0 if not given.", show_default=False, rich_help_panel=_DRAWING
        ),
    ] = 0,
    images: Annotated[
        int,
        typer.Option(
            metavar="N", help="Pictures of each prompt; 1 if not given.", show_default=False, rich_help_panel=_DRAWING
        ),
    ] = 1,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="In pixels; the run's or the base's if not given.",
            show_default=False,
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            metavar="N", help="Denoising steps; 25 if not given.", show_default=False, rich_help_panel=_DRAWING
        ),
    ] = 25,
    guidance: Annotated[
        float,
        typer.Option(
            metavar="NUMBER",
            help="How strongly to follow the prompt; 5 if not given.",
            show_default=False,
            rich_help_panel=_DRAWING,
        ),
    ] = 5.0,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="ddim, ddpm, dpm++, dpm++-karras, dpm++-sde, euler, euler-a, heun, lcm or unipc; the base's if not "
            "given.",
            show_default=False,
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N", help="Pictures drawn at once; 1 if not given.", show_default=False, rich_help_panel=_DRAWING
        ),
    ] = 1,
    grid: Annotated[
        bool, typer.Option("--grid", help="Also all pictures in one, grid.png.", rich_help_panel=_DRAWING)
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="fp32, bf16 or fp16; if not given, bf16 on CUDA and fp32 elsewhere.",
            show_default=False,
            rich_help_panel=_DRAWING,
        ),
    ] = "auto",
    top: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="How many classes to name for each picture; 5 if not given.",
            show_default=False,
            rich_help_panel=_CLASSES,
        ),
    ] = 5,
    client: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of a personalised run: predict with this client's own part of the model.",
            show_default=False,
            rich_help_panel=_CLASSES,
        ),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Show a page in the browser to draw on, until Ctrl-C.", rich_help_panel=_PAGE),
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Who can open the page; this machine alone, 127.0.0.1, if not given.",
            show_default=False,
            rich_help_panel=_PAGE,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of the page; 7860 if not given, and 0 is any free one.",
            show_default=False,
            rich_help_panel=_PAGE,
        ),
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="New or empty folder for the pictures; runs/pictures-TIME if not given.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw pictures with adapters, or on a page (--serve), or name the classes of pictures with a federated run.

    RUN_OR_ADAPTER is the folder of a run, a PEFT folder, a .safetensors file of kohya, LyCORIS, ComfyUI or
    diffusers, or hf://OWNER/NAME; several are summed. The folder of a federated run comes alone, before files and
    folders of pictures.
    """
    from lowrank_cli import inferring

    if paths and inferring.is_federated(paths[0]):
        given = {"--prompt": prompt, "--weight": weight, "--embedding": embedding, "--base": base, "--out": out}
        inferring.check_for_adapters({**given, "--serve": serve})
        inferring.classify(paths[0], paths[1:], top=top, client=client, device=device, as_json=as_json, quiet=quiet)
        return
    if client is not None:
        from lowrank_core.errors import UsageError

        raise UsageError("--client is for the run of a federation; an adapter has no clients")
    if not serve and (host, port) != (None, None):
        from lowrank_core.errors import UsageError

        raise UsageError("--host and --port say where the page is shown; give --serve, too")
    from lowrank_diffusion.infer.request import Request

    request = Request(
        adapters=paths,
        prompts=prompt,
        weights=weight,
        embeddings=embedding,
        base=base,
        config=base_config,
        vae=vae,
        merged=merge,
        negative=negative,
        seed=seed,
        images=images,
        size=size,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        batch=batch,
        grid=grid,
        device=device,
        precision=precision,
        out=out,
    )
    if serve:
        inferring.serve(request, host or "127.0.0.1", 7860 if port is None else port, as_json=as_json, quiet=quiet)
    else:
        inferring.draw(request, as_json=as_json, quiet=quiet)
