"""`lowrank fl run --plan`: what runs would cost."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from lowrank_cli.progress import watch
from lowrank_cli.tables import make_table, stdout
from lowrank_fl.config import RunConfig
from lowrank_fl.reporting.text import label_of, three_digits
from lowrank_fl.results import RunSummary, round_seconds

if TYPE_CHECKING:
    from lowrank_fl.plan import RunPlan

_NAMES_WIDTH, _RUN_WIDTH = 30, 16
_MBPS = (2, 10, 50)
"""The links of the paper's Table 7; the table has the middle one."""

_COSTS = (
    "run",
    "params",
    "of original",
    "transferred params",
    "rounds",
    "MB a round",
    "of these to the server",
    "transfer at 10 Mbps",
    "GB total",
    "GB by the paper's arithmetic",
    "GFLOP a round",
    "TFLOP total",
    "tested by",
    "GB to test",
    "layers changed",
    "layers left",
    "estimated time",
)


def plan_runs(config: RunConfig, *, as_json: bool, quiet: bool) -> None:
    """Print the cost of every run of `config`; nothing is trained or written."""
    with watch(quiet=quiet):
        # The first import of torch takes seconds; the spinner turns.
        from lowrank_fl.plan import plan

        runs = plan(config).runs
    if as_json:
        trees = [_as_tree(run, config) for run in runs]
        typer.echo(json.dumps({"runs": trees, "out": None} if config.sweep else trees[0]))
        return
    _print_costs(runs)
    if not config.sweep:
        _print_layers(runs[0])


def _as_tree(run: "RunPlan", config: RunConfig) -> dict[str, Any]:
    """All the keys of a run's summary, null where only a run can tell, and the plan's own."""
    known = {"seed": run.swept.get("seed", config.seed), "interrupted": False}
    transfer = {f"{rate}": round_seconds(0.0, run.client_bytes, rate) for rate in _MBPS}
    planned = dataclasses.asdict(run) | {"transfer_seconds_at_mbps": transfer}
    return {field.name: None for field in dataclasses.fields(RunSummary)} | known | planned


def _print_costs(runs: Sequence["RunPlan"]) -> None:
    """The runs side by side, as many as fit; the others below."""
    console = stdout()
    fitting = max(1, (console.width - _NAMES_WIDTH) // _RUN_WIDTH)
    for start in range(0, len(runs), fitting):
        if start:
            typer.echo()
        heading, *rows = zip(_COSTS, *map(_costs, runs[start : start + fitting]), strict=True)
        table = make_table(heading)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _costs(run: "RunPlan") -> tuple[str, ...]:
    return (
        label_of(run.method, run.swept).replace(", ", ",\n"),
        f"{run.params:,}",
        f"{run.params / run.original_params:.1%}",
        f"{run.transferred_params:,}",
        f"{run.rounds:,}",
        three_digits(run.total_bytes / run.rounds / 1e6),
        three_digits(run.uplink_bytes / run.rounds / 1e6),
        f"{three_digits(round_seconds(0.0, run.client_bytes, 10))} s a round",
        three_digits(run.total_bytes / 1e9),
        three_digits(run.paper_bytes / 1e9),
        three_digits(run.flops_per_round / 1e9),
        three_digits(run.flops_per_round * run.rounds / 1e12),
        f"all {run.clients} clients" if run.evaluation_bytes else "the server",
        three_digits(run.evaluation_bytes / 1e9),
        f"{len(run.layers)}",
        f"{len(run.left)}",
        _duration(run.seconds),
    )


def _print_layers(run: "RunPlan") -> None:
    table = make_table(["layer", "type", "shape", "rank", "reaches rank", "original params", "params"], left=3)
    for layer in run.layers:
        shape = "x".join(map(str, layer.shape))
        numbers = (layer.rank, layer.max_rank, layer.original_params, layer.params)
        table.add_row(layer.name, layer.type, shape, *(f"{number:,}" for number in numbers))
    if run.layers:
        typer.echo()
        stdout().print(table)
    typer.echo()
    for left in run.left:
        typer.echo(f"{left.name} stays as it is: {left.reason}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{three_digits(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
