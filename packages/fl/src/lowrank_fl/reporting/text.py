"""Numbers and names as people read them."""

import math
from collections.abc import Mapping
from typing import Any

METHODS = ("model.method", "adapter.method")
"""The keys whose values a label has first."""


def label_of(method: str, swept: Mapping[str, Any]) -> str:
    """A run among others: its method and what else is swept, `fedpara, gamma 0.1`."""
    others = (f"{key.rpartition('.')[2]} {value}" for key, value in swept.items() if key not in METHODS)
    return ", ".join([method, *others])


def three_digits(value: float) -> str:
    """A number of any size to three significant digits, never with an exponent: `0.0341`, `7.20`, `118`, `48,300`."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"
