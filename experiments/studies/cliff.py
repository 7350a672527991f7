"""The cliff: gradient descent on the error of a recurrent network of one unit.

    x_0 = 0.5,  x_t = w sigmoid(x_{t-1}) + b,  E(w, b) = (sigmoid(x_T) - 0.7)^2

E has a wall where the recurrence changes from one fixed point to another. It is counted
how many of the descents that met a long gradient there reach the target all the same. A
clip by norm makes a short step of it in the same direction; a clip of the elements can
also turn it. (Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural
networks, 2013, https://arxiv.org/abs/1211.5063, figure 6, where T is 50.)

Descents start on a square grid over [4, 7] x [-4, -2]. The grid is no random sample, so
shares have no interval, and a best learning rate is the best on all starts. Next to the
wall a rounding can decide where a path goes: outcomes are comparable across devices,
single paths are not.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

import optaxclip
from experiments import arms, clips, outcomes, plots, train
from experiments.clips import Clip
from experiments.config import (
    Config,
    check_clips,
    check_counts,
    check_different,
    check_lrs,
    require,
)
from experiments.journal import Journal, Records
from experiments.results import Results, Rows
from experiments.studies.study import Study

TARGET = 0.7
# A start has reached the target with an error below this.
REACHED = 1e-3
# A descent has met the wall if a gradient was longer than this.
WALL = 10.0
STARTS_W, STARTS_B = (4.0, 7.0), (-4.0, -2.0)
# Starts per side of a square grid from which whole paths are recorded, and the part of
# the surface around them.
PATHS_W, PATHS_B, PATHS = (5.2, 6.8), (-3.8, -2.2), 3
SURFACE_W, SURFACE_B, SURFACE_POINTS = (3.8, 7.0), (-4.1, -1.9), 301
# What `metrics` sums up.
OUTCOME = "error", "steepest", "lowest"
COMPARISONS = "more starts than", "as many starts as", "fewer starts than"
# Number of pieces after which progress is shown, and a run can be stopped.
PIECES = 10
TABLE_CAPTION = (
    f"Reached: share of the starts that end with an error below {REACHED:g}; ever: "
    "that end with one or had one on the way. Met the wall: share with a gradient "
    f"longer than {WALL:g} on the way; of these reached: the share of them that "
    "reached the target all the same."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CliffConfig(Config):
    """Gradient descent on the error of one recurrent unit, from a grid of starts."""

    lr: tuple[float, ...]
    """Learning rates; every clip is run at each."""
    clip: tuple[str, ...]
    """Clips: none, NAME or NAME:ARGUMENTS, as in autoclip:10,window=500."""
    length: tuple[int, ...] = (50,)
    """Steps T of the recurrence; each is an experiment of its own."""
    starts: int = 24
    """Starts per side of the square grid."""
    updates: int = 1000
    """Updates from each start."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        check_lrs(self.lr)
        check_clips(self.clip)
        check_different("length", self.length)
        for length in self.length:
            check_counts(length=length)
        require(self.starts >= 2, "starts", ">= 2", self.starts)
        check_counts(updates=self.updates)


class Point(NamedTuple):
    """Parameters: two arrays of one shape."""

    w: Any
    b: Any


class Descent(NamedTuple):
    """What a descent carries from one update to the next.

    Attributes:
      point: where it is.
      state: of the clip and the optimizer.
      steepest: largest norm of a gradient so far, before the clip.
      lowest: smallest E so far, without that where it is.
    """

    point: Point
    state: Any
    steepest: jax.Array
    lowest: jax.Array


class Move(NamedTuple):
    """An update.

    Attributes:
      point: where the descent was before it.
      kept_norm: norm of the gradient after the clip.
      cosine: of the angle by which the clip turned the gradient.
      clipped: whether the clip made anything smaller.
    """

    point: Point
    kept_norm: jax.Array
    cosine: jax.Array
    clipped: jax.Array


def error(length: int, point: Point) -> jax.Array:
    """Returns E at a point, after so many steps of the recurrence."""

    def advance(x, _):
        return point.w * jax.nn.sigmoid(x) + point.b, None

    x, _ = jax.lax.scan(advance, jnp.float32(0.5), length=length)
    return (jax.nn.sigmoid(x) - TARGET) ** 2


def begin(clip: Clip, knobs: arms.Knobs, start: Point) -> Descent:
    """Returns the descent before its first update."""
    state = _transformation(clip, knobs).init(start)
    return Descent(start, state, jnp.float32(0), jnp.float32(jnp.inf))


def step(
    clip: Clip, length: int, knobs: arms.Knobs, descent: Descent
) -> tuple[Descent, Move]:
    """Makes an update against the clipped gradient."""
    point = descent.point

    def twice(point):
        found = error(length, point)
        return found, found

    # Forwards, along with E: there are two derivatives only, and nothing to be kept.
    grads, here = jax.jacfwd(twice, has_aux=True)(point)
    updates, state = _transformation(clip, knobs).update(grads, descent.state, point)
    (record,) = optaxclip.records(state)
    norm = optaxclip.norms.tree_norm(grads)
    directions = jax.tree.map(lambda leaf: leaf / norm, grads)
    kept = jax.tree.map(lambda leaf: -leaf / knobs.lr, updates)
    kept_norm = optax.tree.norm(kept)
    cosine = optax.tree.vdot(directions, kept) / kept_norm
    clipped = record.clipped > 0
    following = Descent(
        jax.tree.map(jnp.add, point, updates),
        state,
        jnp.maximum(descent.steepest, norm),
        # A number wins over NaN: what was reached once has been reached.
        jnp.fmin(descent.lowest, here),
    )
    return following, Move(point, kept_norm, jnp.where(clipped, cosine, 1.0), clipped)


def _transformation(clip: Clip, knobs: arms.Knobs) -> optax.GradientTransformation:
    return optax.chain(clip.make(knobs.threshold), optax.sgd(knobs.lr))


def descend(
    clip: Clip,
    length: int,
    knobs: arms.Knobs,
    starts: Point,
    updates: int,
    keep: Callable[[Move], dict[str, jax.Array]],
    journal: Journal,
    part: str,
) -> Records:
    """Descends from every start with arms of one kind, in a journal.

    Args:
      clip: the kind of clip.
      length: steps of the recurrence.
      knobs: learning rates and thresholds, of shape (arms,).
      starts: where the descents begin, of shape (starts,).
      updates: number of updates.
      keep: returns what is recorded of an update, whose arrays have shape
        (arms, starts), as arrays of shape (arms, ...).
      journal: shows and keeps how far it is.
      part: a name, different for every kind and length of a run.

    Returns:
      What is kept, of shape (arms, ..., updates); `error`, E at the end, `steepest` and
      `lowest`, (arms, starts, 1); `seconds`, (pieces,).
    """

    def advance(descents: Descent, count: int) -> tuple[Descent, Records]:
        found = _chunk(clip, length, count, keep, knobs, descents)
        return found[0], jax.device_get(found[1])

    def end(descents: Descent) -> Records:
        errors = _errors_at(length, descents.point)
        found = {
            "error": errors,
            "steepest": descents.steepest,
            "lowest": np.fmin(descents.lowest, errors),
        }
        return {name: np.asarray(x)[..., None] for name, x in found.items()}

    return journal.carry(
        f"{part} {clip.name} {clip.options}",
        lambda: (_begin(clip, knobs, starts), {}),
        train.chunks(updates, PIECES),
        advance,
        end,
        pack=jax.device_get,
    )


@functools.partial(jax.jit, static_argnums=0)
def _begin(clip: Clip, knobs: arms.Knobs, starts: Point) -> Descent:
    begin_one = functools.partial(begin, clip)
    return jax.vmap(jax.vmap(begin_one, (None, 0)), (0, None))(knobs, starts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _chunk(
    clip: Clip,
    length: int,
    updates: int,
    keep: Callable[[Move], dict[str, jax.Array]],
    knobs: arms.Knobs,
    descents: Descent,
) -> tuple[Descent, dict[str, jax.Array]]:
    """Makes some updates of all descents; see `descend`."""
    step_all = jax.vmap(jax.vmap(functools.partial(step, clip, length), (None, 0)))

    def body(descents, _):
        descents, move = step_all(knobs, descents)
        return descents, keep(move)

    descents, kept = jax.lax.scan(body, descents, length=updates)
    return descents, jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), kept)


@functools.partial(jax.jit, static_argnums=0)
def _errors_at(length: int, points: Point) -> jax.Array:
    """Returns E at points of any shape."""
    return jnp.vectorize(lambda w, b: error(length, Point(w, b)))(*points)


def run(config: CliffConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Descends from every start with every arm, length after length."""
    grid = arms.grid(config.lr, config.clip)
    lengths, kinds = len(config.length), len(arms.by_kind(grid))
    journal.expect("cliff", config.updates * kinds * lengths)
    square = plane(STARTS_W, STARTS_B, config.starts)
    rows: Rows = []
    curves = {"starts_w": square.w[0], "starts_b": square.b[:, 0]}
    for length in config.length:
        found = _run_length(config, grid, length, square, journal)
        for i, arm in enumerate(grid):
            outcome = {name: found[name][i] for name in OUTCOME}
            rows.append(
                {
                    "experiment": "cliff",
                    "length": length,
                    "arm": arm.clip.spec,
                    "lr": arm.lr,
                    "updates": config.updates,
                    "starts": square.w.size,
                    **metrics(**outcome),
                    "seconds": float(found["seconds"][i]),
                }
            )
        del found["steepest"], found["lowest"], found["seconds"]
        curves.update({f"{length} {name}": curve for name, curve in found.items()})
    return rows, curves


def _run_length(
    config: CliffConfig,
    grid: list[arms.Arm],
    length: int,
    square: Point,
    journal: Journal,
) -> dict[str, np.ndarray]:
    """Descends with every arm at one length, and measures the surface."""
    paths = plane(PATHS_W, PATHS_B, PATHS)
    starts = Point(*(np.append(*both) for both in zip(square, paths)))

    def run_kind(clip: Clip, knobs: arms.Knobs) -> arms.Curves:
        part = f"length {length}"
        found = descend(
            clip, length, knobs, starts, config.updates, _paths, journal, part
        )
        path = Point(found["path_w"], found["path_b"])
        # The last starts are those of the paths.
        shape = len(knobs.lr), *square.w.shape
        outcome = {
            name: found[name][:, : square.w.size, 0].reshape(shape) for name in OUTCOME
        }
        return {
            **outcome,
            "path_w": path.w,
            "path_b": path.b,
            "path_error": np.asarray(_errors_at(length, path)),
            "seconds": np.full(len(knobs.lr), found["seconds"].sum() / len(knobs.lr)),
        }

    surface = plane(SURFACE_W, SURFACE_B, SURFACE_POINTS)
    return {
        **arms.run(grid, run_kind),
        "surface": np.asarray(_errors_at(length, surface)),
        "surface_w": surface.w[0],
        "surface_b": surface.b[:, 0],
    }


def _paths(move: Move) -> dict[str, jax.Array]:
    """Keeps where the last starts have led to."""
    w, b = (x[:, -(PATHS**2) :] for x in move.point)
    return {"path_w": w, "path_b": b}


def metrics(
    error: np.ndarray, steepest: np.ndarray, lowest: np.ndarray
) -> dict[str, float]:
    """Returns shares of the starts; a NaN has not reached the target."""
    reached, met_wall = error < REACHED, ~(steepest <= WALL)
    among = reached[met_wall]
    return {
        "reached": float(reached.mean()),
        "ever_reached": float((lowest < REACHED).mean()),
        "met_wall": float(met_wall.mean()),
        "reached_after_wall": float(among.mean()) if among.size else math.nan,
    }


def plane(w_range: tuple[float, float], b_range: tuple[float, float], n: int) -> Point:
    """Returns points of shape (n, n): b along the first axis, w along the second."""
    w, b = np.linspace(*w_range, n), np.linspace(*b_range, n)
    return Point(*(axis.astype(np.float32) for axis in np.meshgrid(w, b)))


def table(rows: Rows) -> Table:
    """Returns one line per arm of each length."""
    result = Table(
        *(Column(name, justify="right") for name in ("length", "lr")),
        Column("clip", overflow="fold"),
        *(Column(name, justify="right") for name in ("starts", "reached", "ever")),
        *(
            Column(name, justify="right")
            for name in ("met the wall", "of these reached")
        ),
        box=SIMPLE,
        title="cliff",
        caption=TABLE_CAPTION,
    )
    for _, same in outcomes.by(rows, "length", "lr").items():
        for row in same:
            among = row["reached_after_wall"]
            result.add_row(
                str(row["length"]),
                f"{row['lr']:g}",
                row["arm"],
                str(row["starts"]),
                f"{row['reached']:.1%}",
                f"{row['ever_reached']:.1%}",
                f"{row['met_wall']:.1%}",
                "-" if math.isnan(among) else f"{among:.1%}",
                end_section=row is same[-1],
            )
    return result


def verdict(rows: Rows) -> list[str]:
    """Compares the shares of starts that reach the target with those without a clip."""
    lines = []
    for (length,), same in outcomes.by(rows, "length").items():
        found = [*_best_against_best(same), *_at_each_rate(same), *_turned(same)]
        lines += [f"length {length}, {line}" for line in found]
    return lines


def _best_against_best(rows: Rows) -> list[str]:
    """Compares every clip with none, each at its best learning rate."""
    best = {
        arm: max(same, key=lambda row: row["reached"])
        for (arm,), same in outcomes.by(rows, "arm").items()
    }
    if "none" not in best or len(rows) == len(best):
        return []
    none = best.pop("none")
    return [
        f"each at its best lr: {arm} (lr {row['lr']:g}) reaches the target from "
        f"{_starts(row, none)} none (lr {none['lr']:g}), {row['reached']:.1%} against "
        f"{none['reached']:.1%}"
        for arm, row in best.items()
    ]


def _at_each_rate(rows: Rows) -> list[str]:
    """Says which clips reach the target from more starts than none, and which not."""
    lines = []
    for (lr,), same in outcomes.by(rows, "lr").items():
        none = _row(same, "none")
        if none is None or len(same) == 1:
            continue
        line = f"lr {lr:g}: none reaches the target from {none['reached']:.1%}"
        for comparison in COMPARISONS:
            shares = [
                f"{row['arm']} {row['reached']:.1%}"
                for row in same
                if row is not none and _starts(row, none) == comparison
            ]
            if shares:
                line += f"; from {comparison} that: {', '.join(shares)}"
        lines.append(line)
    return lines


def _turned(rows: Rows) -> list[str]:
    """Compares clips of the elements and of the norm, where they differ most.

    Of two numbers they leave the same, but for a factor of sqrt 2; the first also turns
    the step.
    """
    lines = []
    for threshold, (element, norm) in pairs(rows).items():
        by_lr = outcomes.by(rows, "lr").values()
        both = [(_row(same, element), _row(same, norm)) for same in by_lr]
        one, other = max(both, key=lambda pair: abs(_ahead(*pair)))
        line = (
            f"threshold {threshold:g}, at lr {one['lr']:g}, where it matters most: "
            "cutting the elements, which turns a step, reaches the target from "
            f"{_starts(one, other)} cutting the norm, which does not, "
            f"{one['reached']:.1%} against {other['reached']:.1%}"
        )
        none = _row([row for row in rows if row["lr"] == one["lr"]], "none")
        if none is not None:
            line += f", and from {_starts(one, none)} none, {none['reached']:.1%}"
        ever = f"{one['ever_reached']:.1%} against {other['ever_reached']:.1%}"
        lines.append(f"{line}; ever on the way: {ever}")
    return lines


def pairs(rows: Rows) -> dict[float, tuple[str, str]]:
    """Returns by threshold the clips of elements and of the norm that share it."""
    found: dict[str, dict[float, str]] = {"clip": {}, "clip_by_global_norm": {}}
    for (arm,) in outcomes.by(rows, "arm"):
        clip = clips.parse(arm)
        if clip.name in found:
            found[clip.name][clip.threshold] = arm
    norms = found["clip_by_global_norm"]
    return {c: (arm, norms[c]) for c, arm in found["clip"].items() if c in norms}


def _row(rows: Rows, arm: str) -> Any:
    return next((row for row in rows if row["arm"] == arm), None)


def _ahead(row: dict[str, Any], other: dict[str, Any]) -> float:
    return row["reached"] - other["reached"]


def _starts(row: dict[str, Any], other: dict[str, Any]) -> str:
    more, as_many, fewer = COMPARISONS
    ahead = _ahead(row, other)
    return as_many if ahead == 0 else more if ahead > 0 else fewer


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws all shares, some paths on the surface, and the end of every start."""
    config = results.about["config"]
    return [
        _draw_shares(results, directory / "shares.png"),
        _draw_paths(results, directory / "paths.png"),
        *(
            _draw_starts(results, directory / f"starts_{length}.png", length)
            for length in config["length"]
        ),
    ]


def _draw_shares(results: Results, path: Path) -> Path:
    """Draws the shares as maps: a row per length, of all starts and at the wall."""
    config = results.about["config"]
    specs, rates = config["clip"][::-1], [f"{lr:g}" for lr in config["lr"]]
    panels = {
        "reached": "of all starts",
        "reached_after_wall": "of those that met the wall",
    }
    size = 3.2 + max(1.3 * len(rates), 5.0), 1.2 + 0.4 * len(specs)
    lengths = len(config["length"])
    figure = Figure(figsize=(size[0], 0.6 + size[1] * lengths), layout="constrained")
    axes = figure.subplots(lengths, 2, squeeze=False, sharey=True, sharex=True)
    for row, ((length,), same) in zip(
        axes, outcomes.by(results.rows, "length").items()
    ):
        for axis, (name, title) in zip(row, panels.items()):
            shares = np.zeros((len(specs), len(rates)))
            for each in same:
                place = specs.index(each["arm"]), config["lr"].index(each["lr"])
                shares[place] = each[name]
            texts = [[_percent(share) for share in line] for line in shares]
            colours = {"cmap": "viridis", "vmin": 0, "vmax": 1}
            plots.heatmap(axis, shares, (specs, rates), texts, **colours)
            axis.set_title(f"T = {length}, {title}", fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    runs = f"share that reaches the target, %; {_caption(config)}; -: none met it"
    return plots.save(figure, path, results, runs)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}"


def _draw_paths(results: Results, path: Path) -> Path:
    """Draws the paths from a start and the error along them, a column per clip.

    Of the starts whose paths are recorded it is the one where it matters most.
    """
    config, curves = results.about["config"], results.curves
    lengths, specs = config["length"], config["clip"]
    size = 2.2 + 2.5 * len(specs), 1.2 + 4.2 * len(lengths)
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.subplots(
        2 * len(lengths), len(specs), sharex="row", sharey="row", squeeze=False
    )
    grid = arms.grid(config["lr"], specs)
    base = "none" if "none" in specs else specs[0]
    same = outcomes.by(results.rows, "length")
    meshes = []
    for length, surfaces, alongs in zip(lengths, axes[::2], axes[1::2]):
        lr = _telling(same[length,])
        shown = [i for i, arm in enumerate(grid) if arm.lr == lr]
        window = curves[f"{length} surface_w"], curves[f"{length} surface_b"]
        names = "path_w", "path_b", "path_error"
        w, b, error = (curves[f"{length} {name}"][shown] for name in names)
        ends = np.maximum(error[..., -1], REACHED)
        start = int(np.argmax(ends[specs.index(base)] / ends.min(0)))
        w, b, error = (x[:, start] for x in (w, b, error))
        for i, (surface, along) in enumerate(zip(surfaces, alongs)):
            meshes.append(_errors(surface, *window, curves[f"{length} surface"]))
            surface.plot(w[i], b[i], color="tab:red", lw=1.0)
            surface.plot(w[i, 0], b[i, 0], "ko", mfc="white")
            surface.set(xlim=window[0][[0, -1]], ylim=window[1][[0, -1]], xlabel="w")
            surface.set_title(specs[i].replace(":", "\n"), fontsize="medium")
            along.plot(error[i], color="tab:red", lw=1.0)
            along.axhline(REACHED, color="0.6", lw=0.8)
            along.set(yscale="log", ylim=(1e-8, 1), xlabel="updates")
        surfaces[0].set_ylabel(f"T = {length}, lr {lr:g}\nb")
        alongs[0].set_ylabel("error E along the path")
    figure.colorbar(meshes[0], ax=axes[0], label="error E(w, b)", extend="min")
    less = ", less those with none" if _both(specs) else ""
    runs = (
        f"{_caption(config)}, at the lr where most reach the target{less};\n"
        f"from the circle: of {PATHS**2} starts the one where {base} ends highest "
        "above the best; paths may leave the window;\n"
        "the target is reached by what ends below the grey line"
    )
    return plots.save(figure, path, results, runs)


def _telling(rows: Rows) -> float:
    """Returns the learning rate where the best clip of one length is farthest ahead.

    That is ahead of none; if none was not run, or nothing else, the best one.
    """

    def ahead(lr: tuple[float]) -> float:
        shares = {row["arm"]: row["reached"] for row in by_lr[lr]}
        without = shares.pop("none") if _both(shares) else 0.0
        return max(shares.values()) - without

    by_lr = outcomes.by(rows, "lr")
    return max(by_lr, key=ahead)[0]


def _both(specs: Iterable[str]) -> bool:
    """Says whether there are clips, and none to compare them with."""
    return {"none"} < set(specs)


def _draw_starts(results: Results, path: Path, length: int) -> Path:
    """Draws the final error of every start: a row per clip, a column per rate."""
    config, curves = results.about["config"], results.curves
    rows, columns = len(config["clip"]), len(config["lr"])
    size = 3.2 + 1.7 * columns, 1.3 + 1.4 * rows
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    reached = [row["reached"] for row in results.rows if row["length"] == length]
    meshes = []
    for i, arm in enumerate(arms.grid(config["lr"], config["clip"])):
        axis = axes[config["clip"].index(arm.clip.spec), config["lr"].index(arm.lr)]
        place = curves["starts_w"], curves["starts_b"]
        meshes.append(_errors(axis, *place, curves[f"{length} error"][i]))
        axis.set_title(f"{reached[i]:.1%}", fontsize="small")
    for lr, axis in zip(config["lr"], axes[-1]):
        axis.set_xlabel(f"lr {lr:g}")
    for spec, axis in zip(config["clip"], axes[:, 0]):
        name, _, arguments = spec.partition(":")
        axis.set_ylabel(f"{name}\n{arguments}", fontsize="x-small")
    figure.colorbar(meshes[0], ax=axes, label="error E at the end", extend="min")
    runs = (
        f"T = {length}, {_caption(config)}\n"
        "where they start: w across, b up; darkest, and the share above: the target "
        "is reached"
    )
    return plots.save(figure, path, results, runs)


def _caption(config: dict[str, Any]) -> str:
    starts = config["starts"]
    return f"{starts} x {starts} starts, {config['updates']} updates"


def _errors(axis: Axes, w: np.ndarray, b: np.ndarray, error: np.ndarray) -> Any:
    """Draws errors of shape (b, w), all on one scale: darkest is below 0.001."""
    norm = LogNorm(REACHED, 0.5, clip=True)
    return axis.pcolormesh(w, b, error, norm=norm, cmap="viridis", shading="nearest")


SMOKE = CliffConfig(
    experiment="cliff", lr=(0.3,), clip=("none", "clip_by_global_norm:1.0")
)
STANDARD = dataclasses.replace(
    SMOKE,
    lr=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    clip=(
        "none",
        "clip_by_global_norm:1.0",
        "clip_by_global_norm:0.1",
        "clip:1.0",
        "normalize_by_global_norm:1.0",
        "autoclip:10,window=100",
    ),
    starts=100,
)
STUDY = Study(
    about="one recurrent unit: the surface with its wall, and who gets past it",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(STANDARD, length=(25, 50, 100, 200), starts=500),
    },
    facts=lambda config: {
        "error": "(sigmoid(x_T) - 0.7)^2, x_t = w sigmoid(x_{t-1}) + b, x_0 = 0.5",
        "data": f"starts on a grid, w in {STARTS_W}, b in {STARTS_B}",
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
