"""What the paper printed: `tables.json` as objects."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class PaperRow:
    """One number of the paper, and the run that would give it.

    Reference: Hyeon-Woo, Ye-Bin and Oh, FedPara, ICLR 2022, https://arxiv.org/abs/2108.06098
    """

    source: str
    """`Table 2`, `Figure 3`."""
    preset: str
    quantity: str
    """One of `QUANTITIES`."""
    value: float
    unit: float
    """One unit of the last place that the paper printed."""
    set: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What differs from the preset, by dotted key."""
    target: int | None = None
    """The accuracy to reach, in percent."""
    mbps: int | None = None
    computing: float | None = None
    """Of `seconds_at`: the seconds that the paper's machine trained."""
    other: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of `above`: the run that this one is compared with, as `set`."""

    @property
    def what(self) -> str:
        """The quantity in words."""
        kind = self.other.get("personalization.kind")
        other = self.other.get("model.method") if kind == "none" else kind
        return QUANTITIES[self.quantity].format(target=self.target, mbps=self.mbps, other=other)


QUANTITIES: Mapping[str, str] = {
    "accuracy": "accuracy, %",
    "rounds_to": "rounds to {target} %",
    "gigabytes_to": "GB to {target} %",
    "params": "parameters, M",
    "megabytes_a_round": "MB a client and round",
    "transfer_ratio": "original / transferred parameters",
    "seconds_at": "s a round at {mbps} Mbps",
    "above": "points above {other}",
}
"""What is compared. GB are 2^30 bytes, as the paper's are (its rounds times its model sizes give its figures only so),
MB are 10^6 bytes, as in its Table 12."""

SIZES = frozenset({"params", "megabytes_a_round", "transfer_ratio"})
"""Quantities that follow from the model alone, however long it was trained."""


@cache
def paper_rows() -> tuple[PaperRow, ...]:
    """Every number of the paper that a run can be compared with."""
    return tuple(PaperRow(**row) for row in _tables()["rows"])


def paper_settings() -> dict[str, dict[str, Any]]:
    """The paper's Table 6 and the settings in its text, by data set."""
    return _tables()["settings"]


def stand_ins() -> dict[str, str]:
    """Data sets that can be had for ones that often cannot; a comparison over them is never more than partial."""
    return _tables()["stand_ins"]


def ranges(preset: str) -> dict[str, list[float]]:
    """Keys of a preset for which the paper gives no value but bounds, which belong to it."""
    return _tables()["ranges"].get(preset, {})


@cache
def _tables() -> dict[str, Any]:
    return json.loads((files(__name__.rpartition(".")[0]) / "tables.json").read_text(encoding="utf-8"))
