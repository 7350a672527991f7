"""Statistics over runs: one that diverged counts as the worst and is never dropped."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Median and range over runs."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Writes `median [low, high]`, each number as the specification says."""
        median, low, high = (format(value, spec) for value in self)
        return f"{median} [{low}, {high}]"


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    """Summarises a quantity; NaN is taken as inf."""
    known = np.where(np.isnan(values), math.inf, values)
    return Spread(float(np.median(known)), float(known.min()), float(known.max()))


def wilson(successes: int, runs: int) -> tuple[float, float]:
    """Returns the 95 % interval of a success rate.

    Args:
      successes: number of runs that succeeded.
      runs: number of independent runs, at least 1.

    Returns:
      Lower and upper end, in [0, 1].

    References:
      Wilson, Probable inference, the law of succession, and statistical inference,
      1927. Unlike the textbook interval it does not shrink to a point at 0 or 1.
    """
    z = 1.959964
    share = successes / runs
    centre = share + z**2 / (2 * runs)
    half = z * math.sqrt(share * (1 - share) / runs + z**2 / (4 * runs**2))
    scale = 1 + z**2 / runs
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)
