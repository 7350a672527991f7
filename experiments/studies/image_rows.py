"""The usual tutorial: a small LSTM on images row by row, without and with clips.

Ten units read an image from top to bottom. Tutorials clip here, each element at 0.5
(Keras' `clipvalue`) or each array at norm 1 (Keras' `clipnorm`), and report a gain. Is
there one? Adam divides by the size of past gradients, an LSTM has gates against
explosion, and the steps are few. Every clip at its best learning rate is compared with
none at its own.

Learning rates are chosen by accuracy on validation images; clips are compared by
accuracy on the test images, with other seeds.

`clip_by_leaf_norm` is what `clipnorm` is, but a leaf here is the matrix or the biases
of one gate. Keras has the four gates of a layer in one array, whose norm is up to twice
as large: the same threshold clips less often here.

The same question for plain SGD is `--optimizer sgd --lr 0.3 1 3`; for the images of the
tutorials, `--tier full --data DIRECTORY` on an accelerator.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

from experiments import arms, models, outcomes, plots, train
from experiments.config import TrainingConfig, check_counts
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies.study import Study
from experiments.tasks import image_rows
from experiments.tasks.data_sets import Split

# How often a run is judged on the validation images.
CHECKS = 20
SPLITS: tuple[Split, ...] = ("valid", "test")
# What a model reaches that gives the same probability to all classes.
GUESSING = {"loss": math.log(image_rows.CLASSES), "accuracy": 1 / image_rows.CLASSES}
TABLE_CAPTION = (
    "On the test images at the end: accuracy and loss, median with its 95 % interval "
    "(the range, of fewer than 6 seeds). Diverged: runs that end with a larger loss "
    "than they began with. Clipped: share of the updates. Norm: of the gradient before "
    "the clip, median over updates and seeds, and largest."
)
# What follows it where learning rates are chosen.
CHOSEN = " The verdict is at the best learning rates, by accuracy on validation images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRowsConfig(TrainingConfig):
    """Training of a recurrent classifier that reads images row by row."""

    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    """The recurrent cell; rnn: plain tanh units."""
    hidden: int = 10
    """Its units."""
    optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    """What follows the clip; momentum: SGD with momentum 0.9."""
    data: Path | None = None
    """Directory with the four idx files of Fashion-MNIST, from
    https://github.com/zalandoresearch/fashion-mnist, or of MNIST. Default: the digits
    of scikit-learn."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        super().__post_init__()
        check_counts(hidden=self.hidden)


def run(config: ImageRowsConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Trains all arms on all seeds."""
    task, final = (image_rows.load(config.data, split) for split in SPLITS)
    model = models.Recurrent(
        config.cell, config.hidden, task.outputs, check=config.check
    )
    setup = train.Setup(model, config.optimizer, config.batch, config.check)
    grid = arms.grid(config.lr, config.clip)
    seeds = config.seed + np.arange(config.seeds)
    pieces = train.chunks(config.updates, CHECKS)
    journal.expect(config.experiment, config.updates * len(arms.by_kind(grid)))
    curves = train.compare(setup, grid, seeds, task, pieces, journal, final=final)
    rows = [
        outcomes.by_split(row)
        for row in outcomes.rows(config.experiment, grid, seeds, config.updates, curves)
    ]
    shown = {
        "valid_loss": curves["test_loss"],
        "valid_accuracy": 1 - curves["test_error"],
        "grad_norm": curves["grad_norm"],
        "clipped": curves["clipped"],
    }
    return rows, {**shown, "judged": np.cumsum([0, *pieces])}


def table(rows: Rows) -> Table:
    """Returns one line per arm."""
    names = "accuracy", "loss", "diverged", "clipped", "norm", "largest"
    choice = outcomes.choice(rows)
    result = Table(
        Column("lr", justify="right"),
        Column("clip", overflow="fold"),
        *(Column(name, justify="right") for name in names),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=rows[0]["experiment"],
        caption=TABLE_CAPTION + (f"{CHOSEN}{choice}." if choice else ""),
    )
    for (lr, arm), runs in outcomes.by(rows, "lr", "arm").items():
        result.add_row(
            f"{lr:g}",
            arm,
            _accuracy(runs),
            f"{outcomes.typical(runs, 'test_loss'):.3g}",
            f"{sum(run['diverged'] for run in runs)}/{len(runs)}",
            outcomes.clipped(runs),
            f"{outcomes.median('grad_norm_median')(runs):.2g}",
            f"{max(run['grad_norm_max'] for run in runs):.2g}",
        )
    return result


def verdict(rows: Rows) -> list[str]:
    """Compares every clip with none, each at its best learning rate."""
    found = {
        arm: outcomes.tuned(runs, outcomes.median("valid_error"))
        for (arm,), runs in outcomes.by(rows, "arm").items()
    }
    none = found.pop("none", None)
    if none is None:
        return []
    return [
        f"{arm} {outcomes.effect(clip.runs, none.runs, 'test_error')}: accuracy "
        f"{_accuracy(clip.runs)} at learning rate {outcomes.rate(clip.lr, rows)}, "
        f"where it clips {outcomes.clipped(clip.runs)} of the updates; without a clip "
        f"{_accuracy(none.runs)} at {outcomes.rate(none.lr, rows)}; the gap, seed by "
        f"seed, is {outcomes.gap(clip.runs, none.runs, 'test_error'):.3f}"
        for arm, clip in found.items()
    ]


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws what happens in training, and the accuracy of all arms as a map."""
    panels = [
        plots.Panel(
            "valid_loss",
            "validation loss\nin nats",
            "log",
            [("guessing", GUESSING["loss"])],
        ),
        plots.Panel(
            "valid_accuracy",
            "validation accuracy",
            baselines=[("guessing", GUESSING["accuracy"])],
        ),
        plots.Panel("grad_norm", "gradient norm\nbefore the clip", "log"),
        plots.Panel("clipped", "share of updates\nclipped"),
    ]
    caption = _caption(results)
    return [
        plots.training(results, directory / "curves.png", panels, caption),
        _draw_map(results, directory / "map.png", caption),
    ]


def _draw_map(results: Results, path: Path, caption: str) -> Path:
    """Draws the median accuracy of every arm."""
    config = results.about["config"]
    size = 5.5 + 0.8 * len(config["lr"]), 1.7 + 0.5 * len(config["clip"])
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()

    def accuracy(runs: Rows) -> float:
        return 1 - outcomes.median("test_error")(runs)

    span = {"cmap": "viridis", "vmin": GUESSING["accuracy"], "vmax": 1}
    mesh = plots.arms_map(axis, results.rows, accuracy, ".3f", **span)
    figure.colorbar(mesh, label="test accuracy, median")
    runs = f"{config['seeds']} seeds, {config['updates']} updates {caption}"
    hatched = "hatched: half the runs diverged, or more"
    return plots.save(figure, path, results, f"{runs}\n{hatched}")


def _caption(results: Results) -> str:
    config = results.about["config"]
    images = "digits" if config["data"] is None else Path(config["data"]).name
    return (
        f"of {config['batch']} images ({images}); {config['cell']} with "
        f"{config['hidden']} units, {config['optimizer']}"
    )


def _accuracy(runs: Rows) -> str:
    accuracies = [{"accuracy": 1 - run["test_error"]} for run in runs]
    return f"{outcomes.typical(accuracies, 'accuracy'):.3f}"


SMOKE = ImageRowsConfig(
    experiment="image_rows",
    lr=(0.01,),
    clip=("none", "clip:0.5", "clip_by_global_norm:1.0"),
    seeds=6,
    updates=500,
    batch=32,
)
STANDARD = dataclasses.replace(
    SMOKE,
    lr=(0.003, 0.01, 0.03, 0.1),
    clip=("none", "clip:0.5", "clip_by_leaf_norm:1.0", "clip_by_global_norm:1.0"),
    seeds=10,
    updates=1000,
)
STUDY = Study(
    about="the tutorial: 10-unit LSTM on image rows with Adam, and the usual clips",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(
            STANDARD, lr=(0.001, 0.003, 0.01, 0.03, 0.1), seeds=20, updates=20_000
        ),
    },
    facts=lambda config: {
        "data": image_rows.about(config.data),
        "initial_values": models.INITS["flax"],
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
