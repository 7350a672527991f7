"""The cliff: gradient descent on the error of a recurrent network of one unit.

    x_0 = 0.5,  x_t = w sigmoid(x_{t-1}) + b,  E(w, b) = (sigmoid(x_50) - 0.7)^2

E is flat nearly everywhere and has a wall, thinner than a step, where the recurrence
changes from one fixed point to another. A gradient met there is thousands of times the
usual one, and the step it causes leaves for a far plain, for good. A clip by norm turns
it into a short step in the same direction. (Pascanu, Mikolov, Bengio, On the difficulty
of training recurrent neural networks, 2013, https://arxiv.org/abs/1211.5063, figure 6.)

Descents start on a square grid over [4, 7] x [-4, -2]. The grid is no random sample, so
shares have no interval. Next to the wall a rounding decides where a path goes: outcomes
are comparable across devices, single paths are not.
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
from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Table

import optaxclip
from experiments import arms, plots
from experiments.clips import Clip
from experiments.config import CliffConfig
from experiments.results import Results
from experiments.studies.study import Rows, Study

LENGTH = 50
TARGET = 0.7
# A start has reached the target with an error below this.
REACHED = 1e-3
# A descent has met the wall if a gradient was longer than this; 0.05 is usual.
WALL = 10.0
STARTS_W, STARTS_B = (4.0, 7.0), (-4.0, -2.0)
# A start whose path meets the wall, and the part of the surface around it.
PATH_START = (5.826, -3.913)
SURFACE_W, SURFACE_B, SURFACE_POINTS = (3.8, 7.0), (-4.1, -1.9), 301


class Point(NamedTuple):
    """Parameters: two arrays of one shape."""

    w: jax.Array
    b: jax.Array


class Descent(NamedTuple):
    """A descent in numbers, each of shape () for one start.

    Attributes:
      error: E at its end.
      steepest: largest norm of a gradient on the way, before the clip.
    """

    error: Any
    steepest: Any


def error(point: Point) -> jax.Array:
    """Returns E at a point."""

    def advance(x, _):
        return point.w * jax.nn.sigmoid(x) + point.b, None

    x, _ = jax.lax.scan(advance, jnp.float32(0.5), length=LENGTH)
    return (jax.nn.sigmoid(x) - TARGET) ** 2


def descend(
    clip: Clip, count: int, knobs: arms.Knobs, start: Point
) -> tuple[Descent, Point]:
    """Follows the clipped gradient from a point.

    Args:
      clip: the kind of clip.
      count: number of updates.
      knobs: learning rate and threshold.
      start: where it begins.

    Returns:
      The descent, and where it was before each update: arrays of shape (count,).
    """
    transformation = optax.chain(clip.make(knobs.threshold), optax.sgd(knobs.lr))

    def update(carry, _):
        point, opt_state, steepest = carry
        grads = jax.grad(error)(point)
        updates, opt_state = transformation.update(grads, opt_state, point)
        steepest = jnp.maximum(steepest, optaxclip.norms.tree_norm(grads))
        following = jax.tree.map(jnp.add, point, updates)
        return (following, opt_state, steepest), point

    carry = (start, transformation.init(start), jnp.zeros(()))
    (end, _, steepest), path = jax.lax.scan(update, carry, length=count)
    return Descent(error(end), steepest), path


def run(config: CliffConfig, progress: Progress) -> tuple[Rows, arms.Curves]:
    """Descends from every start with every arm."""
    starts = _grid(STARTS_W, STARTS_B, config.starts)
    grid = arms.grid(config.lr, config.clip)
    total = config.updates * len(arms.by_kind(grid))
    bar = progress.add_task("cliff", total=total, best="")
    path_start = Point(*jnp.asarray(PATH_START))

    def run_kind(clip: Clip, knobs: arms.Knobs) -> arms.Curves:
        one = functools.partial(descend, clip, config.updates)

        def outcome(knobs, start):
            return one(knobs, start)[0]

        over_grid = jax.vmap(jax.vmap(outcome, (None, 0)), (None, 0))
        found = jax.jit(jax.vmap(over_grid, (0, None)))(knobs, starts)
        _, path = jax.jit(jax.vmap(one, (0, None)))(knobs, path_start)
        best = f"best share {np.max(np.mean(found.error < REACHED, (1, 2))):.3f}"
        progress.update(bar, advance=config.updates, best=best)
        along = jax.vmap(jax.vmap(error))(path)
        paths = {"path_w": path.w, "path_b": path.b, "path_error": along}
        return {**found._asdict(), **paths}

    curves, seconds = arms.run(grid, run_kind)
    rows = [
        {
            "experiment": "cliff",
            "arm": grid[i].clip.spec,
            "lr": grid[i].lr,
            "updates": config.updates,
            "starts": config.starts**2,
            **_metrics(curves["error"][i], curves["steepest"][i]),
            "seconds": seconds[i],
        }
        for i in range(len(grid))
    ]
    axes = {"starts_w": starts.w[0], "starts_b": starts.b[:, 0]}
    return rows, {**curves, **jax.device_get({**axes, **_surface()})}


def table(rows: Rows) -> Table:
    """Returns one line per arm."""
    result = Table("lr", "clip", box=SIMPLE, title="cliff")
    for name in ("starts", "reached", "met the wall", "of these reached"):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            f"{row['lr']:g}",
            row["arm"],
            str(row["starts"]),
            f"{row['reached']:.1%}",
            f"{row['met_wall']:.1%}",
            f"{row['reached_after_wall']:.1%}",
        )
    return result


def verdict(rows: Rows) -> list[str]:
    """Compares the shares of starts that reach the target with those without a clip."""
    none = {row["lr"]: row["reached"] for row in rows if row["arm"] == "none"}
    return [
        f"lr {row['lr']:g}: {row['arm']} reaches the target from {row['reached']:.1%} "
        f"of the starts, without a clip {none[row['lr']]:.1%}"
        for row in rows
        if row["arm"] != "none" and row["lr"] in none
    ]


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws two paths on the surface, and from where the target is reached."""
    return [
        plots.cliff_paths(results, directory / "paths.png"),
        plots.cliff_starts(results, directory / "starts.png"),
    ]


def _grid(w_range: tuple[float, float], b_range: tuple[float, float], n: int) -> Point:
    """Returns points of shape (n, n): b along the first axis, w along the second."""
    w, b = np.linspace(*w_range, n), np.linspace(*b_range, n)
    return Point(*(jnp.asarray(axis, jnp.float32) for axis in np.meshgrid(w, b)))


def _surface() -> dict[str, jax.Array]:
    """Returns E around the path, of shape (b, w), and its axes."""
    window = _grid(SURFACE_W, SURFACE_B, SURFACE_POINTS)
    return {
        "surface": jax.jit(jax.vmap(jax.vmap(error)))(window),
        "surface_w": window.w[0],
        "surface_b": window.b[:, 0],
    }


def _metrics(error: np.ndarray, steepest: np.ndarray) -> dict[str, float]:
    """Returns shares of the starts; a NaN has not reached the target."""
    reached, met_wall = error < REACHED, ~(steepest <= WALL)
    among = reached[met_wall]
    return {
        "reached": float(reached.mean()),
        "met_wall": float(met_wall.mean()),
        "reached_after_wall": float(among.mean()) if among.size else math.nan,
    }


SMOKE = CliffConfig(
    experiment="cliff", lr=(0.3,), clip=("none", "clip_by_global_norm:1.0")
)
STUDY = Study(
    about="one recurrent unit: the surface with its wall, and who gets past it",
    tiers={
        "smoke": SMOKE,
        "standard": dataclasses.replace(
            SMOKE,
            lr=(0.03, 0.1, 0.3, 1.0),
            clip=("none", "clip_by_global_norm:1.0", "clip:1.0"),
            starts=48,
        ),
    },
    facts={
        "error": "(sigmoid(x_50) - 0.7)^2, x_t = w sigmoid(x_{t-1}) + b, x_0 = 0.5",
        "data": f"starts on a grid, w in {STARTS_W}, b in {STARTS_B}",
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
