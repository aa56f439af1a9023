"""What counts as the paper's result reached."""

from collections.abc import Sequence
from typing import Literal

from lowrank_fl.paper.rows import SIZES, PaperRow
from lowrank_fl.reporting.interval import Interval

Status = Literal["pass", "fail", "partial", "not run"]

ACCURACY_MARGIN = 1.0
"""Points below the paper's accuracy that still pass: the paper gives no spread for its tables, and its eight seeds of
Table 4 spread by a third of a point."""
COST_MARGIN = 0.05
"""The share by which bytes and rounds to an accuracy may exceed the paper's."""


def judge(row: PaperRow, ours: Interval | None, differs: Sequence[str]) -> Status:
    """Whether our result is the paper's.

    - a run that differs from the paper's, and seconds, which are another machine's: partial;
    - accuracy: our mean reaches the paper's value less one point, however wide the interval is;
    - sizes: within one printed unit;
    - bytes and rounds to an accuracy: at most 5 % above the paper's; never (`ours` is None) fails;
    - one method above another: the whole interval of our difference lies above 0, over two seeds or more; a mean that
      is not above 0 fails, and what lies between is partial, because seeds alone could have made it.
    """
    if differs or row.quantity == "seconds_at":
        return "partial"
    if ours is None:
        return "fail"
    # A rounding error of the binary numbers should not decide.
    slack = 1e-9 * max(1.0, abs(row.value))
    if row.quantity == "accuracy":
        passed = ours.mean >= row.value - ACCURACY_MARGIN - slack
    elif row.quantity in SIZES:
        passed = abs(ours.mean - row.value) <= row.unit + slack
    elif row.quantity == "above":
        passed = ours.mean > row.value
        if passed and (ours.half is None or ours.low <= row.value):
            return "partial"
    else:
        passed = ours.mean <= row.value * (1 + COST_MARGIN) + slack
    return "pass" if passed else "fail"
