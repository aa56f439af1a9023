"""Parameters against reachable rank, and traffic, as a picture."""

# matplotlib leaves the types of its options open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from pathlib import Path

from lowrank_cli.count.counting import Counted
from lowrank_cli.count.output import Traffic
from lowrank_core.errors import LowrankError, UsageError

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's without the yellow: told apart with any colour vision."""
_MARKERS = ("o-", "s--", "^:")
_ENDINGS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Before anything is counted.

    Raises:
        UsageError: the ending is none that can be drawn.
        LowrankError: there is no such folder.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise UsageError(f"--plot writes {', '.join(_ENDINGS)}, got {path.name!r}; give the file one of these endings")
    if not path.parent.is_dir():
        raise LowrankError(f"--plot cannot write to {path}: there is no folder {path.parent}; make it first")


def plot_costs(results: Sequence[Counted], number_bytes: int, traffic: Traffic | None, path: Path) -> None:
    """Left, trained parameters against the reachable rank (its mean over the changed layers, as a share of full rank),
    a line a method; right, the bytes that travel: of all rounds, or of one client's single round.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, max(4.5, 0.4 * len(results))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    methods = list(dict.fromkeys(counted.report.method for counted in results))
    for position, method in enumerate(methods):
        points = [c for c in results if c.report.method == method]
        xs, ys = [c.report.trainable_params for c in points], [_mean_rank(c) for c in points]
        left.plot(
            xs,
            ys,
            _MARKERS[position // len(_COLOURS) % len(_MARKERS)],
            color=_COLOURS[position % len(_COLOURS)],
            label=method,
        )
    left.set_xscale("log")
    left.set_xlabel("trained parameters")
    left.set_ylabel("reachable rank, mean share of full rank, %")
    left.set_yscale("log")
    left.legend()
    rounds = traffic or Traffic(rounds=1, clients_per_round=1)
    sent = [c.report.transferred_params * number_bytes for c in results]
    totals = [rounds.rounds * rounds.bytes_per_round(each) for each in sent]
    unit, scale = ("GB", 1e9) if max(totals) >= 1e10 else ("MB", 1e6)
    names = [f"{c.report.method}\n{c.report.rule}".strip() for c in results]
    colours = [_COLOURS[methods.index(c.report.method) % len(_COLOURS)] for c in results]
    right.barh(range(len(results)), [total / scale for total in totals], color=colours)
    right.set_yticks(range(len(results)), names)
    right.invert_yaxis()
    right.set_xlabel(f"{unit}, down and up; rounds: {rounds.rounds}, clients a round: {rounds.clients_per_round}")
    figure.suptitle(f"{results[0].model}: {results[0].report.original_params:,} parameters")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise LowrankError(f"--plot cannot write to {path}: {error.strerror}; give another file") from None


def _mean_rank(counted: Counted) -> float:
    """Of the original, 100: nothing limits its ranks."""
    layers = counted.report.layers
    if not layers:
        return 100.0
    shares = [layer.max_rank / min(layer.shape[0], layer.original_params // layer.shape[0]) for layer in layers]
    return 100 * sum(shares) / len(shares)
