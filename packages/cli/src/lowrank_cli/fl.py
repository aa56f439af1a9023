"""The commands of `lowrank fl`."""

# Click's generics leave Typer's options partly unknown.
# pyright: reportUnknownMemberType=false

from pathlib import Path
from typing import Annotated

import typer

from lowrank_cli.help import SectionedCommand, option

app = typer.Typer(
    help="Train networks federatedly, as low-rank factors.",
    epilog="Example: lowrank fl run quickstart",
    no_args_is_help=True,
    # Typer 0.20 and Click 8.5 would each add their own guess to an unknown command.
    suggest_commands=False,
    rich_markup_mode=None,
)

# Its help stands in the commands' own: Typer 0.20 with Click 8.5 loses an argument's.
Config = Annotated[str | None, typer.Argument(metavar="[CONFIG]", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--override",
        "-o",
        metavar="KEY=VALUE",
        help="Set a key of the configuration; repeat for more.",
        rich_help_panel="Configuration",
    ),
]
Seed = Annotated[
    int | None,
    option("Seed of every random choice; the configuration's if not given.", "Configuration", "N"),
]
Quiet = Annotated[bool, option("Show no progress and no notes.", "Output", name="--quiet")]
Json = Annotated[bool, option("Print one JSON object on stdout.", "Output", name="--json")]


@app.command(
    cls=SectionedCommand,
    epilog="Example: lowrank fl run mnist -o rounds=10 --sweep model.gamma=0.1,0.3",
)
def run(
    config: Config = None,
    override: Overrides = [],  # noqa: B006
    sweep: Annotated[
        list[str],
        option("Run once for each value of a key; repeat for every combination.", "Configuration", "KEY=A,B,C"),
    ] = [],  # noqa: B006
    engine: Annotated[
        str | None,
        option(
            "What runs the clients: local, ray, superlink; or how local does: auto, sequential, batched, graphs, "
            "compiled.",
            "Configuration",
            "KIND",
        ),
    ] = None,
    local_nodes: Annotated[
        int | None,
        option("Under superlink: start a SuperLink and N SuperNodes here for the run.", "Configuration", "N"),
    ] = None,
    seed: Seed = None,
    out: Annotated[
        Path | None,
        option("New or empty folder to write to; runs/NAME-TIME if not given.", "Output", "FOLDER"),
    ] = None,
    resume: Annotated[
        Path | None,
        option("Go on with the run or sweep in this folder after its last finished round.", "Output", "FOLDER"),
    ] = None,
    plan: Annotated[bool, option("Show what the run would cost, and train nothing.", "Output", name="--plan")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train over simulated clients and count every byte sent.

    CONFIG is a preset's name (see: lowrank fl presets) or a YAML file; without it, the preset quickstart.
    """
    if resume is not None:
        from lowrank_cli.runs import go_on
        from lowrank_core import UsageError

        if config or sweep or engine or local_nodes or seed is not None or out or plan:
            raise UsageError("--resume takes everything from its folder; leave all but -o, --json and --quiet out")
        go_on(resume, override, as_json=as_json, quiet=quiet)
        return
    from lowrank_fl.load import load_config

    settings = load_config(config, override, seed=seed, engine=engine, local_nodes=local_nodes, sweep=sweep)
    if plan:
        from lowrank_cli.plans import plan_runs

        plan_runs(settings, as_json=as_json, quiet=quiet)
    else:
        from lowrank_cli.runs import carry_out

        carry_out(settings, out, as_json=as_json, quiet=quiet)


@app.command(cls=SectionedCommand, epilog="Example: lowrank fl presets")
def presets(as_json: Json = False) -> None:
    """List the presets that `lowrank fl run` knows."""
    from lowrank_cli.presets import show_presets
    from lowrank_fl.presets import presets as find

    show_presets(find(), "what it runs", as_json=as_json)


@app.command(cls=SectionedCommand, epilog="Example: lowrank fl report runs --out comparison.html")
def report(
    # Not required, because Typer says that through rich; without it the command says so itself.
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)] = [],  # noqa: B006
    out: Annotated[
        Path,
        option("The page to write; report.html if not given.", "Output", "FILE"),
    ] = Path("report.html"),
    mbps: Annotated[
        str,
        option("Links' speeds in Mbit/s, to count a round's seconds for; 2,10,50 if not given.", "Output", "RATES"),
    ] = "2,10,50",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare runs with each other and with the paper's results.

    RUN is the folder of a run or of a sweep, or one that holds such folders.
    """
    from lowrank_cli.reports import report_on

    report_on(runs, out, mbps, as_json=as_json, quiet=quiet)


@app.command(cls=SectionedCommand, epilog="Example: lowrank fl partition -o partition.alpha=0.1 --plot counts.png")
def partition(
    config: Config = None,
    override: Overrides = [],  # noqa: B006
    plot: Annotated[
        Path | None,
        option("Draw the counts as .png, .svg or .pdf.", "Output", "FILE"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count how many examples of each class every client would hold.

    CONFIG is a preset's name (see: lowrank fl presets) or a YAML file; without it, the preset quickstart.
    """
    from lowrank_cli.counts import count_labels
    from lowrank_fl.load import load_config

    count_labels(load_config(config, override), plot, as_json=as_json, quiet=quiet)
