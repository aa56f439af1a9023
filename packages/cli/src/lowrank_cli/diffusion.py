"""The commands of `lowrank diffusion`."""

# Click's generics leave Typer's options partly unknown.
# pyright: reportUnknownMemberType=false

from pathlib import Path
from typing import Annotated

import typer

from lowrank_cli.fl import Config, Json, Overrides, Quiet, Seed
from lowrank_cli.help import SectionedCommand, option

app = typer.Typer(
    help="Fine-tune SDXL and Stable Diffusion 1 with adapters.",
    epilog="Example: lowrank diffusion train quickstart",
    no_args_is_help=True,
    # Typer 0.20 and Click 8.5 would each add their own guess to an unknown command.
    suggest_commands=False,
    rich_markup_mode=None,
)


@app.command(
    cls=SectionedCommand,
    short_help="Train an adapter on captioned pictures.",
    epilog="Example: lowrank diffusion train sdxl-loha -o data.path=photos",
)
def train(
    config: Config = None,
    override: Overrides = [],  # noqa: B006
    processes: Annotated[
        int | None,
        option("Processes on this machine, each with a GPU.", "Configuration", "N"),
    ] = None,
    seed: Seed = None,
    out: Annotated[
        Path | None,
        option("New or empty folder to write to; runs/NAME-TIME if not given.", "Output", "FOLDER"),
    ] = None,
    resume: Annotated[
        str | None,
        option(
            "Go on with the run in this folder, or at hf://OWNER/NAME, after its latest checkpoint.", "Output", "FOLDER"
        ),
    ] = None,
    plan: Annotated[bool, option("Show what the run would cost, and train nothing.", "Output", name="--plan")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter on captioned pictures and write it for every program.

    CONFIG is a preset's name (see: lowrank diffusion presets) or a YAML file; without it, the preset quickstart.
    """
    if resume is not None:
        from lowrank_cli.fine_tuning import go_on
        from lowrank_core import UsageError
        from lowrank_diffusion.hub import hub_place

        there = hub_place(resume)
        if config or processes is not None or seed is not None or plan or (there is None and (override or out)):
            raise UsageError(
                "--resume takes everything from its folder; leave the configuration and --out out (a run on the hub "
                "takes -o and --out; to train further than was planned, begin a run with -o adapter.init_from=FOLDER)"
            )
        if there is not None and there.file is not None:
            raise UsageError(f"--resume takes a run, and {resume} is a file; write hf://OWNER/NAME")
        go_on(Path(resume) if there is None else there, out, override, as_json=as_json, quiet=quiet)
        return
    from lowrank_diffusion.load import load_config

    settings = load_config(config, override, seed=seed, processes=processes)
    if plan:
        from lowrank_cli.fine_tuning import show_plan

        show_plan(settings, as_json=as_json, quiet=quiet)
    else:
        from lowrank_cli.fine_tuning import carry_out

        carry_out(settings, out, as_json=as_json, quiet=quiet)


@app.command(
    cls=SectionedCommand,
    short_help="Push a run to the Hugging Face hub.",
    epilog="Example: lowrank diffusion push runs/pets me/pets --private",
)
def push(
    run: Annotated[Path | None, typer.Argument(metavar="FOLDER", show_default=False)] = None,
    repository: Annotated[str | None, typer.Argument(metavar="OWNER/NAME", show_default=False)] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is seen by you alone.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH", help="Branch to push to, made if need be; main if not given.", show_default=False
        ),
    ] = None,
    with_checkpoint: Annotated[
        bool, typer.Option("--with-checkpoint", help="Push what --resume hf://OWNER/NAME goes on from, too.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push a run to the Hugging Face hub: card, adapters in all forms, samples, metrics and configuration.

    It needs a login (hf auth login, or HF_TOKEN) and makes the repository if it is not there: public, for everyone
    to see, unless --private is given. Where the configuration has a path that leads out of the current folder, only
    its last name is pushed.
    """
    from lowrank_core.errors import UsageError

    if run is None or repository is None:
        raise UsageError("push takes the folder of a run and a repository; give both: push runs/pets OWNER/NAME")
    from lowrank_cli.fine_tuning import push_run

    push_run(
        run,
        repository,
        private=private,
        revision=revision,
        with_checkpoint=with_checkpoint,
        as_json=as_json,
        quiet=quiet,
    )


_WRITING = "Adapter"
Out = Annotated[
    Path | None,
    option("Where to write: a .safetensors file or a folder.", "Output", "PATH"),
]
Method = Annotated[
    str,
    option("What to write: lora or loha; lora if not given.", _WRITING, "NAME"),
]
Form = Annotated[
    str | None,
    option(
        "kohya (also for ComfyUI and A1111), peft or diffusers; by PATH, kohya for a file and peft for a folder.",
        "Output",
        "NAME",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, cuda:1 or mps; the machine's accelerator if not given.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, option("Write over what is at PATH.", "Output", name="--overwrite")]


@app.command(
    cls=SectionedCommand,
    short_help="Merge adapters into one that draws what all of them draw.",
    epilog="Example: lowrank diffusion merge pets oil --weights 0.7,0.3 --out both",
)
def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER ADAPTER...", show_default=False)] = [],  # noqa: B006
    weights: Annotated[
        str | None,
        option("How much each adapter counts, in their order; 1 each if not given.", _WRITING, "A,B,..."),
    ] = None,
    method: Method = "lora",
    rank: Annotated[
        int | None,
        option(
            "Cut the sum off at this rank, and say what that loses; the sum of all ranks, exact, if not given.",
            _WRITING,
            "N",
        ),
    ] = None,
    base: Annotated[
        str | None,
        option("The model they are for, if it is not SDXL: a diffusers folder or tiny.", _WRITING, "FOLDER"),
    ] = None,
    out: Out = None,
    form: Form = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge adapters into one adapter that draws what all of them together draw.

    ADAPTER is a PEFT folder, the folder of a run, or a .safetensors file of kohya, LyCORIS, ComfyUI or diffusers; LoRA,
    LoHa, LoKr and AdaLoRA may be mixed. The sum is a LoRA, exactly, unless --rank makes it smaller.
    """
    from lowrank_cli.merging import merge_adapters

    merge_adapters(
        adapters,
        weights,
        out,
        method=method,
        rank=rank,
        form=form,
        base=base,
        device=device,
        overwrite=overwrite,
        as_json=as_json,
        quiet=quiet,
    )


@app.command(
    cls=SectionedCommand,
    short_help="Make an adapter of what a fine-tuned model has learned.",
    epilog="Example: lowrank diffusion extract sdxl mine --method loha --out learned",
)
def extract(
    base: Annotated[str | None, typer.Argument(metavar="BASE", show_default=False)] = None,
    tuned: Annotated[str | None, typer.Argument(metavar="TUNED", show_default=False)] = None,
    method: Method = "lora",
    rank: Annotated[
        int,
        option("The larger, the more is kept, and the larger the file; 16 if not given.", _WRITING, "N"),
    ] = 16,
    out: Out = None,
    form: Form = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make an adapter of what a fine-tuned model has learned: the difference between two whole models.

    BASE is the model that TUNED was made from; either is a diffusers folder, a file with a whole SDXL or Stable
    Diffusion 1, or tiny. The table says how much of each layer's change the adapter keeps, worst layers first.
    """
    from lowrank_cli.merging import extract_adapter

    extract_adapter(
        base,
        tuned,
        out,
        method=method,
        rank=rank,
        form=form,
        device=device,
        overwrite=overwrite,
        as_json=as_json,
        quiet=quiet,
    )


@app.command(cls=SectionedCommand, epilog="Example: lowrank diffusion presets")
def presets(as_json: Json = False) -> None:
    """List the presets that `lowrank diffusion train` knows."""
    from lowrank_cli.presets import show_presets
    from lowrank_diffusion.presets import presets as find

    show_presets(find(), "what it trains", as_json=as_json)
