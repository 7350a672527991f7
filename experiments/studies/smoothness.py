"""Smoothness: whether the slope of the loss changes faster where it is steep.

A function is (L0, L1)-smooth if its gradient changes on a short way d by no more than

    |grad f(x + d) - grad f(x)| <= (L0 + L1 |grad f(x)|) |d|.

Zhang, He, Sra, Jadbabaie (Why gradient clipping accelerates training: a theoretical
justification for adaptivity, 2020, https://arxiv.org/abs/1905.11881) show that where
this holds with a large L1, a clip by norm may be as much faster as one likes than steps
of one size, and that in language models the smoothness L does grow with the gradient
norm. Here both are measured along the training of character models, at points x_k some
updates apart, as they do it:

    L(x_k) = max over shares s of |grad f(x_k + s d) - grad f(x_k)| / |s d|,
    d = x_{k+1} - x_k,  s in {1/3, 2/3, 1}

It is a lower bound of the smoothness around: d is one direction out of all. Both
gradients are those of one larger batch, the same for all points of a run, so that no
noise of batches is in their difference. In their program f is a tenth of the training
text, s is 1/2 alone, and the model an LSTM of two layers for words. A value that is not
finite stays out of what follows, and is counted.

What is reported of a run: Spearman's correlation of L and |grad f|; the same with the
number of the update held constant, as both may just follow it; and L0, L1 >= 0, so that
nine in ten points are below L0 + L1 |grad f|: among all such lines the one from which
logarithms are nearest (quantile regression: Koenker, Bassett, Regression quantiles,
1978; quantiles of logarithms are logarithms of quantiles).

Steps of a learning rate above 2 / L diverge on a quadratic, and Cohen, Kaur, Li,
Kolter, Talwalkar (Gradient descent on neural networks typically occurs at the edge of
stability, 2021, https://arxiv.org/abs/2103.00065) see steps on the whole of the data
keep L near 2 / lr; the figure shows 2 / lr.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.box import SIMPLE
from rich.table import Column, Table

from experiments import arms, devices, models, omega, outcomes, plots, stats, train
from experiments.clips import Clip
from experiments.config import (
    Config,
    check_clips,
    check_counts,
    check_different,
    check_lrs,
    check_seeds,
    require,
)
from experiments.journal import Journal, Records
from experiments.results import Results, Rows
from experiments.studies.study import Study
from experiments.tasks import text

SHARES = 1 / 3, 2 / 3, 1.0
# Share of the points below the line.
BELOW = 0.9
# Fewest points of a run from which something is concluded.
FEWEST = 8
# The search for the line: logits of the share of L1 |grad f| in it, at the median of
# |grad f|; candidates at a time; times that it goes on around the best one.
LOGIT, CANDIDATES, ZOOMS = 22.0, 111, 4
TABLE_CAPTION = (
    "Medians over seeds; intervals have 95 % (with fewer than 6 seeds: ranges). Loss: "
    "on the windows on which all is measured, at the last point. "
    "Spearman: correlation of smoothness and gradient norm over the points of a run; "
    "at equal k: with the number of the update held constant; where it cannot be "
    "measured, intervals take it for the worst of -1 and 1. L0, L1: "
    f"{BELOW:.0%} of the points are below L0 + L1 |g|. Lost: points not finite."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothnessConfig(Config):
    """Training of character models, whose smoothness is measured on the way."""

    cell: tuple[str, ...]
    """Recurrent cells: rnn (tanh units), lstm or gru."""
    lr: tuple[float, ...]
    """Learning rates of SGD; every clip is run at each."""
    clip: tuple[str, ...]
    """Clips: none, NAME or NAME:ARGUMENTS, as in autoclip:10,window=500."""
    seed: int = 0
    """First seed; it decides initial values and batches."""
    seeds: int
    """Number of seeds; every clip sees the same ones."""
    updates: int
    """Updates of each run."""
    every: int
    """Updates from one point that is measured to the next."""
    batch: int
    """Windows of text per update."""
    probe: int
    """Windows of text on which smoothness is measured."""
    length: int
    """Characters of a window."""
    hidden: int
    """Units of the network."""
    data: Path | None = None
    """File with the text. Default: the documentation of Python."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        check_different("cell", self.cell)
        for cell in self.cell:
            known = ", ".join(models.CELLS)
            require(cell in models.CELLS, "cell", f"of {known}", cell)
        check_lrs(self.lr)
        check_clips(self.clip)
        check_seeds(self.seed, self.seeds)
        check_counts(
            every=self.every,
            batch=self.batch,
            probe=self.probe,
            length=self.length,
            hidden=self.hidden,
        )
        fewest = FEWEST * self.every
        require(self.updates >= fewest, "updates", f">= {fewest}", self.updates)


class Point(NamedTuple):
    """What is measured at a point; of shape () in a run.

    Attributes:
      loss: f.
      grad_norm: |grad f|.
      smoothness: L.
    """

    loss: Any
    grad_norm: Any
    smoothness: Any


class Line(NamedTuple):
    """L0 + L1 |grad f|."""

    l0: float
    l1: float


def measure(gradient: Any, here: Any, there: Any) -> Point:
    """Measures the smoothness between two points.

    Args:
      gradient: maps parameters to the loss and its gradient.
      here: parameters x_k.
      there: parameters x_{k+1}.

    Returns:
      What is found at x_k.
    """
    way = jax.tree.map(jnp.subtract, there, here)

    def look(share):
        at = jax.tree.map(lambda x, d: x + share * d, here, way)
        return gradient(at)

    shares = jnp.array([0, *SHARES])
    losses, grads = jax.lax.map(look, shares)

    def ratio(share, grad):
        change = jax.tree.map(lambda far, near: far - near[0], grad, grads)
        return optax.tree.norm(change) / (share * optax.tree.norm(way))

    further = jax.tree.map(lambda leaf: leaf[1:], grads)
    ratios = jax.vmap(ratio)(shares[1:], further)
    nearest = jax.tree.map(lambda leaf: leaf[0], grads)
    return Point(losses[0], optax.tree.norm(nearest), jnp.max(ratios))


def advance(
    setup: train.Setup,
    clip: Clip,
    updates: int,
    probe: int,
    task: Any,
    knobs: arms.Knobs,
    state: train.State,
) -> tuple[train.State, Point]:
    """Measures a point, and makes some updates from there."""
    batch = task.sample(jax.random.wrap_key_data(state.examples), probe)

    def gradient(params):
        score, grads = omega.gradient(params, setup.model, task, batch, 0)
        return score.loss, grads

    following, _ = train.step(setup, clip, task, knobs, state)
    point = measure(gradient, state.params, following.params)
    end, _ = train.run_chunk(setup, clip, updates, task, knobs, state)
    return end, point


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns the ranks of values, from 1; equal ones share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> float:
    """Returns Spearman's correlation.

    Args:
      x: of shape (n,).
      y: of shape (n,).
      given: what is held constant, of shape (n,): the correlation is then that of what
        is left of the ranks after a linear regression on its ranks.

    Returns:
      The correlation; NaN if x or y does not vary.
    """
    if given is None:
        return _correlation(ranks(x), ranks(y))
    x_y = spearman(x, y)
    x_given, y_given = spearman(x, given), spearman(y, given)
    left = math.sqrt(max((1 - x_given**2) * (1 - y_given**2), 0))
    return (x_y - x_given * y_given) / left if left > 0 else math.nan


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    lengths = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / lengths if lengths > 0 else math.nan


def fit(grad_norm: np.ndarray, smoothness: np.ndarray) -> Line:
    """Returns the line below which `BELOW` of the points are, as above.

    Args:
      grad_norm: of shape (points,), above 0.
      smoothness: of shape (points,), above 0.
    """
    middle = np.median(grad_norm)
    height = np.log(smoothness)

    def part(logit):
        """Returns L1 |grad f| as a share; rounded, so that L0 or L1 can be 0."""
        return np.round(1 / (1 + np.exp(-logit)), 9)

    def shape(logit):
        return np.log(1 - part(logit) + part(logit) * grad_norm / middle)

    def cost(logit):
        above = height - shape(logit)
        above = above - np.quantile(above, BELOW)
        return np.maximum(BELOW * above, (BELOW - 1) * above).sum()

    best, reach = 0.0, LOGIT
    for _ in range(ZOOMS):
        logits = np.linspace(best - reach, best + reach, CANDIDATES)
        best = logits[np.argmin([cost(logit) for logit in logits])]
        reach = logits[1] - logits[0]
    factor = np.exp(np.quantile(height - shape(best), BELOW))
    l0, l1 = factor * (1 - part(best)), factor * part(best) / middle
    return Line(float(l0), float(l1))


def cut(updates: int, every: int) -> list[int]:
    """Cuts updates into pieces of one length, and what is left of them."""
    rest = updates % every
    return [every] * (updates // every) + [rest] * (rest > 0)


def run(config: SmoothnessConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Trains all arms on all seeds with each cell, and measures on the way."""
    task = text.load(config.data, config.length)
    grid = arms.grid(config.lr, config.clip)
    kinds = len(arms.by_kind(grid))
    journal.expect("smoothness", config.updates * kinds * len(config.cell))
    pieces = cut(config.updates, config.every)
    rows: Rows = []
    curves: dict[str, np.ndarray] = {"at": np.cumsum([0, *pieces[:-1]])}
    for cell in config.cell:
        model = models.Recurrent(cell, config.hidden, task.outputs)
        setup = train.Setup(model, "sgd", config.batch)
        follow = functools.partial(_follow, config, setup, task, pieces, journal)
        found = arms.run(grid, follow)
        rows += _rows(config, cell, grid, curves["at"], found)
        for name in Point._fields:
            curves[f"{cell} {name}"] = found[name]
    return rows, curves


def _follow(
    config: SmoothnessConfig,
    setup: train.Setup,
    task: Any,
    pieces: list[int],
    journal: Journal,
    clip: Clip,
    knobs: arms.Knobs,
) -> arms.Curves:
    """Trains the arms of one kind; returns points of shape (arms, seeds, points)."""
    shape = len(knobs.lr), config.seeds
    arm, seed = np.indices(shape).reshape(2, -1)
    runs = devices.spread(arm.size)
    placed = runs.place(jax.tree.map(lambda knob: np.asarray(knob)[arm], knobs))
    seeds = config.seed + np.arange(config.seeds)
    starts = train.start_all(setup.model, runs.whole, task, seeds)

    def begin() -> tuple[train.State, Records]:
        places = runs.place(seed)
        return train.begin_all(setup, clip, runs, starts, placed, places), {}

    def forward(state: train.State, updates: int) -> tuple[train.State, Records]:
        state, point = _advance(
            setup, clip, updates, config.probe, runs, task, placed, state
        )
        found = runs.gather(point._asdict())
        return state, {name: value[:, None] for name, value in found.items()}

    found = journal.carry(
        f"{setup.model.cell} {clip.name} {clip.options}",
        begin,
        pieces,
        forward,
        end=lambda state: {},
        pack=runs.gather,
        unpack=runs.place,
    )
    seconds = found["seconds"].sum() / shape[0]
    points = {name: found[name].reshape(*shape, -1) for name in Point._fields}
    return {**points, "seconds": np.full(shape[0], seconds)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=7)
def _advance(
    setup: train.Setup,
    clip: Clip,
    updates: int,
    probe: int,
    runs: devices.Spread,
    task: Any,
    knobs: arms.Knobs,
    states: train.State,
) -> tuple[train.State, Point]:
    """Measures a point of every run, and makes some updates."""
    one = functools.partial(advance, setup, clip, updates, probe)
    return runs.map(one, shared=1)(task, knobs, states)


def _rows(
    config: SmoothnessConfig,
    cell: str,
    grid: list[arms.Arm],
    at: np.ndarray,
    curves: arms.Curves,
) -> Rows:
    """Returns a row per run."""
    return [
        {
            "experiment": "smoothness",
            "cell": cell,
            "arm": arm.clip.spec,
            "lr": arm.lr,
            "seed": config.seed + j,
            "updates": config.updates,
            "points": len(at),
            **relation(at, Point(*(curves[name][i, j] for name in Point._fields))),
            "seconds": float(curves["seconds"][i] / config.seeds),
        }
        for i, arm in enumerate(grid)
        for j in range(config.seeds)
    ]


def relation(at: np.ndarray, points: Point) -> dict[str, float]:
    """Sums up the points of a run, all of shape (points,).

    Args:
      at: numbers of the updates.
      points: what was measured there.

    Returns:
      Numbers by name: NaN if fewer than `FEWEST` points are finite and above 0.
    """
    both = np.stack([points.grad_norm, points.smoothness]).astype(float)
    known = (np.isfinite(both) & (both > 0)).all(0)
    found = {
        "start_loss": float(points.loss[0]),
        "end_loss": float(points.loss[-1]),
        "lost": int((~known).sum()),
    }
    if known.sum() < FEWEST:
        names = "spearman", "at_equal_update", "l0", "l1", "spans"
        return {**found, **dict.fromkeys(names, math.nan)}
    grad_norm, smoothness = both[:, known]
    return {
        **found,
        "spearman": spearman(grad_norm, smoothness),
        "at_equal_update": spearman(grad_norm, smoothness, at[known]),
        **fit(grad_norm, smoothness)._asdict(),
        "spans": float(smoothness.max() / smoothness.min()),
    }


def table(rows: Rows) -> Table:
    """Returns one line per cell and arm."""
    names = "lr", "loss", "Spearman", "at equal k", "L0", "L1", "lost"
    result = Table(
        *(Column(name, overflow="fold") for name in ("cell", "clip")),
        *(Column(name, justify="right") for name in names),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title="smoothness",
        caption=TABLE_CAPTION,
    )
    for (cell, arm, lr), runs in outcomes.by(rows, "cell", "arm", "lr").items():
        result.add_row(
            cell,
            arm,
            f"{lr:g}",
            f"{outcomes.median('end_loss')(runs):.2f}",
            f"{_typical(runs, 'spearman'):.2f}",
            f"{_typical(runs, 'at_equal_update'):.2f}",
            f"{outcomes.median('l0')(runs):.2g}",
            f"{outcomes.median('l1')(runs):.2g}",
            str(sum(run["lost"] for run in runs)),
        )
    return result


def verdict(rows: Rows) -> list[str]:
    """Says for each cell and arm whether smoothness grows with the gradient norm."""
    lines = []
    for (cell, arm, lr), runs in outcomes.by(rows, "cell", "arm", "lr").items():
        lines.append(
            f"{cell}, lr {lr:g}, {arm}: {_claim(runs)}: Spearman "
            f"{_typical(runs, 'spearman'):.2f}, with the update held constant "
            f"{_typical(runs, 'at_equal_update'):.2f} ({len(runs)} seeds)"
            f"{_unmeasured(runs)}{_span(runs)}"
        )
    return lines


def _claim(runs: Rows) -> str:
    """Says what becomes of what Zhang et al. found."""
    if len(runs) < outcomes.FEWEST:
        return f"no verdict from fewer than {outcomes.FEWEST} seeds"
    _, low, high = _typical(runs, "spearman")
    if high < 0:
        return "smoothness falls with the gradient norm, unlike in Zhang et al."
    if low <= 0:
        return "smoothness has no clear relation to the gradient norm"
    found = "smoothness grows with the gradient norm, as in Zhang et al."
    _, low, high = _typical(runs, "at_equal_update")
    if high < 0:
        return f"{found}, but not beyond what both follow in time"
    if low <= 0:
        return f"{found}; whether beyond what both follow in time is not clear"
    return found


def _unmeasured(runs: Rows) -> str:
    """Says how many runs lack one of the correlations, if any does."""
    names = "spearman", "at_equal_update"
    lacking = sum(any(math.isnan(run[name]) for name in names) for run in runs)
    if not lacking:
        return ""
    return f"; {lacking} of {len(runs)} runs have no correlation to measure"


def _span(runs: Rows) -> str:
    """Says by which factor the smoothness of a run varies, if it is known."""
    span = outcomes.median("spans")(runs)
    known = math.isfinite(span)
    return f"; the smoothness of a run spans a factor of {span:.2g}" if known else ""


def _typical(runs: Rows, name: str) -> stats.Spread:
    """Returns the median of a correlation over seeds, and its interval.

    One that cannot be measured stays out of the median, and is anything from -1 to 1
    in the interval.
    """
    values = np.array([run[name] for run in runs])
    lost = np.isnan(values)
    low, _ = stats.interval_of_median(np.where(lost, -1, values))
    _, high = stats.interval_of_median(np.where(lost, 1, values))
    median = math.nan if lost.all() else float(np.median(values[~lost]))
    return stats.Spread(median, low, high)


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws smoothness against gradient norm."""
    return [_draw(results, directory / "smoothness.png")]


def _draw(results: Results, path: Path) -> Path:
    """Draws all points: a row per cell, a column per arm."""
    config, curves = results.about["config"], results.curves
    grid = arms.grid(config["lr"], config["clip"])
    figure = Figure(
        figsize=(1.8 + 3.8 * len(grid), 1.2 + 3.4 * len(config["cell"])),
        layout="constrained",
    )
    axes = figure.subplots(
        len(config["cell"]), len(grid), squeeze=False, sharex="row", sharey="row"
    )
    runs = outcomes.by(results.rows, "cell", "arm", "lr")
    colours = ScalarMappable(Normalize(0, curves["at"][-1]), "viridis")
    for cell, row in zip(config["cell"], axes, strict=True):
        for i, (arm, axis) in enumerate(zip(grid, row, strict=True)):
            points = Point(*(curves[f"{cell} {name}"][i] for name in Point._fields))
            _scale(axis)
            _draw_points(axis, points, colours.to_rgba(curves["at"]))
            axis.axhline(2 / arm.lr, color="0.5", ls="--", lw=0.8)
            _draw_line(axis, points.grad_norm, runs[cell, arm.clip.spec, arm.lr])
            title = f"{cell}, lr {arm.lr:g}, {arm.clip.spec}"
            axis.set_title(title, fontsize="medium")
        row[0].set_ylabel("smoothness L")
    for axis in axes[-1]:
        axis.set_xlabel("gradient norm |g|")
    figure.colorbar(colours, ax=axes, label="update")
    caption = (
        f"{config['seeds']} seeds, {config['hidden']} units, SGD, {config['updates']} "
        f"updates of {config['batch']} windows of {config['length']} characters, "
        f"measured on {config['probe']} every {config['every']}\n"
        f"line: {BELOW:.0%} of the points are below; medians over seeds; dashed: 2 / lr"
    )
    return plots.save(figure, path, results, caption)


def _scale(axis: Axes) -> None:
    """Makes both scales logarithmic, with plain numbers."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 3)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())


def _draw_points(axis: Axes, points: Point, colours: np.ndarray) -> None:
    """Draws points, whose curves have shape (seeds, points), in colours (points, 4)."""
    for grad_norm, smoothness in zip(points.grad_norm, points.smoothness, strict=True):
        known = np.isfinite(grad_norm) & np.isfinite(smoothness)
        axis.scatter(grad_norm[known], smoothness[known], s=5, c=colours[known])


def _draw_line(axis: Axes, grad_norm: np.ndarray, runs: Rows) -> None:
    """Draws the median line of runs, and says what it is."""
    l0, l1 = outcomes.median("l0")(runs), outcomes.median("l1")(runs)
    known = grad_norm[np.isfinite(grad_norm) & (grad_norm > 0)]
    if known.size and np.isfinite(l0):
        x = np.geomspace(known.min(), known.max(), 100)
        axis.plot(x, l0 + l1 * x, "k-", lw=1.2)
    said = f"{l0:.2g} + {l1:.2g} |g|\nSpearman {_typical(runs, 'spearman').median:.2f}"
    place = {"transform": axis.transAxes, "va": "top", "fontsize": "small"}
    axis.text(0.03, 0.97, said, **place)


SMOKE = SmoothnessConfig(
    experiment="smoothness",
    cell=("rnn",),
    lr=(1.0,),
    clip=("none", "clip_by_global_norm:0.25"),
    seeds=6,
    updates=120,
    every=5,
    batch=16,
    probe=32,
    length=25,
    hidden=24,
)
STANDARD = dataclasses.replace(
    SMOKE,
    cell=("rnn", "lstm"),
    lr=(1.0, 3.0),
    seeds=10,
    updates=400,
    every=10,
    probe=64,
    length=50,
    hidden=32,
)
STUDY = Study(
    about="local smoothness against gradient norm, along the training of a text model",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(
            STANDARD,
            lr=(1.0, 3.0, 30.0),
            updates=5000,
            every=25,
            batch=64,
            probe=128,
            length=70,
            hidden=512,
        ),
    },
    facts=lambda config: {
        "data": text.about(config.data, config.length),
        "initial_values": models.INITS["flax"],
        "smoothness": "largest change of the gradient per length, at shares "
        f"{', '.join(f'{share:.3g}' for share in SHARES)} of an update",
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
