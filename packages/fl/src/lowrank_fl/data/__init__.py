"""Examples to train and test on, and their shares for the clients.

Each name is loaded on first use, because torch and flwr-datasets take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_fl.data.counts import label_counts, plot_label_counts
    from lowrank_fl.data.examples import Examples
    from lowrank_fl.data.load import load_examples
    from lowrank_fl.data.partition import partition_examples

__all__ = ["Examples", "label_counts", "load_examples", "partition_examples", "plot_label_counts"]

_HOME = {
    "Examples": "examples",
    "label_counts": "counts",
    "load_examples": "load",
    "partition_examples": "partition",
    "plot_label_counts": "counts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
