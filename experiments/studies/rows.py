"""Recurrent classifiers on rows of digits: what `rnn_rows` and `lstm_rows` share.

Every clip is run at every learning rate on the same seeds. A clip *gains* where its
worst seed beats the best seed without a clip, and *loses* where its best seed is worse
than the worst without; where the ranges overlap there is no clear difference. With four
seeds, two arms that do not differ part like this once in 35 times; with fewer seeds
there is no verdict.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Column, Table

from experiments import arms, models, plots, stats, train
from experiments.clips import Clip
from experiments.config import RowsConfig
from experiments.results import Results
from experiments.studies.study import Rows, Study
from experiments.tasks import digits_rows

# Models are judged this many times in a run, besides before it.
CHECKPOINTS = 20
# A run has learned with this share of the test images right; guessing gives 0.1.
LEARNED = 0.8
FEWEST_SEEDS = 4
TABLE_CAPTION = (
    "On the test images at the end: accuracy, median and range over seeds; loss, "
    f"median; learned, seeds with accuracy >= {LEARNED} and Wilson's 95 % interval; "
    "diverged, seeds whose loss grew. Clipped: share of updates. Gradient norm before "
    "the clip: median and largest."
)


def study(about: str, smoke: RowsConfig, standard: RowsConfig) -> Study:
    """Makes a study of its two configs."""
    return Study(
        about=about,
        tiers={"smoke": smoke, "standard": standard},
        facts={"data": digits_rows.ABOUT, "initial_values": models.INIT},
        run=run,
        table=table,
        verdict=verdict,
        figures=figures,
    )


def run(config: RowsConfig, progress: Progress) -> tuple[Rows, arms.Curves]:
    """Trains all arms on all seeds."""
    task = digits_rows.load()
    model = models.RowClassifier(config.cell, config.hidden, task.classes, config.check)
    seeds = config.seed + np.arange(config.seeds)
    starts = train.start(model, seeds, task, config.check)
    chunks = train.chunks(config.updates, CHECKPOINTS)
    grid = arms.grid(config.lr, config.clip)
    total = config.updates * len(arms.by_kind(grid))
    bar = progress.add_task(config.experiment, total=total, best="")

    def report(updates: int, score: train.Score) -> None:
        best = f"best accuracy {np.max(score.accuracy):.3f}"
        progress.update(bar, advance=updates, best=best)

    def run_kind(clip: Clip, knobs: arms.Knobs) -> arms.Curves:
        setup = train.Setup(model, clip, config.optimizer, config.batch, config.check)
        log, score = train.sweep(setup, knobs, starts, task, chunks, report)
        test = {"test_loss": score.loss, "test_accuracy": score.accuracy}
        return {**log._asdict(), **test}

    curves, seconds = arms.run(grid, run_kind)
    rows = [
        {
            "experiment": config.experiment,
            "arm": grid[i].clip.spec,
            "lr": grid[i].lr,
            "seed": int(seeds[j]),
            "updates": config.updates,
            **_metrics({name: curve[i, j] for name, curve in curves.items()}),
            "seconds": seconds[i] / config.seeds,
        }
        for i, j in itertools.product(range(len(grid)), range(config.seeds))
    ]
    return rows, {**curves, "judged": np.cumsum([0, *chunks])}


def table(rows: Rows) -> Table:
    """Returns one line per arm."""
    result = Table(
        Column("lr"),
        Column("clip", overflow="fold"),
        Column("accuracy", justify="right"),
        Column("loss", justify="right"),
        Column("learned", justify="right"),
        Column("diverged", justify="right"),
        Column("clipped", justify="right"),
        Column("norm", justify="right"),
        Column("largest", justify="right"),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=rows[0]["experiment"],
        caption=TABLE_CAPTION,
    )
    for (lr, clip), runs in _by_arm(rows).items():
        learned = sum(run["learned"] for run in runs)
        low, high = stats.wilson(learned, len(runs))
        result.add_row(
            f"{lr:g}",
            clip,
            f"{_over_seeds(runs, 'test_accuracy'):.3f}",
            f"{_over_seeds(runs, 'test_loss').median:.3g}",
            f"{learned}/{len(runs)} [{low:.2f}, {high:.2f}]",
            f"{sum(run['diverged'] for run in runs)}/{len(runs)}",
            f"{np.mean([run['clipped_steps'] for run in runs]):.1%}",
            f"{_over_seeds(runs, 'grad_norm_median').median:.3g}",
            f"{_over_seeds(runs, 'grad_norm_max').high:.3g}",
        )
    return result


def verdict(rows: Rows) -> list[str]:
    """Compares every clip with none, at each learning rate and best against best."""
    by_arm = _by_arm(rows)
    found = {arm: _over_seeds(runs, "test_accuracy") for arm, runs in by_arm.items()}
    lrs = list(dict.fromkeys(lr for lr, _ in found))
    names = list(dict.fromkeys(clip for _, clip in found))
    if "none" not in names:
        return []
    if min(map(len, by_arm.values())) < FEWEST_SEEDS:
        return [f"no verdict: it takes at least {FEWEST_SEEDS} seeds"]
    best = {
        name: max((found[lr, name] for lr in lrs), key=lambda spread: spread.median)
        for name in names
    }
    places = {f"lr {lr:g}": {name: found[lr, name] for name in names} for lr in lrs}
    if len(lrs) > 1:
        places["each at its best lr"] = best
    return [
        f"{place}: {name} {_compare(accuracy[name], accuracy['none'])}"
        for place, accuracy in places.items()
        for name in names
        if name != "none"
    ]


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws losses, accuracies and gradient norms."""
    return [plots.training(results, directory / "curves.png")]


def _metrics(curves: arms.Curves) -> dict[str, Any]:
    """Sums up a run.

    It has diverged if it ends with a larger loss on the test images than it began with,
    or one that is not a number.
    """
    accuracy, loss = curves["test_accuracy"], curves["test_loss"]
    norms = stats.spread(curves["grad_norm"])
    return {
        "test_accuracy": float(accuracy[-1]),
        "test_loss": float(loss[-1]),
        "learned": bool(accuracy[-1] >= LEARNED),
        "diverged": not loss[-1] <= loss[0],
        "clipped_steps": float(curves["clipped"].mean()),
        "grad_norm_median": norms.median,
        "grad_norm_max": norms.high,
    }


def _by_arm(rows: Rows) -> dict[tuple[float, str], Rows]:
    """Groups runs by learning rate and clip, in their order."""
    found: dict[tuple[float, str], Rows] = {}
    for row in rows:
        found.setdefault((row["lr"], row["arm"]), []).append(row)
    return found


def _over_seeds(runs: Rows, name: str) -> stats.Spread:
    return stats.spread([run[name] for run in runs])


def _compare(clip: stats.Spread, none: stats.Spread) -> str:
    found = "makes no clear difference"
    if clip.low > none.high:
        found = "gains"
    if clip.high < none.low:
        found = "loses"
    return f"{found}: accuracy {clip:.3f}, without a clip {none:.3f}"
