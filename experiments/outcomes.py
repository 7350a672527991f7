"""What comes out of training many runs: a row per run, and how clips compare.

A run that diverged stays in, and counts as the worst. Every clip is run at the same
learning rates, and is compared with others at its own best one: that is chosen on a
few of the seeds, and what it gives is read off the others, so that nobody is rewarded
for having tried often.

As both runs of a seed begin with the same parameters and see the same batches, losses
are compared seed by seed:

    gap = loss without a clip - loss with it

A clip *gains* if the whole interval of the median gap is above 0, and *loses* if it is
below. Fewer than `FEWEST` pairs have no interval of 95 %, and give no verdict.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import stats
from experiments.arms import Arm, Curves
from experiments.results import Rows

# Fewest pairs of runs whose median has an interval of 95 %: 2 / 2^6 < 5 %.
FEWEST = 6
# Fewest and most seeds that choose a learning rate, if there are twice as many.
CHOOSE = 2, 5


def rows(
    experiment: str,
    grid: Sequence[Arm],
    seeds: np.ndarray,
    updates: int,
    curves: Curves,
    **labels: Any,
) -> Rows:
    """Returns a row per run.

    Args:
      experiment: its name.
      grid: the arms.
      seeds: the seeds.
      updates: updates of each run.
      curves: what `train.compare` returns, with a `Summary` of each chunk.
      **labels: what else these runs have in common.

    Returns:
      `test_loss` and `test_error` are of what the runs were judged on on the way, the
      validation split of a data set; `final_loss` and `final_error` of what they were
      judged on at the end.
    """
    return [
        {
            "experiment": experiment,
            **labels,
            "arm": arm.clip.spec,
            "lr": arm.lr,
            "seed": int(seed),
            "updates": updates,
            **_metrics(
                {name: curve[i, j] for name, curve in curves.items() if curve.ndim > 1}
            ),
            "seconds": float(curves["seconds"][i] / len(seeds)),
        }
        for i, arm in enumerate(grid)
        for j, seed in enumerate(seeds)
    ]


def _metrics(curves: Curves) -> dict[str, Any]:
    """Sums up a run.

    It has diverged if it ends with a larger loss than it began with, or one that is not
    a number. `nonfinite` is the first update whose gradient was not finite, or NaN.
    """
    loss, error = curves["test_loss"], curves["test_error"]
    broken = curves["nonfinite"][curves["nonfinite"] >= 0]
    return {
        "start_loss": float(loss[0]),
        "test_loss": float(loss[-1]),
        "test_error": float(error[-1]),
        "final_loss": float(curves["final_loss"][-1]),
        "final_error": float(curves["final_error"][-1]),
        "diverged": not loss[-1] <= loss[0],
        "nonfinite": float(broken[0]) if broken.size else np.nan,
        "clipped": float(curves["clipped"].mean()),
        "cosine": float(curves["cosine"].mean()),
        "grad_norm_median": stats.spread(curves["grad_norm_median"]).median,
        "grad_norm_max": stats.spread(curves["grad_norm_max"]).high,
        "weight_norm": float(curves["weight_norm"][-1]),
        "spectral_radius": float(curves["spectral_radius"][-1]),
    }


def by_split(row: dict[str, Any], per_nat: float = 1.0) -> dict[str, Any]:
    """Names the losses of a run by the split it was judged on.

    Args:
      row: of a run which was judged on the validation split on the way, and on the test
        split when it ended.
      per_nat: how many of the unit in which losses are shown a nat is.
    """
    splits = "test_", "final_"
    rest = {name: x for name, x in row.items() if not name.startswith(splits)}
    return {
        **rest,
        "start_loss": row["start_loss"] * per_nat,
        "valid_loss": row["test_loss"] * per_nat,
        "valid_error": row["test_error"],
        "test_loss": row["final_loss"] * per_nat,
        "test_error": row["final_error"],
    }


def solved(error: np.ndarray, judged: np.ndarray, limit: float) -> np.ndarray:
    """Returns after how many updates each run was first below an error.

    Args:
      error: shares of wrong answers, of shape (..., points).
      judged: number of updates at each point.
      limit: the error.

    Returns:
      Numbers of updates, of shape (...); NaN where a run never was.
    """
    below = error < limit
    return np.where(below.any(-1), judged[np.argmax(below, axis=-1)], np.nan)


def by(rows: Rows, *names: str) -> dict[tuple[Any, ...], Rows]:
    """Groups rows by what they have under some names, in their order."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


class Tuned(NamedTuple):
    """A clip at its best learning rate.

    Attributes:
      lr: the learning rate.
      runs: rows of the seeds that did not choose it.
    """

    lr: float
    runs: Rows


def tuned(
    runs: Rows, cost: Callable[[Rows], float], over: Sequence[str] = ("lr",)
) -> Tuned:
    """Chooses the learning rate of a clip.

    Args:
      runs: the rows of one clip, with the same seeds at every learning rate.
      cost: what should be small, of the rows of one learning rate; NaN counts as inf.
      over: names in the rows of what is chosen, if that is more.

    Returns:
      The learning rate that is best on the first quarter of the seeds (at least 2, at
      most 5, and no more than half), and its rows of the others. If there is nothing
      to choose, or one seed only, all rows.
    """
    choices = by(runs, *over)
    if len(choices) == 1:
        return Tuned(runs[0]["lr"], runs)
    first, others = _split(runs)

    def costs(choice: tuple[Any, ...]) -> float:
        found = cost([row for row in choices[choice] if row["seed"] in first])
        return np.inf if np.isnan(found) else found

    best = choices[min(choices, key=costs)]
    return Tuned(best[0]["lr"], [row for row in best if row["seed"] in others])


def _split(runs: Rows) -> tuple[list[int], list[int]]:
    """Returns the seeds that choose, and those that judge."""
    seeds = sorted({row["seed"] for row in runs})
    fewest, most = CHOOSE
    quarter = min(max(len(seeds) // 4, fewest), most)
    first = max(min(quarter, len(seeds) // 2), 1)
    return seeds[:first], seeds[first:] or seeds


def choice(runs: Rows) -> str:
    """Says how `tuned` chooses among the learning rates of runs, if it does."""
    if len(by(runs, "lr")) == 1:
        return ""
    first, others = _split(runs)
    if first == others:
        return ", chosen by the same seed"
    count = f"{len(first)} of {len(first + others)}"
    return f", chosen on the first {count} seeds and read off the others"


def edge(lr: float, runs: Rows) -> str:
    """Returns at which end of the learning rates of runs one is.

    Args:
      lr: the learning rate, beyond which a better one may be if it is at an end.
      runs: rows of all that were tried.

    Returns:
      "smallest" or "largest"; "" if it is between others, or the only one.
    """
    lrs = {row["lr"] for row in runs}
    ends = {min(lrs): "smallest", max(lrs): "largest"}
    return ends.get(lr, "") if len(lrs) > 1 else ""


def rate(lr: float, runs: Rows) -> str:
    """Writes a learning rate, and whether it is at an end of those of runs."""
    end = edge(lr, runs)
    return f"{lr:g} (the {end} tried)" if end else f"{lr:g}"


def clipped(runs: Rows) -> str:
    """Writes the share of the updates that were clipped: 0 % only if none was."""
    share = np.mean([row["clipped"] for row in runs])
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"


def median(name: str) -> Callable[[Rows], float]:
    """Returns a function of rows: the median of what they have under a name."""
    return lambda rows: stats.spread([row[name] for row in rows]).median


def typical(runs: Rows, name: str) -> stats.Spread:
    """Returns the median of what rows have under a name, and its interval."""
    values = [row[name] for row in runs]
    return stats.Spread(stats.spread(values).median, *stats.interval_of_median(values))


def gaps(clip: Rows, none: Rows, name: str) -> list[float]:
    """Returns by how much runs with a clip are better than those without, by seed.

    Args:
      clip: rows of the runs with a clip.
      none: rows of the runs without it, of the same seeds.
      name: of what should be small; NaN counts as inf.

    Returns:
      Numbers without a clip minus those with it; 0 where both are inf.
    """

    def losses(runs: Rows) -> dict[int, float]:
        return {
            row["seed"]: math.inf if math.isnan(row[name]) else row[name]
            for row in runs
        }

    found, without = losses(clip), losses(none)
    return [
        0.0 if without[seed] == found[seed] else without[seed] - found[seed]
        for seed in found
    ]


def gap(clip: Rows, none: Rows, name: str) -> stats.Spread:
    """Returns the median of `gaps`, and its interval.

    Of two in the middle it is the lower one: their mean may be that of inf and -inf.
    """
    found = gaps(clip, none, name)
    middle = sorted(found)[(len(found) - 1) // 2]
    return stats.Spread(middle, *stats.interval_of_median(found))


def effect(clip: Rows, none: Rows, name: str) -> str:
    """Says as a verb what a clip does to a quantity that should be small.

    Args:
      clip: rows of the runs with a clip.
      none: rows of the runs without it, of the same seeds.
      name: of the quantity.
    """
    if len(clip) < FEWEST:
        return f"cannot be judged from fewer than {FEWEST} seeds"
    _, low, high = gap(clip, none, name)
    if low > 0:
        return "gains"
    return "loses" if high < 0 else "makes no clear difference"
