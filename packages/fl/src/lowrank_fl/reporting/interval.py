"""A mean over seeds and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

# Student's t at 97.5 % for 1 to 30 degrees of freedom; scipy, which computes it, takes a second to import.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448)
_T += (2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484)
_T += (2.0452, 2.0423)


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % confidence interval; no width is known of a single value."""

    mean: float
    half: float | None = None

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    def as_tree(self) -> dict[str, float | list[float] | None]:
        """For JSON."""
        return {"mean": self.mean, "interval": None if self.half is None else [self.low, self.high]}

    def scaled(self, factor: float) -> "Interval":
        return Interval(self.mean * factor, None if self.half is None else self.half * factor)


def interval_of(values: Sequence[float]) -> Interval:
    """Student's t over independent values, one a seed: mean ± t(0.975, n-1) s / √n."""
    if len(values) < 2:
        return Interval(values[0])
    return Interval(fmean(values), student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values)))


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    # Its expansion in 1 / degrees, two terms.
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
