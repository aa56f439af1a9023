"""How many examples of each class every client holds, as numbers and as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lowrank_fl.data.examples import Examples

_NAMED_CLASSES = 30
"""Above so many classes their names no longer fit beside the picture."""


def label_counts(examples: Examples, parts: Sequence[np.ndarray]) -> np.ndarray:
    """int64 `(clients, classes)`; `parts` are the clients' row numbers."""
    labels = examples.labels.numpy()
    return np.stack([np.bincount(labels[rows], minlength=len(examples.classes)) for rows in parts])


def plot_label_counts(counts: np.ndarray, classes: Sequence[str], path: Path | str) -> None:
    """Write a picture of `counts`, `(clients, classes)`: a row a class, a column a client, darker for more.

    Above it stands what each client holds in all. The format is the one that `path` ends in.
    """
    # matplotlib takes a second to import; a Figure of its own leaves pyplot's windows alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients = len(counts)
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    totals, grid = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])

    totals.bar(np.arange(clients), counts.sum(axis=1), width=0.8, color="#2a6f97")
    totals.set_ylabel("examples")
    totals.spines[["top", "right"]].set_visible(False)
    totals.set_title(f"{counts.sum():,} examples among {clients} clients")

    picture = grid.imshow(counts.T, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0)
    grid.set_xlabel("client")
    grid.set_ylabel("class")
    grid.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    if len(classes) <= _NAMED_CLASSES:
        grid.set_yticks(np.arange(len(classes)), classes)
    figure.colorbar(picture, ax=grid, label="examples of the class", pad=0.01)
    figure.savefig(path, dpi=120)
