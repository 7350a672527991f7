"""Direction: how far clips turn a gradient, and whether that decides what is learned.

A clip by global norm makes a gradient shorter. A clip of every element, or of every
array by its own norm, also turns it: what is large is cut more. The cosine of that
angle is measured in two places:

* on the cliff of one recurrent unit, where the gradient has two numbers (each an array
  of its own, so a clip by leaf norm is one of the elements there);
* in the training of a plain recurrent network on temporal order, where it has
  thousands.

A cosine is measured wherever a clip makes anything smaller; runs without a clip have
none. Beside it stands how long the longest step is that the clip leaves: a clip of n
elements at c allows a norm of up to sqrt(n) c. (Pascanu, Mikolov, Bengio, On the
difficulty of training recurrent neural networks, 2013,
https://arxiv.org/abs/1211.5063, clip the norm; Mikolov, Statistical language models
based on neural networks, 2012, the elements.)
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

from experiments import arms, clips, models, outcomes, plots, stats, train
from experiments.config import TrainingConfig, check_counts, check_lrs, require
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies import cliff, solving
from experiments.studies.study import Study
from experiments.tasks import sequences

TASK, INITIAL = "torder", "basic_tanh"
# Steps of the recurrence of the unit on the cliff.
CLIFF_LENGTH = 50
# Cosines are summed up by these quantiles.
QUANTILES = {"cosine_low": 0.05, "cosine": 0.5, "cosine_high": 0.95}
BINS = np.linspace(0, 1, 51)
# A cosine this near to 1 is 1, but for rounding.
ROUNDING = 1e-5
PLACES = {"cliff": "the cliff", "training": "temporal order"}
# Degrees between points that would lie on each other.
APART = 0.3
# Two clips differ in success if their runs, with the same seeds, part in the test of
# McNemar; on the cliff, whose starts are a grid, if their shares are this far apart.
LEVEL, MARGIN = 0.05, 0.05
TESTS = {
    "cliff": f"by {MARGIN:.0%} of the starts or more",
    "training": f"by McNemar's test, p < {LEVEL:g} for each pair",
}
TABLE_CAPTION = (
    "Clipped: share of the updates. Cosine of the angle by which the clip turned the "
    "gradient, over clipped updates: median, and between what 5 and 95 % are not "
    "larger. Longest: norm of a gradient after the clip. In training these are medians "
    "over runs. Success: starts on the cliff that reach the target; runs of temporal "
    f"order that at some check answer fewer than {solving.SOLVED:.0%} of "
    f"{solving.FRESH:,} fresh sequences wrongly, with Wilson's 95 % interval."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionConfig(TrainingConfig):
    """Cosines of gradients before and after clips, on the cliff and in training."""

    length: int = 30
    """Length of the sequences."""
    hidden: int = 50
    """Units of the network."""
    checks: int = 30
    """How often a run is judged."""
    cliff_lr: float = 0.1
    """Learning rate on the cliff."""
    starts: int = 24
    """Starts per side of the square grid on the cliff."""
    cliff_updates: int = 1000
    """Updates from each start."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        super().__post_init__()
        sequences.check_length(TASK, self.length)
        require(self.clip != ("none",), "clip", "more than none", self.clip)
        check_lrs((self.cliff_lr,))
        require(self.starts >= 2, "starts", ">= 2", self.starts)
        check_counts(
            hidden=self.hidden, checks=self.checks, cliff_updates=self.cliff_updates
        )


def run(config: DirectionConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Descends the cliff with every clip, then trains with every arm."""
    slope = arms.grid((config.cliff_lr,), config.clip)
    grid = arms.grid(config.lr, config.clip)
    kinds = len(arms.by_kind(slope))
    journal.expect("direction", kinds * (config.cliff_updates + config.updates))
    found = {
        "cliff": _descend(config, slope, journal),
        "training": _train(config, grid, journal),
    }
    rows = [row for each, _ in found.values() for row in each]
    curves = {
        f"{place} shares": np.stack([shares_of(arm) for arm in cosines])
        for place, (_, cosines) in found.items()
    }
    return rows, {**curves, "bins": BINS}


def _descend(
    config: DirectionConfig, grid: Sequence[arms.Arm], journal: Journal
) -> tuple[Rows, np.ndarray]:
    """Returns a row per clip, and cosines of shape (arms, starts, updates)."""
    square = cliff.plane(cliff.STARTS_W, cliff.STARTS_B, config.starts)
    starts = jax.tree.map(lambda x: jnp.asarray(x.ravel()), square)

    def run_kind(clip: clips.Clip, knobs: arms.Knobs) -> arms.Curves:
        found = cliff.descend(
            clip,
            CLIFF_LENGTH,
            knobs,
            starts,
            config.cliff_updates,
            _turns,
            journal,
            "cliff",
        )
        seconds = found["seconds"].sum() / len(knobs.lr)
        return {**found, "seconds": np.full(len(knobs.lr), seconds)}

    found = arms.run(grid, run_kind)
    rows = []
    for i, arm in enumerate(grid):
        shares = cliff.metrics(**{name: found[name][i] for name in cliff.OUTCOME})
        rows.append(
            {
                "experiment": "direction",
                "place": "cliff",
                "arm": arm.clip.spec,
                "lr": arm.lr,
                "updates": config.cliff_updates,
                "runs": starts.w.size,
                **turned(found["cosine"][i], found["kept_norm"][i]),
                "success": shares["reached"],
                "seconds": float(found["seconds"][i]),
            }
        )
    return rows, found["cosine"]


def _turns(move: cliff.Move) -> dict[str, jax.Array]:
    """Keeps the cosines of clipped updates, NaN where a gradient was not."""
    cosine = jnp.where(move.clipped, move.cosine, jnp.nan)
    return {"cosine": cosine, "kept_norm": move.kept_norm}


def _train(
    config: DirectionConfig, grid: Sequence[arms.Arm], journal: Journal
) -> tuple[Rows, np.ndarray]:
    """Returns a row per run, and cosines of shape (arms, seeds, updates)."""
    task = sequences.make(TASK, config.length, solving.FRESH)
    model = models.Recurrent("rnn", config.hidden, task.outputs, INITIAL, config.check)
    setup = train.Setup(model, "sgd", config.batch, config.check, log="updates")
    seeds = config.seed + np.arange(config.seeds)
    pieces = train.chunks(config.updates, config.checks)
    found = train.compare(setup, grid, seeds, task, pieces, journal, part="training")
    cosine = np.where(found["clipped"], found["cosine"], np.nan)
    solved = np.any(found["test_error"] < solving.SOLVED, axis=-1)
    rows = [
        {
            "experiment": "direction",
            "place": "training",
            "arm": arm.clip.spec,
            "lr": arm.lr,
            "seed": int(seed),
            "updates": config.updates,
            "runs": 1,
            **turned(cosine[i, j], found["kept_norm"][i, j]),
            "success": float(solved[i, j]),
            "test_error": float(found["test_error"][i, j, -1]),
            "seconds": float(found["seconds"][i] / len(seeds)),
        }
        for i, arm in enumerate(grid)
        for j, seed in enumerate(seeds)
    ]
    return rows, cosine


def turned(cosine: np.ndarray, kept_norm: np.ndarray) -> dict[str, float]:
    """Sums up how far gradients were turned, and how long they still are.

    Args:
      cosine: of the angles; NaN where nothing was clipped.
      kept_norm: norms after the clip, of the same shape; NaN counts as infinite.
    """
    known = cosine[np.isfinite(cosine)]
    levels = [0.0, *QUANTILES.values()]
    found = np.quantile(known, levels) if known.size else np.full(len(levels), np.nan)
    return {
        "clipped": known.size / cosine.size,
        **dict(zip(("cosine_min", *QUANTILES), map(float, found), strict=True)),
        "longest": stats.spread(kept_norm).high,
    }


def shares_of(cosine: np.ndarray) -> np.ndarray:
    """Returns the share of the cosines in each of the bins; NaN if there are none."""
    known = cosine[np.isfinite(cosine)]
    counts, _ = np.histogram(np.clip(known, 0, 1), BINS)
    return counts / known.size if known.size else np.full(len(counts), math.nan)


def _arms(rows: Rows) -> Rows:
    """Returns a row per place, learning rate and clip: medians over runs."""
    names = *QUANTILES, "longest", "clipped"
    return [
        {
            "place": place,
            "lr": lr,
            "arm": arm,
            "runs": sum(run["runs"] for run in runs),
            **{name: _median(runs, name) for name in names},
            "cosine_min": min((run["cosine_min"] for run in runs), key=_nan_last),
            "success": float(np.mean([run["success"] for run in runs])),
            "successes": [run["success"] == 1 for run in runs],
        }
        for (place, lr, arm), runs in outcomes.by(rows, "place", "lr", "arm").items()
    ]


def _median(runs: Rows, name: str) -> float:
    """Returns the median of the numbers that are known, NaN if there are none."""
    known = [run[name] for run in runs if not math.isnan(run[name])]
    return float(np.median(known)) if known else math.nan


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def table(rows: Rows) -> Table:
    """Returns one line per place, learning rate and clip."""
    result = Table(
        "where",
        Column("lr", justify="right"),
        Column("clip", overflow="fold"),
        *(
            Column(name, justify="right")
            for name in ("clipped", "cosine", "5 to 95 %", "longest", "success")
        ),
        box=SIMPLE,
        title="direction",
        caption=TABLE_CAPTION,
    )
    for _, same in outcomes.by(_arms(rows), "place").items():
        for arm in same:
            result.add_row(
                arm["place"],
                f"{arm['lr']:g}",
                arm["arm"],
                f"{arm['clipped']:.1%}",
                _cosine(arm["cosine"]),
                f"{_cosine(arm['cosine_low'])} {_cosine(arm['cosine_high'])}",
                f"{arm['longest']:.2g}",
                _success(arm),
                end_section=arm is same[-1],
            )
    return result


def _cosine(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _success(arm: dict[str, Any]) -> str:
    if arm["place"] == "cliff":
        return f"{arm['success']:.1%}"
    successes = sum(arm["successes"])
    low, high = stats.wilson(successes, arm["runs"])
    return f"{successes}/{arm['runs']} [{low:.2f}, {high:.2f}]"


def verdict(rows: Rows) -> list[str]:
    """Says how far clips turn, and whether success goes with cosine or with length."""
    found = _arms(rows)
    lines = _by_global_norm(found)
    for (place, lr), same in outcomes.by(found, "place", "lr").items():
        said = [*_at_one_threshold(same), *_elementwise(same), *_pairs(same)]
        lines += [f"{PLACES[place]}, lr {lr:g}: {line}" for line in said]
    return lines


def _by_global_norm(found: Rows) -> list[str]:
    """Says how far clips by global norm turn a gradient: they should not."""
    cosines = [
        arm["cosine_min"]
        for arm in found
        if _kind(arm) == "clip_by_global_norm" and not math.isnan(arm["cosine_min"])
    ]
    if not cosines:
        return []
    how = "turn nothing but by rounding" if min(cosines) > 1 - ROUNDING else "TURN"
    return [
        f"clips by global norm {how}: their smallest cosine differs from 1 by "
        f"{abs(1 - min(cosines)):.0e}"
    ]


def _at_one_threshold(found: Rows) -> list[str]:
    """Sets clips of the elements beside those of the norm with the same threshold."""
    by_arm = {arm["arm"]: arm for arm in found}
    return [
        f"threshold {threshold:g}: success with the elements cut "
        f"{_said(by_arm[element])}, with the norm cut {_said(by_arm[norm])}"
        for threshold, (element, norm) in cliff.pairs(found).items()
    ]


def _elementwise(found: Rows) -> list[str]:
    """Sets the elementwise clip of most success beside that of least."""
    several = [arm for arm in found if _kind(arm) == "clip"]
    if len(several) < 2:
        return []
    most = max(several, key=lambda arm: arm["success"])
    least = min(several, key=lambda arm: arm["success"])
    if most["success"] == least["success"]:
        return [f"all elementwise clips have the same success, {_success(most)}"]
    return [
        f"of the elementwise clips the most successful is {most['arm']}, "
        f"{_said(most)}, the least {least['arm']}, {_said(least)}"
    ]


def _said(arm: dict[str, Any]) -> str:
    cosine, longest = _cosine(arm["cosine"]), f"{arm['longest']:.2g}"
    return f"{_success(arm)} (median cosine {cosine}, longest {longest})"


def _pairs(found: Rows) -> list[str]:
    """Counts pairs of clips of which that with the larger cosine, or step, is ahead.

    Pairs within a kind of clip are counted apart: kinds differ in more than these.
    """
    if len(found) < 2:
        return []
    test = TESTS[found[0]["place"]]
    pairs = [pair for pair in itertools.combinations(found, 2) if _differ(*pair)]
    if not pairs:
        return [f"no two of {len(found)} clips differ in success ({test})"]
    within, between = (
        [pair for pair in pairs if (_kind(pair[0]) == _kind(pair[1])) is one_kind]
        for one_kind in (True, False)
    )
    lines = []
    for what, value in (
        ("larger median cosine", lambda arm: _rounded(_turn(arm))),
        ("shorter longest step", lambda arm: -_rounded(arm["longest"])),
    ):
        inner, outer = agreement(within, value), agreement(between, value)
        lines.append(
            "at this one learning rate, of pairs of clips that differ in success "
            f"({test}), the one with the {what} has the greater success in "
            f"{inner[0]} of {inner[1]} within a kind of clip, and in {outer[0]} of "
            f"{outer[1]} between kinds; clips are in several pairs, so this is no test"
        )
    return lines


def _differ(arm: dict[str, Any], other: dict[str, Any]) -> bool:
    """Says whether two clips differ in success, by what is in `TESTS`."""
    if arm["place"] == "cliff":
        return abs(arm["success"] - other["success"]) >= MARGIN
    return stats.mcnemar(arm["successes"], other["successes"]) < LEVEL


def _turn(arm: dict[str, Any]) -> float:
    """Returns the median cosine, 1 where nothing was clipped: nothing was turned."""
    return 1.0 if math.isnan(arm["cosine"]) else arm["cosine"]


def _rounded(value: float) -> float:
    """Returns three digits: what differs by rounding only does not differ."""
    return float(f"{value:.3g}")


def agreement(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    value: Callable[[dict[str, Any]], float],
) -> tuple[int, int]:
    """Counts pairs of arms which a quantity orders as their success does.

    Returns:
      Their number, and that of all pairs in which the quantity differs. (The first is
      that of the concordant pairs of Kendall, A new measure of rank correlation, 1938.)
    """
    alike = [
        (value(arm) > value(other)) == (arm["success"] > other["success"])
        for arm, other in pairs
        if value(arm) != value(other)
    ]
    return sum(alike), len(alike)


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws histograms of the cosines, and success against cosine and step."""
    return [
        _draw_cosines(results, directory / "cosines.png"),
        _draw_success(results, directory / "success.png"),
    ]


def _draw_cosines(results: Results, path: Path) -> Path:
    """Draws histograms: a row per place and rate, a column per kind of clip."""
    config, curves = results.about["config"], results.curves
    found = _arms(results.rows)
    rows = outcomes.by(found, "place", "lr")
    kinds = list(dict.fromkeys(_kind(arm) for arm in found if arm["arm"] != "none"))
    size = 2.8 + 3.6 * len(kinds), 0.6 + 2.7 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.subplots(len(rows), len(kinds), sharex=True, squeeze=False)
    lines = dict(zip(rows, axes))
    for (place,), same in outcomes.by(found, "place").items():
        for arm, shares in zip(same, curves[f"{place} shares"], strict=True):
            if arm["arm"] == "none":
                continue
            axis = lines[place, arm["lr"]][kinds.index(_kind(arm))]
            axis.stairs(
                np.where(shares > 0, shares, np.nan),
                curves["bins"],
                label=arm["arm"],
                # Those below the others are thicker.
                lw=max(2.4 - 0.4 * len(axis.patches), 0.8),
                **plots.style(config["clip"], arm["arm"]),
            )
    for (place, lr), row in lines.items():
        for axis in row:
            title = f"{PLACES[place]}, lr {lr:g}"
            axis.set(yscale="log", ylim=(1e-5, 2), title=title)
        row[0].set_ylabel("share of clipped updates")
    for axis, kind in zip(axes[-1], kinds):
        axis.set_xlabel(f"cosine\n{kind}")
    shown = [axis.get_legend_handles_labels() for axis in axes[-1]]
    figure.legend(
        [handle for handles, _ in shown for handle in handles],
        [label for _, labels in shown for label in labels],
        loc="outside right upper",
        fontsize="small",
    )
    return plots.save(figure, path, results, _caption(config))


def _draw_success(results: Results, path: Path) -> Path:
    """Draws success against angle and longest step: a row per place and rate."""
    config = results.about["config"]
    rows = outcomes.by(_arms(results.rows), "place", "lr")
    figure = Figure(figsize=(11.0, 0.6 + 3.0 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, sharey=True)
    for row, ((place, lr), same) in zip(axes, rows.items(), strict=True):
        for arm in same:
            look = plots.style(config["clip"], arm["arm"])
            look |= {"ls": "none", "label": arm["arm"]}
            shift = APART * config["clip"].index(arm["arm"])
            for axis, x in zip(row, (_angle(arm) + shift, arm["longest"])):
                if place == "cliff":
                    axis.plot(x, arm["success"], marker="o", **look)
                else:
                    successes = sum(arm["successes"])
                    plots.shares(axis, [x], [successes], arm["runs"], **look)
        row[0].set_ylabel(f"{PLACES[place]}, lr {lr:g}:\nshare that succeeds")
        row[1].set_xscale("log")
    axes[-1, 0].set_xlabel("median angle of clipped updates, degrees")
    axes[-1, 1].set_xlabel("largest norm after the clip")
    plots.legend(figure, axes[0, 1])
    caption = (
        f"{_caption(config)}; bars: Wilson's 95 %; angles are drawn a little apart"
    )
    return plots.save(figure, path, results, caption)


def _angle(arm: dict[str, Any]) -> float:
    """Returns the median angle in degrees."""
    return math.degrees(math.acos(min(_turn(arm), 1.0)))


def _kind(arm: dict[str, Any]) -> str:
    """Returns the name of a clip; none is a kind of its own."""
    return arm["arm"].partition(":")[0]


def _caption(config: dict[str, Any]) -> str:
    starts = config["starts"]
    return (
        f"cliff: T = {CLIFF_LENGTH}, lr {config['cliff_lr']:g}, {starts} x {starts} "
        f"starts, {config['cliff_updates']} updates; "
        f"temporal order: length {config['length']}, plain RNN with "
        f"{config['hidden']} units, {INITIAL}, SGD,\n{config['seeds']} seeds, "
        f"{config['updates']} updates of {config['batch']} sequences"
    )


SMOKE = DirectionConfig(
    experiment="direction",
    lr=(0.1,),
    clip=("none", "clip_by_global_norm:1.0", "clip:0.01", "clip:0.1", "clip:1.0"),
    seeds=3,
    updates=200,
    batch=20,
    checks=1,
    starts=8,
)
STANDARD = dataclasses.replace(
    SMOKE,
    clip=(
        "none",
        *(f"clip_by_global_norm:{c}" for c in (1.0, 10.0)),
        *(f"clip_by_leaf_norm:{c}" for c in (0.3, 1.0)),
        *(f"clip:{c}" for c in (0.01, 0.1, 0.3, 1.0)),
    ),
    seeds=20,
    updates=3000,
    checks=30,
    starts=24,
)
STUDY = Study(
    about="how far clips turn a gradient, on the cliff and in training, and what for",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(
            STANDARD, lr=(0.03, 0.1, 0.3), seeds=50, updates=4000, starts=48
        ),
    },
    facts=lambda config: {
        "data": f"generated while training, {TASK} as in tasks/sequences.py; the cliff "
        f"as in studies/cliff.py, with T = {CLIFF_LENGTH}",
        "initial_values": models.INITS[INITIAL],
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
