"""The command `lowrank count-params`."""

# Click's generics leave Typer's options partly unknown.
# pyright: reportUnknownMemberType=false

import json
from pathlib import Path
from typing import Annotated

import typer

from lowrank_cli.fl import Json, Quiet
from lowrank_cli.help import option

# Its help stands in the command's own: Typer 0.20 with Click 8.5 loses an argument's.
Model = Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)]


_METHOD, _MODEL, _TRAFFIC, _OUTPUT = "Method", "Model", "Traffic", "Output"


def count_params(
    model: Model = None,
    method: Annotated[
        str | None, option("Methods, separated by commas; original if not given.", _METHOD, "A,B")
    ] = None,
    rank: Annotated[str | None, option("A rank for every layer; adapters take 8 if not given.", _METHOD, "R,S")] = None,
    gamma: Annotated[
        str | None, option("The paper's rank rule, 0 to 1; factors take 0.1 if not given.", _METHOD, "G,H")
    ] = None,
    ratio: Annotated[str | None, option("Factors as a share of each layer's parameters.", _METHOD, "Q,S")] = None,
    budget: Annotated[
        str | None,
        option("The largest rank that fits: of the adapter, or of the whole model; 10M, 40MB.", _METHOD, "N,M"),
    ] = None,
    target: Annotated[
        str | None,
        option(
            "Layers: attention, attention+mlp, all-linear, all-conv, all, or a regular expression for whole names.",
            _METHOD,
            "WHICH",
        ),
    ] = None,
    target_rank: Annotated[
        int | None, option("AdaLoRA's final rank; two thirds of the first if not given.", _METHOD, "R")
    ] = None,
    factor: Annotated[int, option("LoKr's split; the most even one if not given.", _METHOD, "N")] = -1,
    tucker: Annotated[
        bool, option("Adapters of convolutions through a core (Tucker).", _METHOD, name="--tucker")
    ] = False,
    compare: Annotated[
        bool, option("Every method that takes the rank rule, side by side.", _METHOD, name="--compare")
    ] = False,
    classes: Annotated[int | None, option("Classes of the network, where it can be told.", _MODEL, "N")] = None,
    input: Annotated[str | None, option("Shape of one example.", _MODEL, "CxHxW")] = None,
    dtype: Annotated[
        str,
        option("What a number takes: float32, bfloat16, float16, int8, ...; float32 if not given.", _MODEL, "NAME"),
    ] = "float32",
    batch_size: Annotated[
        int, option("Examples of the training step that is compared; 16 if not given.", _MODEL, "N")
    ] = 16,
    rounds: Annotated[int | None, option("Add the traffic of so many federated rounds.", _TRAFFIC, "N")] = None,
    clients_per_round: Annotated[
        int | None, option("Clients that get and send the model each round.", _TRAFFIC, "N")
    ] = None,
    layers: Annotated[bool, option("A row for every layer.", _OUTPUT, name="--layers")] = False,
    plot: Annotated[
        Path | None, option("Draw parameters, reachable rank and traffic as .png, .svg or .pdf.", _OUTPUT, "FILE")
    ] = None,
    csv: Annotated[Path | None, option("Write a row for every changed layer.", _OUTPUT, "FILE")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count what a method costs on a model: parameters, bytes, arithmetic and traffic. No weights are read.

    MODEL is vgg16, resnet18, lstm, mlp, cnn, sdxl, sdxl-unet, torchvision:NAME, a folder with a config.json of
    transformers or diffusers, or a hub id OWNER/NAME. Methods are original; lowrank, fedpara, pfedpara, which train a
    network from scratch as factors; lora, loha, lokr, adalora, which adapt it, the first three also as lora+dora.
    """
    from lowrank_cli.count.cases import Options, bytes_of, cases_of, check_at_least_one, shape_of
    from lowrank_cli.count.output import Traffic, as_tree, write_csv
    from lowrank_core.errors import UsageError

    # Typer imports rich to write that a parameter is required.
    if model is None:
        raise UsageError("count-params takes a MODEL, such as vgg16 or sdxl-unet; see lowrank count-params --help")

    check_at_least_one(rounds=rounds, clients_per_round=clients_per_round, classes=classes, batch_size=batch_size)
    options = Options(method, rank, gamma, ratio, budget, compare, target_rank, factor, tucker)
    size, shape = bytes_of(dtype), shape_of(input)
    traffic = Traffic(rounds or 1, clients_per_round or 1) if rounds or clients_per_round else None
    if plot is not None:
        from lowrank_cli.count.plot import check_picture

        check_picture(plot)
    cases = cases_of(options)

    from lowrank_cli.count.counting import count
    from lowrank_cli.count.models import find_model

    def note(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    found = find_model(model, shape, classes, note)
    if found.untraced:
        note(f"FLOPs are not counted: {found.untraced}")
    results = [count(found, case, target, options, size, batch_size) for case in cases]
    if csv is not None:
        write_csv(results, csv)
        note(f"layers: {csv}")
    if plot is not None:
        from lowrank_cli.count.plot import plot_costs

        plot_costs(results, size, traffic, plot)
        note(f"picture: {plot}")
    if as_json:
        trees = [as_tree(counted, dtype, size, batch_size, traffic) for counted in results]
        typer.echo(json.dumps(trees[0] if len(trees) == 1 else {"model": model, "reports": trees}))
        return
    from lowrank_cli.count.show import show_many, show_one

    if len(results) == 1:
        show_one(results[0], dtype, size, batch_size, traffic, layers)
    else:
        show_many(results, dtype, size, batch_size, traffic)
