"""`lowrank infer`: pictures from adapters, or the classes of pictures from a federated run."""

# Click's generics leave Typer's options partly unknown.
# pyright: reportUnknownMemberType=false

from pathlib import Path
from typing import Annotated

import typer

from lowrank_cli.diffusion import Device
from lowrank_cli.fl import Json, Quiet
from lowrank_cli.help import option

_DRAWING = "Pictures from adapters"
_CLASSES = "Classes from a federated run"
_PAGE = "A page to draw on"


def infer(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN_OR_ADAPTER... [PICTURE...]", show_default=False)] = [],  # noqa: B006
    prompt: Annotated[list[str], option("What to draw; repeat for more.", _DRAWING)] = [],  # noqa: B006
    negative: Annotated[str | None, option("What to keep away from.", _DRAWING)] = None,
    weight: Annotated[
        list[float],
        option(
            "How much an adapter counts, 1 if not given; once for each adapter, in their order.", _DRAWING, "NUMBER"
        ),
    ] = [],  # noqa: B006
    embedding: Annotated[
        list[str],
        option(
            "Embeddings of a word that prompts then may have; repeat for more; a run brings its own.",
            _DRAWING,
            "FILE[:WORD]",
        ),
    ] = [],  # noqa: B006
    base: Annotated[
        str | None,
        option(
            "The model below: a diffusers folder, a whole model's file, a hub id or tiny; a run knows its own.",
            _DRAWING,
            "FOLDER_OR_ID",
        ),
    ] = None,
    base_config: Annotated[
        str | None,
        option(
            "Where a model's file gets configurations and tokenizers from; its family's if not given.",
            _DRAWING,
            "FOLDER_OR_ID",
        ),
    ] = None,
    vae: Annotated[
        str | None,
        option("Another VAE than the base's.", _DRAWING, "FOLDER_OR_ID"),
    ] = None,
    merge: Annotated[
        bool | None,
        option(
            "Merge adapters into the weights; if not given, where rounding loses under 1% of the change.",
            _DRAWING,
            name="--merge/--no-merge",
        ),
    ] = None,
    seed: Annotated[
        int,
        option("Seed of all noise; 0 if not given.", _DRAWING, "N"),
    ] = 0,
    images: Annotated[
        int,
        option("Pictures of each prompt; 1 if not given.", _DRAWING, "N"),
    ] = 1,
    size: Annotated[
        str | None,
        option("In pixels; the run's or the base's if not given.", _DRAWING, "WIDTHxHEIGHT"),
    ] = None,
    steps: Annotated[
        int,
        option("Denoising steps; 25 if not given.", _DRAWING, "N"),
    ] = 25,
    guidance: Annotated[
        float,
        option("How strongly to follow the prompt; 5 if not given.", _DRAWING, "NUMBER"),
    ] = 5.0,
    scheduler: Annotated[
        str | None,
        option(
            "ddim, ddpm, dpm++, dpm++-karras, dpm++-sde, euler, euler-a, heun, lcm or unipc; the base's if not given.",
            _DRAWING,
            "NAME",
        ),
    ] = None,
    batch: Annotated[
        int,
        option("Pictures drawn at once; 1 if not given.", _DRAWING, "N"),
    ] = 1,
    grid: Annotated[bool, option("Also all pictures in one, grid.png.", _DRAWING, name="--grid")] = False,
    precision: Annotated[
        str,
        option("fp32, bf16 or fp16; if not given, bf16 on CUDA and fp32 elsewhere.", _DRAWING, "NAME"),
    ] = "auto",
    top: Annotated[
        int,
        option("How many classes to name for each picture; 5 if not given.", _CLASSES, "K"),
    ] = 5,
    client: Annotated[
        int | None,
        option("Of a personalised run: predict with this client's own part of the model.", _CLASSES, "N"),
    ] = None,
    serve: Annotated[
        bool,
        option("Show a page in the browser to draw on, until Ctrl-C.", _PAGE, name="--serve"),
    ] = False,
    host: Annotated[
        str | None,
        option("Who can open the page; this machine alone, 127.0.0.1, if not given.", _PAGE, "ADDRESS"),
    ] = None,
    port: Annotated[
        int | None,
        option("Of the page; 7860 if not given, and 0 is any free one.", _PAGE, "N"),
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        option("New or empty folder for the pictures; runs/pictures-TIME if not given.", "Output", "FOLDER"),
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
