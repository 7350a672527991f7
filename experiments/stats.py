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


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Returns the exact two-sided p-value of McNemar's test.

    Args:
      first: whether each pair's first run succeeded.
      second: whether its second run did, with the same seed.

    Returns:
      The chance that the pairs which differ, if each were as likely to differ in one
      direction as in the other, part at least as unevenly as they do; 1 if none does.

    References:
      McNemar, Note on the sampling error of the difference between correlated
      proportions or percentages, 1947; exact, as a sign test.
    """
    ahead = sum(x and not y for x, y in zip(first, second, strict=True))
    behind = sum(y and not x for x, y in zip(first, second, strict=True))
    differing = ahead + behind
    tail = sum(math.comb(differing, k) for k in range(min(ahead, behind) + 1))
    return min(2 * tail / 2**differing, 1.0)


def survival(times: np.ndarray, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the Kaplan-Meier curve of times to an event, all observed to one end.

    Args:
      times: when it happened in each run, of shape (runs,); NaN: not by the end.
      end: how long all were observed.

    Returns:
      Times, from 0 to the end, and the share of runs in which it has not happened yet
      just after each. As every run is observed to the same end, Kaplan and Meier's
      estimate (Nonparametric estimation from incomplete observations, 1958) is this
      share.
    """
    known = np.sort(times[~np.isnan(times)])
    waiting = 1 - np.arange(1, len(known) + 1) / len(times)
    last = waiting[-1] if len(known) else 1.0
    return np.concatenate([[0], known, [end]]), np.concatenate([[1], waiting, [last]])


def interval_of_median(
    values: Sequence[float] | np.ndarray, level: float = 0.95
) -> tuple[float, float]:
    """Returns an interval for the median of a distribution, from order statistics.

    Args:
      values: independent draws; NaN is taken as inf.
      level: smallest chance that the interval holds the median. With fewer than 6
        values no interval has 0.95; then it is their range.

    Returns:
      Lower and upper end, two of the values.

    References:
      Thompson, On confidence ranges for the median and other expectation distributions
      for populations of unknown distribution form, 1936.
    """
    known = np.sort(np.where(np.isnan(values), math.inf, values))
    runs, cut = len(known), 0
    while True:
        outside = sum(math.comb(runs, k) for k in range(cut + 1)) / 2**runs
        if 2 * outside > 1 - level or 2 * (cut + 1) > runs:
            break
        cut += 1
    cut = max(cut - 1, 0)
    return float(known[cut]), float(known[runs - 1 - cut])
