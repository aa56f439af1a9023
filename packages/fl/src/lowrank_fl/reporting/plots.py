"""Accuracy against traffic, as a picture."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from lowrank_fl.results import RoundRow

# Okabe and Ito's colours without the yellow, which is faint on white; told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")

_INSIDE = 6
"""Above so many lines the legend would cover them, so it stands beside the axes."""
_MARKED = 30
"""Up to so many rounds each has a dot."""


def plot_accuracy_vs_bytes(runs: Sequence[tuple[str, Sequence[RoundRow]]], path: Path, title: str) -> None:
    """Write a PNG: a line for each label, the megabytes sent so far on a logarithmic axis, accuracy in percent.

    Runs that share a label are seeds of one thing: the line is their mean, round by round as far as all of them got,
    and the band reaches from the worst to the best of them. A run without rounds is left out.
    """
    # matplotlib takes a second to import; a Figure of its own leaves pyplot's windows alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    groups: dict[str, list[Sequence[RoundRow]]] = {}
    for label, rows in runs:
        if rows:
            groups.setdefault(label, []).append(rows)

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel("MB sent, up and down, all clients")
    axes.set_ylabel(_accuracy_axis([row for seeds in groups.values() for rows in seeds for row in rows]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for number, (label, seeds) in enumerate(groups.items()):
        megabytes = _mean_by_round(
            [[sent / 1e6 for sent in accumulate(row.total_bytes for row in rows)] for rows in seeds]
        )
        accuracies = [[100 * row.accuracy for row in rows] for rows in seeds]
        colour = _COLOURS[number % len(_COLOURS)]
        line = _LINES[number // len(_COLOURS) % len(_LINES)]
        name = label if len(seeds) == 1 else f"{label} (mean of {len(seeds)} runs)"
        # One round alone would be a line without length.
        mark = "o" if len(megabytes) <= _MARKED else None
        axes.plot(megabytes, _mean_by_round(accuracies), line, color=colour, label=name, lw=1.8, marker=mark, ms=4)
        if len(seeds) > 1:
            rounds = list(zip(*accuracies, strict=False))
            low, high = [min(values) for values in rounds], [max(values) for values in rounds]
            axes.fill_between(megabytes, low, high, color=colour, alpha=0.15, lw=0)
    if groups:
        axes.set_xscale("log")
        left, right = axes.get_xlim()
        # A short axis may hold none of 1, 2 and 5.
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0)) if right / left > 8 else MaxNLocator(8, steps=[1, 2, 5, 10])
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside right upper") if len(groups) > _INSIDE else axes.legend(loc="best")
    figure.savefig(path, format="png", dpi=140)


def _accuracy_axis(rows: Sequence[RoundRow]) -> str:
    clients_tested = {row.worst_accuracy is not None for row in rows}
    if clients_tested == {True}:
        return "mean accuracy of the clients on what they hold out, %"
    return "accuracy, %" if True in clients_tested else "accuracy on the test set, %"


def _mean_by_round(runs: Sequence[Sequence[float]]) -> list[float]:
    # An interrupted seed has fewer rounds; the mean ends where it does.
    return [sum(values) / len(values) for values in zip(*runs, strict=False)]
