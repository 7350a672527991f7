"""Prediction of each next step of a data set: what `music` and `char_lm` share.

Every clip is run at every learning rate, on the same seeds. Clips are compared each at
its own best learning rate: that is the one with the lowest median validation loss on
the first seeds, and what it gives on the test split is read off the others, seed by
seed (`experiments.outcomes`).

How wide the range of good learning rates is, is another question: a run has *failed* if
it ends with a larger validation loss than the weakest baseline, and a learning rate
*beats* the strongest one if its median run ends below that. Loss, not NaN, decides:
tanh and sigmoid units hold the answers finite.

A threshold means nothing without the loss it is for: here losses are means over the
batch and all steps, in nats. Where a loss is summed over T steps instead, gradients are
T times as long, and so must be the threshold.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

from experiments import arms, models, outcomes, plots, stats, train
from experiments.config import Tier, TrainingConfig, check_counts
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies.study import Study
from experiments.tasks.data_sets import Split

TABLE_CAPTION = (
    "Losses at the end, in {unit}, of each clip at its best learning rate by the "
    "validation loss{choice}: median with its 95 % interval (the range, of fewer than "
    "6 seeds). Gap: test loss without a clip minus that with it, seed by seed. "
    "Clipped: share of the updates. Norm: of the gradient before the clip, median. At "
    "all learning rates: failed, runs that end with a larger validation loss than the "
    "weakest baseline; beat, learning rates whose median run ends below the strongest "
    "one."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionConfig(TrainingConfig):
    """Training of a recurrent network that predicts each next step."""

    length: int
    """Steps of a sequence."""
    cell: Literal["rnn", "lstm", "gru"] = "rnn"
    """The recurrent cell; rnn: plain units."""
    hidden: int = 64
    """Its units."""
    initial: str = "flax"
    """Initial values: flax; of an rnn also basic_tanh, smart_tanh, or sigmoid, which
    has sigmoid units."""
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """What follows the clip; momentum: SGD with momentum 0.9."""
    checks: int = 10
    """How often a run is judged."""
    data: Path | None = None
    """File with the data set."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        super().__post_init__()
        check_counts(length=self.length, hidden=self.hidden, checks=self.checks)
        models.Recurrent(self.cell, self.hidden, outputs=1, initial=self.initial)


class DataSet(NamedTuple):
    """What is predicted; a config says from which file and in what lengths.

    Attributes:
      unit: in which losses are shown.
      per_nat: how many of it a nat is.
      loss: a sentence that says what is minimised.
      about: says which data set it is, and refuses what cannot be read.
      load: returns the task, judged on a split.
      baselines: returns what is reached on a split without training, by name.
    """

    unit: str
    per_nat: float
    loss: str
    about: Callable[[Any], str]
    load: Callable[[Any, Split], Any]
    baselines: Callable[[Any, Split], dict[str, float]]


def study(
    about: str, data_set: DataSet, tiers: Mapping[Tier, PredictionConfig]
) -> Study:
    """Makes a study of its configs."""
    return Study(
        about=about,
        tiers=tiers,
        facts=lambda config: {
            "data": data_set.about(config),
            "loss": data_set.loss,
            "initial_values": models.INITS[config.initial],
        },
        run=functools.partial(run, data_set),
        table=table,
        verdict=verdict,
        figures=figures,
    )


def run(
    data_set: DataSet, config: PredictionConfig, journal: Journal
) -> tuple[Rows, arms.Curves]:
    """Trains all arms on all seeds.

    Runs are judged on the validation split, and at the end on the test split too. The
    first rows are those of the baselines, which take no updates.
    """
    task, final = data_set.load(config, "valid"), data_set.load(config, "test")
    model = models.Recurrent(
        config.cell, config.hidden, task.outputs, config.initial, config.check
    )
    setup = train.Setup(model, config.optimizer, config.batch, config.check)
    grid = arms.grid(config.lr, config.clip)
    seeds = config.seed + np.arange(config.seeds)
    pieces = train.chunks(config.updates, config.checks)
    journal.expect(config.experiment, config.updates * len(arms.by_kind(grid)))
    curves = train.compare(setup, grid, seeds, task, pieces, journal, final=final)
    counting = _counting(data_set, config)
    weakest = max(row["valid_loss"] for row in counting)
    trained = [
        outcomes.by_split(row, data_set.per_nat)
        for row in outcomes.rows(config.experiment, grid, seeds, config.updates, curves)
    ]
    for row in trained:
        row.update(unit=data_set.unit, failed=not row["valid_loss"] <= weakest)
    shown = {name: curves[name] for name in ("grad_norm", "clipped")}
    return counting + trained, {
        "valid_loss": curves["test_loss"] * data_set.per_nat,
        **shown,
        "judged": np.cumsum([0, *pieces]),
    }


def _counting(data_set: DataSet, config: PredictionConfig) -> Rows:
    """Returns a row per baseline."""
    test = data_set.baselines(config, "test")
    return [
        {
            "experiment": config.experiment,
            "arm": name,
            "lr": math.nan,
            "updates": 0,
            "unit": data_set.unit,
            "valid_loss": loss,
            "test_loss": test[name],
            "seconds": 0.0,
        }
        for name, loss in data_set.baselines(config, "valid").items()
    ]


class Found(NamedTuple):
    """What came out for a clip.

    Attributes:
      tuned: the clip at its best learning rate.
      runs: all its rows.
      beating: number of learning rates whose median run ends below all baselines.
    """

    tuned: outcomes.Tuned
    runs: Rows
    beating: int


def _found(rows: Rows) -> dict[str, Found]:
    """Returns what came out, by clip."""
    strongest = min(_baselines(rows, "valid_loss").values())
    loss = outcomes.median("valid_loss")
    return {
        arm: Found(
            outcomes.tuned(runs, loss),
            runs,
            sum(loss(same) < strongest for same in outcomes.by(runs, "lr").values()),
        )
        for (arm,), runs in outcomes.by(_trained(rows), "arm").items()
    }


def _trained(rows: Rows) -> Rows:
    """Returns the rows of runs: baselines take no updates."""
    return [row for row in rows if row["updates"]]


def _baselines(rows: Rows, name: str) -> dict[str, float]:
    return {row["arm"]: row[name] for row in rows if not row["updates"]}


def table(rows: Rows) -> Table:
    """Returns one line per clip, and one per baseline."""
    found = _found(rows)
    names = (
        "lr",
        "valid loss",
        "test loss",
        "gap",
        "clipped",
        "norm",
        "failed",
        "beat",
    )
    result = Table(
        Column("clip", overflow="fold"),
        *(Column(name, justify="right") for name in names),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=rows[0]["experiment"],
        caption=TABLE_CAPTION.format(
            unit=rows[0]["unit"], choice=outcomes.choice(_trained(rows))
        ),
    )
    none = found.get("none")
    for arm, clip in found.items():
        lr, runs = clip.tuned
        gap = "" if none is None or arm == "none" else f"{_gap(clip, none):.2f}"
        result.add_row(
            arm,
            f"{lr:g}",
            f"{outcomes.typical(runs, 'valid_loss'):.2f}",
            f"{outcomes.typical(runs, 'test_loss'):.2f}",
            gap,
            outcomes.clipped(runs),
            f"{outcomes.median('grad_norm_median')(runs):.2g}",
            _failed(clip),
            _beating(clip),
        )
    test = _baselines(rows, "test_loss")
    for name, loss in _baselines(rows, "valid_loss").items():
        result.add_row(name, "", f"{loss:.2f}", f"{test[name]:.2f}")
    return result


def verdict(rows: Rows) -> list[str]:
    """Compares every clip with none, each at its best learning rate, and the ranges."""
    found = _found(rows)
    none = found.pop("none", None)
    if none is None:
        return []
    valid = _baselines(rows, "valid_loss")
    strongest = min(valid, key=lambda name: valid[name])
    lines = []
    for arm, clip in found.items():
        effect = outcomes.effect(clip.tuned.runs, none.tuned.runs, "test_loss")
        lines += [
            f"{arm} {effect}: test loss {_at_best(clip)}; without a clip "
            f"{_at_best(none)}; the gap, seed by seed, is {_gap(clip, none):.2f} "
            f"{rows[0]['unit']}",
            f"{arm} beats {strongest} at {_beating(clip)} learning rates, and "
            f"{_failed(clip)} of its runs fail; without a clip it is "
            f"{_beating(none)} learning rates, and {_failed(none)} runs",
        ]
    return lines


def _gap(clip: Found, none: Found) -> stats.Spread:
    return outcomes.gap(clip.tuned.runs, none.tuned.runs, "test_loss")


def _at_best(found: Found) -> str:
    loss = outcomes.typical(found.tuned.runs, "test_loss")
    return f"{loss:.2f} at learning rate {outcomes.rate(found.tuned.lr, found.runs)}"


def _failed(found: Found) -> str:
    return f"{sum(run['failed'] for run in found.runs)}/{len(found.runs)}"


def _beating(found: Found) -> str:
    return f"{found.beating}/{len(outcomes.by(found.runs, 'lr'))}"


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws what happens in training, and the validation loss of all arms as a map."""
    valid = _baselines(results.rows, "valid_loss")
    unit = results.rows[0]["unit"]
    panels = [
        plots.Panel(
            "valid_loss", f"validation loss\nin {unit}", "log", list(valid.items())
        ),
        plots.Panel("grad_norm", "gradient norm, loss in nats\nbefore the clip", "log"),
        plots.Panel("clipped", "share of updates\nclipped"),
    ]
    caption = _caption(results)
    return [
        plots.training(results, directory / "curves.png", panels, caption),
        _draw_map(results, directory / "map.png", caption),
    ]


def _draw_map(results: Results, path: Path, caption: str) -> Path:
    """Draws the median validation loss of every arm.

    The colours end at the weakest baseline.
    """
    config, rows = results.about["config"], results.rows
    valid = _baselines(rows, "valid_loss")
    weakest = max(valid, key=lambda name: valid[name])
    size = 5.5 + 0.8 * len(config["lr"]), 2.0 + 0.5 * len(config["clip"])
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    loss = outcomes.median("valid_loss")
    runs = _trained(rows)
    best = min(map(loss, outcomes.by(runs, "arm", "lr").values()))
    span = {
        "cmap": "viridis_r",
        "vmin": min(best, valid[weakest]),
        "vmax": valid[weakest],
    }
    mesh = plots.arms_map(axis, runs, loss, ".3g", hatched="failed", **span)
    label = f"validation loss, median,\nin {rows[0]['unit']}"
    figure.colorbar(mesh, label=label, extend="max")
    seeds = f"{config['seeds']} seeds, {config['updates']} updates {caption}"
    hatched = (
        f"hatched: half the runs, or more, end above {weakest} ({valid[weakest]:.3g})"
    )
    return plots.save(figure, path, results, f"{seeds}\n{hatched}")


def _caption(results: Results) -> str:
    config = results.about["config"]
    name = results.about["data"].partition(",")[0]
    return (
        f"of {config['batch']} sequences of {config['length']} steps ({name}); "
        f"{config['cell']} with {config['hidden']} units, {config['initial']}, "
        f"{config['optimizer']}"
    )
