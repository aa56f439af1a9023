"""What is counted, as tables."""

import re
from collections.abc import Iterable, Sequence

import typer

from lowrank_cli.count.counting import Counted
from lowrank_cli.count.output import Traffic
from lowrank_cli.tables import make_table, stdout
from lowrank_core.costs.report import LayerCost

_ROWS = 40
"""Of more layers, those alike share a row."""


def show_one(counted: Counted, dtype: str, size: int, batch_size: int, traffic: Traffic | None, layers: bool) -> None:
    """A case's totals, then its layers: one row each if `layers`, or if there are few."""
    report = counted.report
    table = make_table([counted.model, f"{report.method}, {report.rule}".rstrip(", ")])
    rows = [("original params", f"{report.original_params:,}"), ("params", f"{report.params:,}")]
    rows.append(("trainable params", f"{report.trainable_params:,}"))
    if report.final_params is not None:
        rows.append(("trainable params under the final budget", f"{report.final_params:,}"))
    rows.append(("trainable / original", f"{report.ratio:.2%}"))
    if report.transferred_params != report.trainable_params:
        rows.append(("transferred params", f"{report.transferred_params:,}"))
    local = sum(layer.local_params for layer in report.layers)
    if local:
        rows.append(("params that stay with the client", f"{local:,}"))
    rows.append((f"{_sent(counted)}, {dtype}", in_bytes(report.transferred_params * size)))
    if report.layers:
        rows += [("layers changed", f"{len(report.layers):,}"), ("ranks", _span(layer.rank for layer in report.layers))]
        rows.append(("reachable ranks", _span(layer.max_rank for layer in report.layers)))
    if counted.case.kind == "budget":
        rows.append((f"budget {counted.case.value} gives", report.rule))
    if counted.arithmetic is not None:
        cost = counted.arithmetic
        rows.append(("GFLOP a forward of one example", _short(cost.forward / 1e9)))
        if cost.composing:
            rows.append(("  of it composing weights, once a batch", _short(cost.composing / 1e9)))
        if report.method != "original":
            rows.append(("  without the method", _short(cost.original / 1e9)))
        if cost.training_overhead is not None and report.method != "original":
            against = "frozen base" if counted.case.is_adapter else "original"
            rows.append((f"training step of {batch_size}, against the {against}'s", _percent(cost.training_overhead)))
    for name, value in _traffic_rows(report.transferred_params * size, traffic):
        rows.append((name, value))
    for row in rows:
        table.add_row(*row)
    stdout().print(table)
    _show_layers(counted, layers)
    _show_left(counted, layers)


def show_many(results: Sequence[Counted], dtype: str, size: int, batch_size: int, traffic: Traffic | None) -> None:
    """A row a case."""
    columns = ["method", "rule", "params", "trainable", "of original", "transferred", dtype, "max rank", "GFLOP"]
    columns += [f"step of {batch_size}"] + (["traffic"] if traffic else [])
    table = make_table(columns, left=2)
    for counted in results:
        report, cost = counted.report, counted.arithmetic
        sent = report.transferred_params * size
        overhead = None if cost is None else cost.training_overhead
        row = [report.method, report.rule, f"{report.params:,}", f"{report.trainable_params:,}", f"{report.ratio:.2%}"]
        row += [f"{report.transferred_params:,}", in_bytes(sent)]
        row.append(f"{max((layer.max_rank for layer in report.layers), default=0):,}" if report.layers else "")
        row.append("" if cost is None else _short(cost.forward / 1e9))
        row.append("" if overhead is None or report.method == "original" else _percent(overhead))
        if traffic:
            row.append(in_bytes(traffic.rounds * traffic.bytes_per_round(sent)))
        table.add_row(*row)
    stdout().print(table)
    typer.echo()
    unknown = [each.report.method for each in results if each.arithmetic and each.arithmetic.training_overhead is None]
    typer.echo(
        f"{results[0].model}: {results[0].report.original_params:,} parameters. GFLOP of a forward of one example; "
        f"a training step of {batch_size} against the frozen base's (adapters) or the original's (factors)"
        + (f", which is not estimated for {', '.join(dict.fromkeys(unknown))}." if unknown else ".")
    )


def in_bytes(count: int) -> str:
    """`46.4 MB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{_short(count / scale)} {unit}"
    return f"{count} B"


def _short(number: float) -> str:
    """Three digits, or all before the point: `0.0504`, `46.4`, `6,890`."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}".rstrip(".") if number else "0"


def _sent(counted: Counted) -> str:
    return "adapter" if counted.case.is_adapter else "transferred"


def _percent(share: float) -> str:
    return f"{share:+.1%}"


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _traffic_rows(sent: int, traffic: Traffic | None) -> list[tuple[str, str]]:
    if traffic is None:
        return []
    each = traffic.bytes_per_round(sent)
    clients = f"{traffic.clients_per_round} client{'s' if traffic.clients_per_round > 1 else ''}"
    return [
        (f"traffic a round, {clients} down and up", in_bytes(each)),
        (f"traffic of {traffic.rounds:,} rounds", in_bytes(traffic.rounds * each)),
    ]


def _show_layers(counted: Counted, every: bool) -> None:
    layers = counted.report.layers
    if not layers:
        return
    typer.echo()
    columns = ["type", "shape", "rank", "reaches rank", "original params", "params"]
    if every or len(layers) <= _ROWS:
        table = make_table(["layer", *columns], left=3)
        for layer in layers:
            table.add_row(layer.name, *_cells(layer), f"{layer.original_params:,}", f"{layer.params:,}")
    else:
        groups: dict[tuple[object, ...], list[LayerCost]] = {}
        for layer in layers:
            groups.setdefault((_role(layer.name), *_cells(layer), layer.params), []).append(layer)
        table = make_table(["layers", *columns, "layers alike"], left=3)
        for (role, *_), alike in groups.items():
            original, params = sum(x.original_params for x in alike), sum(x.params for x in alike)
            table.add_row(str(role), *_cells(alike[0]), f"{original:,}", f"{params:,}", f"{len(alike):,}")
    stdout().print(table)
    if not every and len(layers) > _ROWS:
        typer.echo(f"{len(layers):,} layers, those alike in one row with their sums; --layers lists each")


def _cells(layer: LayerCost) -> tuple[str, str, str, str]:
    return layer.type, "x".join(map(str, layer.shape)), f"{layer.rank:,}", f"{layer.max_rank:,}"


def _role(name: str) -> str:
    """What follows the last block number: `attn1.to_out.0` of `blocks.1.attn1.to_out.0`."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    # In "ff.net.0.proj" the number is no block's.
    last = next((i for i in reversed(numbered) if not re.fullmatch(r"net|to_out", parts[i - 1])), None)
    return name if last is None else "*." + ".".join(parts[last + 1 :])


def _show_left(counted: Counted, every: bool) -> None:
    left = counted.report.left
    if not left:
        return
    typer.echo()
    if every or len(left) <= _ROWS:
        for entry in left:
            typer.echo(f"{entry.name} stays as it is: {entry.reason}")
    else:
        typer.echo(f"{len(left):,} layers stay as they are; --layers says why")
