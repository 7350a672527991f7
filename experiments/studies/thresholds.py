"""Thresholds: which fixed ones work, and which methods find one by themselves.

Two things are trained with plain SGD, at learning rates so high that it may need a
clip: temporal order (`torder`), where runs solve the task or do not, and piano rolls
(`music`), where they end with some loss.

First, clips by global norm at fixed thresholds over some decades. If the best one
clearly gains against none, a threshold *works* if it gains 80 % or more of what the
best one gains: in the share of runs solved, or in the median loss. As a run without a
clip may end with a loss of any size, gains are counted from where none ends or from
what is reached without training (no run solved; the weakest baseline of music),
whichever is better. The rule of thumb of Pascanu, Mikolov, Bengio (On the difficulty of
training recurrent neural networks, 2013, https://arxiv.org/abs/1211.5063) allows
thresholds from half to ten times the mean norm of the gradients; here that is the mean
over the first updates of the runs without a clip, in the median over seeds.

Second, all other methods as they come: with the defaults of the library, or, where it
has none, with the number most people use, and nothing tuned. The best fixed threshold,
which they are compared with, is chosen on the first seeds and read off the others: on
those they are compared. One learning rate and two tasks say little about others.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.box import SIMPLE
from rich.table import Column, Table
from rich.text import Text

from experiments import arms, clips, models, outcomes, plots, stats, train
from experiments.config import (
    TrainingConfig,
    check_counts,
    check_different,
    check_lrs,
    require,
)
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies import solving
from experiments.studies.study import Study
from experiments.tasks import piano_rolls, sequences

NORM = "clip_by_global_norm"
# The rule allows thresholds from so many to so many times the mean norm.
RULE = 0.5, 10.0
# A threshold works if it gains this share of what the best one gains.
WORKS = 0.8
# Losses above this many times what is reached without training are drawn there.
FAR = 10.0
# Thresholds of the methods that have no default: of AGC, https://arxiv.org/abs/2102.06171,
# in the middle of the rule (mean_clip), twice the running mean, and 1.
COMMON = {
    "adaptive_grad_clip": 0.01,
    "mean_clip": 2.0,
    "ema_clip": 2.0,
    "clip": 1.0,
    "clip_by_block_rms": 1.0,
    NORM: 1.0,
    "clip_by_leaf_norm": 1.0,
    "clip_by_unit_norm": 1.0,
}
METHODS = tuple(
    f"{name}:{COMMON[name]:g}" if name in COMMON else name for name in clips.FACTORIES
)
# Colours by what a clip is.
FIXED, OTHER, LEARNS = "fixed norm", "no memory", "learns"
COLOURS = {
    "none": "black",
    FIXED: "tab:blue",
    OTHER: "tab:green",
    LEARNS: "tab:orange",
}
TABLE_CAPTION = (
    f"Solved: fewer than {solving.SOLVED:.0%} of {solving.FRESH:,} fresh sequences "
    "wrong at some check, with Wilson's 95 % interval; after: updates until solved, "
    "median of the runs that did. Loss: at the end, in nats; of music, on the "
    "validation split, in nats per step: median with its 95 % interval (the range, of "
    "fewer than 6 seeds). Clipped: share of the updates; cosine: of the angle by which "
    "the clip turns a gradient, mean. Each at its best learning rate{choice}."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdsConfig(TrainingConfig):
    """Training with fixed thresholds, and with other methods as they come.

    What is not of music by its name is of temporal order. A clip that is also none or
    one of the thresholds is run once.
    """

    task: tuple[str, ...]
    """What is trained: torder, music, or both."""
    threshold: tuple[float, ...]
    """Fixed thresholds of the global norm; each is run beside none and the clips."""
    length: int
    """Length of the sequences of temporal order."""
    music_lr: tuple[float, ...]
    """Learning rates on music."""
    music_length: int
    """Steps of a window of music."""
    music_updates: int
    """Updates of each run on music."""
    hidden: int = 50
    """Units of the networks."""
    checks: int = 10
    """How often a run is judged; the first piece is where the mean norm is from."""
    data: Path | None = None
    """Piano rolls, a file as in the experiment music. Default: generated ones."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        super().__post_init__()
        check_different("task", self.task)
        for task in self.task:
            require(task in MEASURES, "task", f"of {', '.join(MEASURES)}", task)
        check_different("threshold", self.threshold)
        for threshold in self.threshold:
            require(0 < threshold < np.inf, "threshold", "finite and > 0", threshold)
        check_lrs(self.music_lr)
        sequences.check_length("torder", self.length)
        check_counts(
            music_length=self.music_length,
            music_updates=self.music_updates,
            hidden=self.hidden,
            checks=self.checks,
        )


class Trial(NamedTuple):
    """What is trained.

    Attributes:
      task: where batches and the examples for judging come from.
      initial: how the network starts.
      lr: learning rates.
      updates: of each run.
      baseline: what is reached without training, as the cost in `Measure`.
    """

    task: Any
    initial: str
    lr: tuple[float, ...]
    updates: int
    baseline: float


class Measure(NamedTuple):
    """How the runs of a task are compared.

    Attributes:
      label: says what is shown.
      cost: what should be small, of the rows of an arm.
      shown: the quantity shown, with an interval.
      text: says it in words.
      effect: compares two clips by their rows of the same seeds, as a verb.
    """

    label: str
    cost: Callable[[Rows], float]
    shown: Callable[[Rows], stats.Spread]
    text: Callable[[Rows], str]
    effect: Callable[[Rows, Rows], str]


class Rule(NamedTuple):
    """What the rule of thumb says of the thresholds at a learning rate.

    Attributes:
      norm: the mean norm.
      thresholds: all that were run.
      allowed: those which the rule allows.
      effect: what the best one does against none, as a verb.
      works: those which work.
    """

    norm: float
    thresholds: list[float]
    allowed: list[float]
    effect: str
    works: list[float]


def _share_unsolved(runs: Rows) -> float:
    return 1 - float(np.mean([row["solved"] for row in runs]))


def _share_solved(runs: Rows) -> stats.Spread:
    successes = sum(row["solved"] for row in runs)
    interval = stats.wilson(successes, len(runs))
    return stats.Spread(successes / len(runs), *interval)


MEASURES = {
    "torder": Measure(
        label="share of runs solved",
        cost=_share_unsolved,
        shown=_share_solved,
        text=lambda runs: f"solves {solving.rate(runs, 'solved')}",
        effect=lambda clip, other: solving.effect(clip, other)[0],
    ),
    "music": Measure(
        label="validation loss in nats per step",
        cost=outcomes.median("test_loss"),
        shown=lambda runs: outcomes.typical(runs, "test_loss"),
        text=lambda runs: f"ends at {outcomes.typical(runs, 'test_loss'):.3g}",
        effect=lambda clip, other: outcomes.effect(clip, other, "test_loss"),
    ),
}


def run(config: ThresholdsConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Trains all arms on all seeds, task after task."""
    trials = {task: _trial(config, task) for task in config.task}
    kinds = len(arms.by_kind(arms.grid((1.0,), specs(config))))
    updates = kinds * sum(trial.updates for trial in trials.values())
    journal.expect(config.experiment, updates)
    rows: Rows = []
    for name, trial in trials.items():
        rows += _train(config, name, trial, journal)
    return rows, {}


def _train(config: ThresholdsConfig, name: str, trial: Trial, journal: Journal) -> Rows:
    """Trains all arms of a task."""
    model = models.Recurrent(
        "rnn", config.hidden, trial.task.outputs, trial.initial, config.check
    )
    setup = train.Setup(model, "sgd", config.batch, config.check)
    grid = arms.grid(trial.lr, specs(config))
    seeds = config.seed + np.arange(config.seeds)
    pieces = train.chunks(trial.updates, config.checks)
    curves = train.compare(setup, grid, seeds, trial.task, pieces, journal, name)
    found = outcomes.rows(
        config.experiment, grid, seeds, trial.updates, curves, task=name
    )
    found = solving.with_solutions(found, curves["test_error"], pieces)
    early = curves["grad_norm"][:, :, 0]
    return [
        {
            **row,
            **kind(grid[i].clip),
            "baseline": trial.baseline,
            "early_norm": float(early[i, j]),
            "early_updates": pieces[0],
        }
        for row, (i, j) in zip(found, np.ndindex(early.shape), strict=True)
    ]


def kind(clip: clips.Clip) -> dict[str, Any]:
    """Says what a clip is: a key of `COLOURS`, and its threshold if that is fixed."""
    module = clips.FACTORIES[clip.name].__module__
    if clip.spec == "none":
        return {"kind": "none", "threshold": np.nan}
    if clip.kind == clips.parse("none").kind:
        return {"kind": FIXED, "threshold": clip.threshold}
    without = module == "optaxclip.recipes"
    return {"kind": OTHER if without else LEARNS, "threshold": np.nan}


def specs(config: ThresholdsConfig) -> list[str]:
    """Returns all clips: none, the fixed thresholds, and the methods, each once."""
    fixed = (f"{NORM}:{threshold:g}" for threshold in config.threshold)
    found: dict[tuple[Any, ...], str] = {}
    for clip in map(clips.parse, ("none", *fixed, *config.clip)):
        found.setdefault((clip.kind, clip.threshold), clip.spec)
    return list(found.values())


def _trial(config: ThresholdsConfig, name: str) -> Trial:
    if name == "torder":
        task = sequences.make("torder", config.length, solving.FRESH)
        return Trial(task, "basic_tanh", config.lr, config.updates, baseline=1.0)
    rolls = piano_rolls.load(config.data, config.music_length)
    weakest = max(piano_rolls.baselines(config.data).values())
    return Trial(rolls, "flax", config.music_lr, config.music_updates, weakest)


def table(rows: Rows) -> Table:
    """Returns one line per clip, the best of each task first."""
    names = "lr", "solved", "after", "loss", "clipped", "cosine"
    tasks = _by_task(rows)
    # It is empty for a task with one learning rate.
    choice = max(outcomes.choice(runs) for _, runs in tasks)
    result = Table(
        Column("clip", overflow="fold"),
        *(Column(name, justify="right", no_wrap=True) for name in names),
        Column("kind", no_wrap=True),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=rows[0]["experiment"],
        caption=TABLE_CAPTION.format(choice=choice),
    )
    for task, runs in tasks:
        result.add_section()
        result.add_row(Text(task, style="bold"))
        for arm, found in ranked(runs).items():
            result.add_row(
                arm,
                f"{found.lr:g}",
                *(
                    (solving.rate(found.runs, "solved"), solving.when(found.runs))
                    if task == "torder"
                    else ("", "")
                ),
                f"{outcomes.typical(found.runs, 'test_loss'):.3g}",
                f"{np.mean([run['clipped'] for run in found.runs]):.0%}",
                f"{np.mean([run['cosine'] for run in found.runs]):.2f}",
                found.runs[0]["kind"],
            )
    return result


def _by_task(rows: Rows) -> list[tuple[str, Rows]]:
    return [(task, runs) for (task,), runs in outcomes.by(rows, "task").items()]


def ranked(runs: Rows) -> dict[str, outcomes.Tuned]:
    """Returns each clip at its best learning rate, the best first, by its name.

    Among clips that solve equally many runs, the first is the one that does so first.

    Args:
      runs: rows of one task.
    """
    cost = MEASURES[runs[0]["task"]].cost
    found = {
        arm: outcomes.tuned(same, cost)
        for (arm,), same in outcomes.by(runs, "arm").items()
    }

    def place(arm: str) -> tuple[float, float]:
        reported = found[arm].runs
        return cost(reported), outcomes.median("solved_at")(reported)

    return {arm: found[arm] for arm in sorted(found, key=place)}


def best_fixed(runs: Rows) -> outcomes.Tuned:
    """Returns the best fixed threshold, at the best learning rate.

    Args:
      runs: rows of one task.
    """
    fixed = [row for row in runs if row["kind"] == FIXED]
    return outcomes.tuned(fixed, MEASURES[runs[0]["task"]].cost, ("arm", "lr"))


def rule(runs: Rows) -> Rule:
    """Returns what the rule of thumb allows, and what works.

    Args:
      runs: rows of one task at one learning rate, those of none among them.
    """
    cost = MEASURES[runs[0]["task"]].cost
    none = [row for row in runs if row["kind"] == "none"]
    norm = outcomes.median("early_norm")(none)
    fixed = outcomes.by([row for row in runs if row["kind"] == FIXED], "threshold")
    costs = {threshold: cost(same) for (threshold,), same in fixed.items()}
    against_none = effect(best_fixed(runs).runs, none)
    reference, best = min(cost(none), runs[0]["baseline"]), min(costs.values())
    most = reference - WORKS * (reference - best)
    gains = against_none == "gains" and best < reference
    least, largest = (share * norm for share in RULE)
    return Rule(
        norm=norm,
        thresholds=[*costs],
        allowed=[x for x in costs if least <= x <= largest],
        effect=against_none,
        works=[x for x in costs if gains and costs[x] <= most],
    )


def effect(clip: Rows, other: Rows) -> str:
    """Compares two clips on the seeds that both have, as a verb."""
    seeds = {row["seed"] for row in clip} & {row["seed"] for row in other}
    same = ([row for row in runs if row["seed"] in seeds] for runs in (clip, other))
    return MEASURES[clip[0]["task"]].effect(*same)


def verdict(rows: Rows) -> list[str]:
    """Says what fixed thresholds, the rule and the other methods are worth."""
    lines = []
    for task, runs in _by_task(rows):
        none = ranked(runs)["none"]
        best = best_fixed(runs)
        text = MEASURES[task].text
        lines.append(
            f"{task}: the best fixed threshold, {best.runs[0]['arm']} at learning rate "
            f"{best.lr:g}, {text(best.runs)}; none, at {none.lr:g}, {text(none.runs)}"
        )
        lines += [
            f"{task}: {_say(lr, rule(same), runs[0]['early_updates'])}"
            for (lr,), same in outcomes.by(runs, "lr").items()
        ]
        lines += [f"{task}: {line}" for line in _methods(runs, none, best)]
    return lines


def _say(lr: float, rule: Rule, updates: int) -> str:
    """Says what the rule allows at a learning rate, and what works there."""
    least, largest = (share * rule.norm for share in RULE)
    both = sum(threshold in rule.works for threshold in rule.allowed)
    allows = (
        f"at learning rate {lr:g} the mean norm of the first {updates} updates without "
        f"a clip is {rule.norm:.2g}, and the rule of {RULE[0]:g} to {RULE[1]:g} times "
        f"that allows {least:.2g} to {largest:.2g}"
    )
    if rule.effect != "gains":
        return f"{allows}, but no threshold gains: against none the best {rule.effect}"
    if not rule.works:
        return (
            f"{allows}, but no threshold works: the best gains against none, and is no "
            "better than what is reached without training"
        )
    return (
        f"{allows}: {both} of the {len(rule.allowed)} thresholds tried there work, and "
        f"{len(rule.works)} of all {len(rule.thresholds)}"
    )


def _methods(runs: Rows, none: outcomes.Tuned, best: outcomes.Tuned) -> list[str]:
    """Says how the other methods compare with none, and with the best threshold."""
    others = {
        arm: found.runs
        for arm, found in ranked(runs).items()
        if found.runs[0]["kind"] in (OTHER, LEARNS)
    }
    lines = []
    for name, other in {"none": none, "the best fixed threshold": best}.items():
        by_effect: dict[str, list[str]] = {}
        for arm, same in others.items():
            by_effect.setdefault(effect(same, other.runs), []).append(arm)
        lines += [
            f"against {name}, as it comes, {verb}: {', '.join(found)} "
            f"({len(found)} of {len(others)} other methods)"
            for verb, found in by_effect.items()
        ]
    return lines


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws fixed thresholds, and how all clips compare."""
    return [
        _draw_thresholds(results, directory / "thresholds.png"),
        _draw_methods(results, directory / "methods.png"),
    ]


def _draw_thresholds(results: Results, path: Path) -> Path:
    """Draws what fixed thresholds give: a row per task, a column per learning rate."""
    tasks = _by_task(results.rows)
    columns = max(len(outcomes.by(runs, "lr")) for _, runs in tasks)
    figure = Figure(
        figsize=(3.0 + 4.4 * columns, 0.9 + 3.2 * len(tasks)), layout="constrained"
    )
    axes = figure.subplots(len(tasks), columns, squeeze=False)
    for line, (task, runs) in zip(axes, tasks, strict=True):
        for axis in line:
            axis.set_visible(False)
        for axis, ((lr,), same) in zip(line, outcomes.by(runs, "lr").items()):
            axis.set_visible(True)
            _draw_sweep(axis, same)
            plots.baselines(axis, _baselines(results, task))
            axis.set_title(f"{task}, learning rate {lr:g}", fontsize="medium")
        line[0].set_ylabel(MEASURES[task].label)
    plots.legend(figure, axes[0, 0])
    note = "bars and band: 95 % intervals"
    return plots.save(figure, path, results, f"{_caption(results)}\n{note}")


def _draw_sweep(axis: Axes, runs: Rows) -> None:
    """Draws fixed thresholds at one learning rate, none, and what the rule allows."""
    measure = MEASURES[runs[0]["task"]]
    fixed = outcomes.by([row for row in runs if row["kind"] == FIXED], "threshold")
    thresholds = [threshold for (threshold,) in fixed]
    found = np.array([measure.shown(same) for same in fixed.values()])
    none = measure.shown([row for row in runs if row["kind"] == "none"])
    norm = rule(runs).norm
    least, largest = (share * norm for share in RULE)
    look = {"color": COLOURS[FIXED], "marker": "o", "capsize": 4, "label": FIXED}
    axis.errorbar(thresholds, found[:, 0], _reach(found), **look)
    axis.axhline(none.median, color=COLOURS["none"], label="none")
    axis.axhspan(none.low, none.high, color=COLOURS["none"], alpha=0.12, lw=0)
    axis.axvline(norm, color="tab:purple", ls=":", label="mean norm, early")
    rule_of = f"{RULE[0]:g} to {RULE[1]:g} times that"
    axis.axvspan(least, largest, color="tab:purple", alpha=0.12, lw=0, label=rule_of)
    axis.set(xscale="log", xlabel="threshold of the global norm")
    axis.set_xlim(min(thresholds) / 1.5, max(thresholds) * 1.5)
    _scale(axis, "y", runs[0]["task"])


def _draw_methods(results: Results, path: Path) -> Path:
    """Draws all clips, the best on top: a column per task."""
    tasks = _by_task(results.rows)
    count = len(outcomes.by(results.rows, "arm"))
    figure = Figure(
        figsize=(2.8 + 5.2 * len(tasks), 1.6 + 0.21 * count), layout="constrained"
    )
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, (task, runs) in zip(axes, tasks, strict=True):
        measure, ranks = MEASURES[task], ranked(runs)
        shown = np.array([measure.shown(found.runs) for found in ranks.values()])
        shown = np.minimum(shown, FAR * runs[0]["baseline"])
        kinds = [found.runs[0]["kind"] for found in ranks.values()]
        for name, colour in COLOURS.items():
            places = [i for i, kind in enumerate(kinds) if kind == name]
            look = {"color": colour, "fmt": "o", "ms": 4, "label": name}
            values = shown[places]
            axis.errorbar(values[:, 0], places, xerr=_reach(values), **look)
        best = measure.shown(best_fixed(runs).runs).median
        line = {"color": COLOURS[FIXED], "ls": "--", "lw": 1}
        axis.axvline(best, label="best fixed norm,\nfresh seeds", **line)
        for name, loss in _baselines(results, task):
            axis.axvline(loss, color="0.4", ls=":", lw=1)
            place = {"rotation": 90, "ha": "right", "fontsize": "x-small"}
            axis.text(loss, count - 0.7, name, color="0.3", **place)
        axis.set_yticks(range(count), list(ranks), fontsize="small")
        axis.set_ylim(count - 0.5, -0.5)
        axis.set_xlabel(measure.label)
        axis.set_title(f"{task}, learning rate {_rates(runs)}", fontsize="medium")
        axis.grid(axis="y", alpha=0.3)
        _scale(axis, "x", task)
    plots.legend(figure, axes[0])
    note = (
        "bars: 95 % intervals (of medians of fewer than 6 runs: ranges); at the edge: "
        f"more than {FAR:g} times what is reached without training"
    )
    return plots.save(figure, path, results, f"{_caption(results)}\n{note}")


def _baselines(results: Results, task: str) -> list[tuple[str, float]]:
    """Returns what is reached without training."""
    return [*results.about["baselines"].items()] if task == "music" else []


def _reach(shown: np.ndarray) -> np.ndarray:
    """Returns how far intervals reach, down and up, from rows (middle, low, high)."""
    return np.abs(shown[:, 1:] - shown[:, :1]).T


def _scale(axis: Axes, along: str, task: str) -> None:
    """Shows shares from 0 to 1, and losses by their logarithm."""
    if task == "torder":
        axis.set(**{f"{along}lim": (-0.03, 1.03)})
        return
    axis.set(**{f"{along}scale": "log"})
    ticks = axis.yaxis if along == "y" else axis.xaxis
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


def _rates(runs: Rows) -> str:
    return ", ".join(f"{lr:g}" for (lr,) in outcomes.by(runs, "lr"))


def _caption(results: Results) -> str:
    config = results.about["config"]
    parts = {
        "torder": f"torder: length {config['length']}, {config['updates']} updates",
        "music": f"music: {config['music_length']} steps, {config['music_updates']} "
        "updates",
    }
    return (
        f"plain RNN with {config['hidden']} units, SGD, {config['seeds']} seeds, "
        f"batches of {config['batch']}\n"
        f"{'; '.join(parts[task] for task in config['task'])}"
    )


def facts(config: ThresholdsConfig) -> dict[str, Any]:
    """Says what networks are trained on, and how they start."""
    found: dict[str, Any] = {"data": {}, "initial_values": {}}
    if "torder" in config.task:
        found["data"]["torder"] = "generated while training, as in tasks/sequences.py"
        found["initial_values"]["torder"] = models.INITS["basic_tanh"]
    if "music" in config.task:
        found["data"]["music"] = piano_rolls.about(config.data)
        found["initial_values"]["music"] = models.INITS["flax"]
        found["baselines"] = piano_rolls.baselines(config.data)
    return found


SMOKE = ThresholdsConfig(
    experiment="thresholds",
    task=("torder",),
    threshold=(0.1, 1.0, 10.0),
    clip=("autoclip",),
    lr=(0.1,),
    music_lr=(1.0,),
    seeds=10,
    updates=600,
    music_updates=150,
    batch=20,
    length=20,
    music_length=25,
)
STANDARD = dataclasses.replace(
    SMOKE,
    threshold=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    clip=METHODS,
    updates=1200,
    music_updates=120,
)
STUDY = Study(
    about="fixed thresholds, a rule of thumb for them, and all methods as they come",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(
            STANDARD,
            task=("torder", "music"),
            lr=(0.03, 0.1, 0.3),
            music_lr=(0.3, 1.0, 3.0),
            seeds=50,
            updates=10_000,
            music_updates=2000,
            length=30,
            music_length=100,
        ),
    },
    facts=facts,
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
