"""The window of learning rates that work, with and without a clip.

Every clip is run over a wide grid of learning rates, on the same seeds. A learning rate
*works* if the median loss at the end is lower than before training, by 80 % or more of
what the best arm of the same setting gains. The *window* of a clip is its best learning
rate and those around it that work, without a gap; its width, in decades, is

    log10(largest / smallest),

0 if a single learning rate works. It is as exact as the grid is fine: windows can be
compared if the grid is evenly spaced, as it is by default. A window that ends where the
grid ends may be wider (>=). It is wider than another for certain if the other is
narrower and ends inside the grid; else a window cut off by the grid tells nothing.

A clip limits the steps: does it only move the window, to higher learning rates, or does
the window get *wider*? And does a clip at its best learning rate end with a lower loss
than no clip at its own? These are two questions, answered side by side.

Learning rates are chosen, and results read off, on the same validation images or
characters, of which only the seeds differ: the losses are for comparing clips, not for
quoting.

A setting is what is trained, and how: digits (read row by row) or text (whose next
character is predicted); plain tanh units, an LSTM or a GRU; SGD, SGD with momentum 0.9,
or Adam. Learning rates are those of SGD. Momentum makes its steps up to 1 / (1 - 0.9)
times as long, and has a tenth of them; Adam, whose steps hardly depend on the length of
the gradient, a hundredth.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.box import SIMPLE
from rich.table import Column, Table
from rich.text import Text

from experiments import arms, models, outcomes, plots, stats, train
from experiments.config import TrainingConfig, check_counts, check_different, require
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies.study import Study
from experiments.tasks import image_rows, text

# Units in which losses are shown, and how many of them a nat is.
UNITS = {"digits": ("nats", 1.0), "text": ("bits per character", 1 / math.log(2))}
# Learning rates of an optimizer, as a share of those of SGD.
SHARES = {"sgd": 1.0, "momentum": 0.1, "adam": 0.01}
SETTINGS = tuple(map("-".join, itertools.product(UNITS, models.CELLS, SHARES)))
# A learning rate works if it gains this share of what the best arm gains.
WORKS = 0.8
# How learning rates at an end of the grid are marked in the table.
EDGES = {"": "", "smallest": "<=", "largest": ">="}
# How often a run is judged, and on how many sequences of a text.
CHECKS = 5
EXAMPLES = 64
# Losses shown, in multiples of the smallest at the end and of that before training, and
# how far apart windows are drawn below them, as a share of the height.
LOWEST, HIGHEST = 0.4, 4.0
SPACING = 0.045
# A loss that no figure shows, and where axes of losses have ticks.
FAR = 1e9
TICKS = 1, 2, 5
TABLE_CAPTION = (
    "Loss at the end on the validation split, by which learning rates are judged too "
    "(digits: nats; text: bits per character): median "
    "with its 95 % interval (the range, of fewer than 6 seeds), at the best learning "
    "rate{choice}. Clipped: share of the updates there. Window: learning rates around "
    f"the best that work, that is gain {WORKS:.0%} or more of what the best arm of the "
    "setting gains. Width: in decades; wider: than without a clip, if both windows end "
    "inside the grid. >= and <=: at an end of the grid. Diverged: runs at all learning "
    "rates that end with a larger loss than they began with."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LrWindowConfig(TrainingConfig):
    """Training over a wide grid of learning rates, setting by setting."""

    setting: tuple[str, ...]
    """What is trained, TASK-CELL-OPTIMIZER: digits or text; rnn, lstm or gru; sgd,
    momentum or adam. Learning rates are those of sgd: momentum has a tenth of them,
    adam a hundredth."""
    hidden: int = 32
    """Units of the cell."""
    length: int = 32
    """Characters in a sequence of text."""
    data: Path | None = None
    """File with a text in UTF-8. Default: the documentation of Python."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        super().__post_init__()
        check_different("setting", self.setting)
        known = "; ".join(map(", ".join, (UNITS, models.CELLS, SHARES)))
        for setting in self.setting:
            rule = f"TASK-CELL-OPTIMIZER, of {known}"
            require(setting in SETTINGS, "setting", rule, setting)
        check_counts(hidden=self.hidden, length=self.length)


class Window(NamedTuple):
    """Learning rates that work.

    Attributes:
      lrs: from the smallest to the largest.
      ends: whether it ends before the grid does; else it may be wider.
    """

    lrs: Sequence[float]
    ends: bool

    @property
    def width(self) -> float:
        """Decades, to two places as learning rates are rounded; -inf if none works."""
        if not self.lrs:
            return -math.inf
        return round(math.log10(self.lrs[-1] / self.lrs[0]), 2)

    def __str__(self) -> str:
        """Writes the width."""
        return f"{'' if self.ends else '>='}{self.width:.2f}" if self.lrs else "-"


class Found(NamedTuple):
    """What came out for a clip in a setting.

    Attributes:
      window: by the medians over seeds.
      windows: of each seed, by its own losses.
      tuned: the clip at its best learning rate.
      runs: its rows, at all learning rates.
    """

    window: Window
    windows: list[Window]
    tuned: outcomes.Tuned
    runs: Rows


def run(config: LrWindowConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Trains all arms of all settings on all seeds."""
    seeds = config.seed + np.arange(config.seeds)
    pieces = train.chunks(config.updates, CHECKS)
    kinds = len(arms.by_kind(arms.grid(config.lr, config.clip)))
    journal.expect(config.experiment, config.updates * kinds * len(config.setting))
    rows: Rows = []
    for setting in config.setting:
        name, cell, optimizer = setting.split("-")
        task = (
            image_rows.load(None)
            if name == "digits"
            else text.load(config.data, config.length, examples=EXAMPLES)
        )
        model = models.Recurrent(cell, config.hidden, task.outputs, check=config.check)
        setup = train.Setup(model, optimizer, config.batch, config.check)
        grid = arms.grid([lr * SHARES[optimizer] for lr in config.lr], config.clip)
        curves = train.compare(setup, grid, seeds, task, pieces, journal, setting)
        labels = {"task": name, "cell": cell, "optimizer": optimizer}
        rows += outcomes.rows(
            config.experiment, grid, seeds, config.updates, curves, **labels
        )
    return rows, {}


def facts(config: LrWindowConfig) -> dict[str, Any]:
    """Says what runs are trained on, and what is reached there without training."""
    data, baselines = {}, {}
    tasks = {setting.partition("-")[0] for setting in config.setting}
    if "digits" in tasks:
        data["digits"] = image_rows.about(None)
        baselines["digits"] = {"guessing": math.log(image_rows.CLASSES)}
    if "text" in tasks:
        data["text"] = text.about(config.data, config.length)
        baselines["text"] = text.baselines(
            config.data, config.length, examples=EXAMPLES
        )
    return {
        "data": data,
        "baselines": baselines,
        "initial_values": models.INITS["flax"],
    }


def limit(runs: Rows) -> float:
    """Returns the largest loss with which a learning rate works.

        start - WORKS * (start - best)

    Args:
      runs: rows of all arms of a setting.

    Returns:
      The loss, with the median over all runs before training as the start, and as the
      best the smallest of the medians over seeds at the end; -inf if nothing gains.
    """
    start = outcomes.median("start_loss")(runs)
    best = min(map(_end, outcomes.by(runs, "arm", "lr").values()))
    return start - WORKS * (start - best) if best < start else -math.inf


def window(lrs: Sequence[float], losses: Sequence[float], limit: float) -> Window:
    """Finds the learning rates around the best that work.

    Args:
      lrs: learning rates, in ascending order.
      losses: the loss of each.
      limit: the largest loss with which a learning rate works.

    Returns:
      The window.
    """
    first = last = int(np.argmin(losses))
    if losses[first] > limit:
        return Window((), ends=True)
    while first > 0 and losses[first - 1] <= limit:
        first -= 1
    while last + 1 < len(lrs) and losses[last + 1] <= limit:
        last += 1
    ends = first > 0 and last + 1 < len(lrs)
    return Window(tuple(lrs[first : last + 1]), ends)


def compared(clip: Window, none: Window) -> str:
    """Compares the windows with and without a clip; one cut off may be wider.

    Returns:
      "wider" or "narrower" if it is for certain, "equal", or "cut off".
    """
    if none.ends and clip.width > none.width:
        return "wider"
    if clip.ends and clip.width < none.width:
        return "narrower"
    return "equal" if clip.ends and none.ends else "cut off"


def table(rows: Rows) -> Table:
    """Returns one line per setting and clip."""
    names = "best lr", "loss", "clipped", "window", "width", "wider", "diverged"
    result = Table(
        Column("clip", overflow="fold"),
        *(Column(name, justify="right") for name in names),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=rows[0]["experiment"],
        caption=TABLE_CAPTION.format(choice=_choice(rows)),
    )
    for setting, clips in _by_setting(rows).items():
        result.add_section()
        result.add_row(Text(setting, style="bold"))
        for arm, found in clips.items():
            none, lr = clips.get("none"), found.tuned.lr
            result.add_row(
                arm,
                f"{EDGES[outcomes.edge(lr, found.runs)]}{lr:g}",
                f"{_loss(found.tuned.runs):.3g}",
                outcomes.clipped(found.tuned.runs),
                _rates(found.window),
                str(found.window),
                _wider(found, none) if none and arm != "none" else "",
                f"{sum(run['diverged'] for run in found.runs)}/{len(found.runs)}",
            )
    return result


def _wider(clip: Found, none: Found) -> str:
    """Writes by how much the window of a clip is wider, if the grid tells."""
    wider = clip.window.width - none.window.width
    known = clip.window.ends and none.window.ends and math.isfinite(wider)
    return f"{wider:+.2f}" if known else ""


def verdict(rows: Rows) -> list[str]:
    """Compares the windows of clips, and their best losses, with those of none."""
    return [
        f"{setting}: {line}"
        for setting, clips in _by_setting(rows).items()
        for arm, found in clips.items()
        if arm != "none" and "none" in clips
        for line in _compare(arm, found, clips["none"])
    ]


def _by_setting(rows: Rows) -> dict[str, dict[str, Found]]:
    """Returns what came out, by setting and clip."""
    return {"-".join(setting): _find(runs) for setting, runs in _settings(rows).items()}


def _settings(rows: Rows) -> dict[tuple[str, ...], Rows]:
    return outcomes.by(rows, "task", "cell", "optimizer")


def _find(runs: Rows) -> dict[str, Found]:
    """Returns what came out in a setting, by clip."""
    most = limit(runs)

    def window_of(runs: Rows) -> Window:
        ends = {lr: _end(same) for (lr,), same in outcomes.by(runs, "lr").items()}
        lrs = sorted(ends)
        return window(lrs, [ends[lr] for lr in lrs], most)

    return {
        arm: Found(
            window=window_of(same),
            windows=[window_of(seed) for seed in outcomes.by(same, "seed").values()],
            tuned=outcomes.tuned(same, _end),
            runs=same,
        )
        for (arm,), same in outcomes.by(runs, "arm").items()
    }


def _compare(arm: str, clip: Found, none: Found) -> list[str]:
    """Says how the window of a clip, and its best loss, compare with those of none."""
    pairs = list(map(compared, clip.windows, none.windows))
    wider, narrower = ([pair == way for pair in pairs] for way in ("wider", "narrower"))
    effect = outcomes.effect(clip.tuned.runs, none.tuned.runs, "final_loss")
    return [
        f"{arm} works over {_decades(clip.window)}, none over {_decades(none.window)}: "
        f"wider for {sum(wider)} of {len(pairs)} seeds, narrower for {sum(narrower)}, "
        f"cut off by the grid for {pairs.count('cut off')}, sign test "
        f"p = {stats.mcnemar(wider, narrower):.1g}{_at_most(clip, none)}",
        f"at its best learning rate {arm} {effect}: loss {_at_best(clip)}, where it "
        f"clips {outcomes.clipped(clip.tuned.runs)} of the updates; none "
        f"{_at_best(none)}; the gap, seed by seed, is {_gap(clip, none):.3g}",
    ]


def _at_best(found: Found) -> str:
    lr, runs = found.tuned
    return f"{_loss(runs):.3g} at {outcomes.rate(lr, found.runs)}"


def _gap(clip: Found, none: Found) -> stats.Spread:
    """Returns the gap at the best learning rates, in the unit shown."""
    _, per_nat = UNITS[clip.runs[0]["task"]]
    gap = outcomes.gap(clip.tuned.runs, none.tuned.runs, "final_loss")
    return stats.Spread(*(per_nat * x for x in gap))


def _at_most(clip: Found, none: Found) -> str:
    """Says what the largest learning rate of a window gives, with the clip and none."""
    if not clip.window.lrs:
        return ""
    most = clip.window.lrs[-1]
    right, without = (
        1 - outcomes.median("final_error")([run for run in runs if run["lr"] == most])
        for runs in (clip.runs, none.runs)
    )
    return f"; at {most:g}, its largest, {right:.1%} right, without it {without:.1%}"


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws the losses of all learning rates, as curves and as maps."""
    return [
        _draw_curves(results, directory / "losses.png"),
        _draw_maps(results, directory / "maps.png"),
    ]


def _draw_curves(results: Results, path: Path) -> Path:
    """Draws losses against learning rates, with the windows below."""
    figure, panels = _panels(results, width=4.4, height=3.3)
    for axis, runs in panels:
        task = runs[0]["task"]
        unit, per_nat = UNITS[task]
        names = results.about["config"]["clip"]
        losses = [
            loss
            for arm, found in _find(runs).items()
            for loss in _draw_arm(axis, found, arm, names)
        ]
        axis.axhline(per_nat * limit(runs), color="0.4", ls="--", lw=1)
        plots.baselines(axis, list(results.about["baselines"][task].items()))
        start = per_nat * outcomes.median("start_loss")(runs)
        axis.set(xscale="log", yscale="log", xlabel="learning rate", ylabel=unit)
        axis.set_ylim(LOWEST * np.min([*losses, start]), HIGHEST * start)
        axis.yaxis.set(major_locator=LogLocator(subs=TICKS), major_formatter="{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    plots.legend(figure, panels[0][0])
    note = (
        "bars: 95 % interval of the median; a learning rate works below the dashed "
        f"line,\nwith {WORKS:.0%} or more of what the best arm of the panel gains; "
        "thick lines below: the windows"
    )
    return plots.save(figure, path, results, f"{_caption(results)}\n{note}")


def _draw_arm(axis: Axes, found: Found, arm: str, names: Sequence[str]) -> list[float]:
    """Draws losses and the window of a clip, and returns the losses."""
    look = plots.style(names, arm)
    by_lr = {lr: _loss(runs) for (lr,), runs in outcomes.by(found.runs, "lr").items()}
    lrs = sorted(by_lr)
    middle, low, high = np.minimum([by_lr[lr] for lr in lrs], FAR).T
    axis.errorbar(
        lrs, middle, (middle - low, high - middle), marker=".", label=arm, **look
    )
    window = found.window.lrs
    below = [SPACING * (1 + names.index(arm))] * len(window)
    place = {"transform": axis.get_xaxis_transform(), "solid_capstyle": "round"}
    axis.plot(window, below, lw=4, color=look["color"], **place)
    return list(middle)


def _draw_maps(results: Results, path: Path) -> Path:
    """Draws the median loss of every arm."""
    config = results.about["config"]
    size = 2.8 + 0.75 * len(config["lr"]), 1.0 + 0.4 * len(config["clip"])
    figure, panels = _panels(results, *size)
    for axis, runs in panels:
        unit, per_nat = UNITS[runs[0]["task"]]
        start = per_nat * outcomes.median("start_loss")(runs)
        best = min(map(_median_loss, outcomes.by(runs, "arm", "lr").values()))
        norm = LogNorm(min(best, start / 2), start, clip=True)
        colours = {"cmap": "viridis_r", "norm": norm}
        mesh = plots.arms_map(axis, runs, _median_loss, ".3g", **colours)
        ticks = {"ticks": LogLocator(subs=TICKS), "format": "{x:g}"}
        figure.colorbar(mesh, ax=axis, label=unit, **ticks).minorticks_off()
    note = "median loss, darkest: before training; hatched: half the runs diverged"
    return plots.save(figure, path, results, f"{_caption(results)}\n{note}, or more")


def _panels(
    results: Results, width: float, height: float
) -> tuple[Figure, list[tuple[Axes, Rows]]]:
    """Makes a panel per setting: cells side by side, the rest below each other."""
    settings = _settings(results.rows)
    cells = [cell for cell in models.CELLS if any(key[1] == cell for key in settings)]
    others = list(outcomes.by(results.rows, "task", "optimizer"))
    figure = Figure(
        figsize=(2.4 + width * len(cells), 0.8 + height * len(others)),
        layout="constrained",
    )
    axes = figure.subplots(len(others), len(cells), squeeze=False)
    panels = []
    for (task, cell, optimizer), runs in settings.items():
        axis = axes[others.index((task, optimizer)), cells.index(cell)]
        axis.set_title(f"{task}, {cell}, {optimizer}", fontsize="medium")
        panels.append((axis, runs))
    for axis in axes.flat:
        axis.set_visible(any(axis is used for used, _ in panels))
    return figure, panels


def _caption(results: Results) -> str:
    config = results.about["config"]
    data = "; ".join(
        f"{task}: {about.partition(',')[0]}"
        for task, about in results.about["data"].items()
    )
    return (
        f"{config['seeds']} seeds, {config['updates']} updates of {config['batch']} "
        f"sequences, {config['hidden']} units; {data}{_scales(results.rows)}"
    )


def _scales(rows: Rows) -> str:
    """Says where learning rates are not those of the config."""
    used = dict.fromkeys(row["optimizer"] for row in rows)
    scales = [f"{SHARES[name]:g} ({name})" for name in used if SHARES[name] != 1]
    return f"\nlearning rates: those of sgd times {', '.join(scales)}" if scales else ""


def _choice(rows: Rows) -> str:
    """Says how learning rates were chosen, in every setting alike."""
    return outcomes.choice(next(iter(_settings(rows).values())))


def _end(runs: Rows) -> float:
    """Returns the median loss at the end, in nats."""
    return outcomes.median("final_loss")(runs)


def _loss(runs: Rows) -> stats.Spread:
    """Returns the median loss at the end, and its interval, in the unit shown."""
    _, per_nat = UNITS[runs[0]["task"]]
    return stats.Spread(*(per_nat * x for x in outcomes.typical(runs, "final_loss")))


def _median_loss(runs: Rows) -> float:
    return _loss(runs).median


def _decades(window: Window) -> str:
    if not window.lrs:
        return "no learning rate"
    return f"{window} decades ({_rates(window)})"


def _rates(window: Window) -> str:
    if not window.lrs:
        return "none works"
    return " to ".join(dict.fromkeys(f"{window.lrs[i]:g}" for i in (0, -1)))


def rates(steps: int, first: int, last: int) -> tuple[float, ...]:
    """Returns evenly spaced learning rates, to three digits.

    Args:
      steps: how many to a decade.
      first: k of the first.
      last: k of the last.

    Returns:
      10^(k / steps).
    """
    return tuple(float(f"{10 ** (k / steps):.3g}") for k in range(first, last + 1))


NORM = "clip_by_global_norm"
SMOKE = LrWindowConfig(
    experiment="lr_window",
    setting=("digits-rnn-sgd",),
    lr=rates(2, -4, 3),
    clip=("none", f"{NORM}:1.0", f"{NORM}:0.1"),
    seeds=8,
    updates=600,
    batch=16,
)
STANDARD = dataclasses.replace(
    SMOKE,
    setting=(
        "digits-rnn-sgd",
        "digits-lstm-sgd",
        "digits-gru-sgd",
        "digits-rnn-momentum",
        "digits-rnn-adam",
        "text-rnn-sgd",
        "text-lstm-sgd",
    ),
    lr=rates(3, -5, 7),
    updates=400,
    batch=8,
    length=24,
)
STUDY = Study(
    about="which learning rates work, with and without a clip: digits and text",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(
            STANDARD,
            setting=SETTINGS,
            lr=rates(3, -9, 8),
            clip=("none", *(f"{NORM}:{c}" for c in (3.0, 1.0, 0.3, 0.1))),
            seeds=20,
            updates=5000,
            batch=32,
            hidden=128,
            length=64,
        ),
    },
    facts=facts,
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
