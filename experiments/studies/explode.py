"""Gradients back through time: how they explode and vanish, and what a clip leaves.

A gradient goes back through a recurrent network by one product per step,

    dC/dh_{t-1} = act'(h_t) dC/dh_t W^T,

here for a cost C of the last state alone. Where the units are linear these are products
of one matrix: after k steps the norm is about rho^k, where rho is the spectral radius
of W, and exactly so if W is rho times an orthogonal matrix. It grows until the largest
number of a dtype, or shrinks until the smallest, after

    k = floor(log(largest or smallest) / log(rho)) + 1

steps, where rho is rounded to the dtype as well: 1.1 is 1.1015625 in bfloat16. Units
that saturate have slopes act' of at most 1 (tanh) or 1/4 (sigmoid). (Hochreiter,
Untersuchungen zu dynamischen neuronalen Netzen, 1991; Bengio, Simard, Frasconi,
Learning long-term dependencies with gradient descent is difficult, 1994; Pascanu,
Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
https://arxiv.org/abs/1211.5063, section 2.)

Nothing is trained. Every unit receives normal noise of standard deviation 1 besides.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

import optaxclip
from experiments import arms, clips, models, outcomes, plots, stats
from experiments.config import (
    Config,
    check_clips,
    check_different,
    check_seeds,
    require,
)
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies import limits
from experiments.studies.study import Study

LINEAR = models.Activation(lambda x: x, jnp.ones_like)
UNITS = {"linear": LINEAR, "tanh": models.TANH, "sigmoid": models.SIGMOID}
# W is a matrix as networks start with, or one number: a unit on its own.
ONE = "one number"
KERNELS = ONE, "orthogonal", "gaussian", "sparse"
# Units that are not linear are computed in float32.
DTYPES = "float32", "bfloat16", "float16"
CHAINS = (
    *(("linear", dtype) for dtype in DTYPES),
    *((unit, "float32") for unit in ("tanh", "sigmoid")),
)
# A chain follows the law if its slope is this near to the logarithm of the radius.
TOLERANCE = 0.02
TABLE_CAPTION = (
    "By spectral radius: how much the logarithm of the norm changes per step back, "
    "fitted to the second half of the steps in range, median over seeds, -: too few; "
    "and after how many steps the norm is infinite or below the smallest normal number "
    "of the dtype, -: not before the end. Law: of the radius rounded to the dtype. "
    "Last lines: the norms of the linear float32 chains are fed to clips: the largest "
    "norm that comes out; how many that are not finite come out, of those that went "
    "in; and how many become 0."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplodeConfig(Config):
    """Gradients back through recurrent networks; nothing is trained."""

    radius: tuple[float, ...]
    """Spectral radii of the recurrent kernels."""
    clip: tuple[str, ...]
    """Clips that the norms are fed to, as in clip_by_global_norm:1.0."""
    hidden: int = 50
    """Units of the networks."""
    steps: int = 1000
    """Steps back through time."""
    seed: int = 0
    """First seed; it decides kernels, noise and costs."""
    seeds: int
    """Number of seeds."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        check_different("radius", self.radius)
        half = jnp.finfo("float16")
        least, most = float(half.tiny), float(half.max)
        for radius in self.radius:
            rule = f"in the range of float16, {least:.2g} to {most:.0f}"
            require(least <= radius <= most, "radius", rule, radius)
        check_clips(self.clip)
        require(self.hidden >= 2, "hidden", ">= 2", self.hidden)
        require(self.steps >= 10, "steps", ">= 10", self.steps)
        check_seeds(self.seed, self.seeds)


class Drawn(NamedTuple):
    """What a seed decides; K kinds of kernels, T states.

    Attributes:
      kernel_KxHxH: recurrent kernels of spectral radius 1.
      v_KxH: of norm 1; the cost is v . h_T.
      drive_TxBxH: what the units receive besides, B = 1.
    """

    kernel_KxHxH: jax.Array
    v_KxH: jax.Array
    drive_TxBxH: jax.Array


def draw(hidden: int, steps: int, seed: jax.Array) -> Drawn:
    """Draws all that is random."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shape = hidden, hidden
    one_HxH = jnp.zeros(shape).at[0, 0].set(1)
    orthogonal_HxH = nn.initializers.orthogonal()(keys[0], shape)
    gaussian_HxH = jax.random.normal(keys[1], shape)
    sparse_HxH = models.smart_tanh(keys[2], shape)
    v_H = jax.random.normal(keys[3], (hidden,))
    v_H = v_H / jnp.linalg.norm(v_H)
    return Drawn(
        jnp.stack(
            [
                one_HxH,
                orthogonal_HxH,
                gaussian_HxH / models.spectral_radius(gaussian_HxH),
                sparse_HxH / models.RADIUS,
            ]
        ),
        jnp.stack([one_HxH[0], v_H, v_H, v_H]),
        jax.random.normal(keys[4], (1 + steps, 1, hidden)),
    )


def norms_back(
    activation: models.Activation,
    kernel_HxH: jax.Array,
    v_H: jax.Array,
    drive_TxBxH: jax.Array,
) -> jax.Array:
    """Returns the norms of dC/dh_T, dC/dh_{T-1}, ..., dC/dh_1 in float32: (T,).

    Args:
      activation: what the units do.
      kernel_HxH: the recurrent kernel; all but the norms is computed in its dtype.
      v_H: the cost C is v . h_T.
      drive_TxBxH: what the units receive besides.
    """
    v_H, drive_TxBxH = (x.astype(kernel_HxH.dtype) for x in (v_H, drive_TxBxH))

    def cost(nudge_TxBxH):
        h_TxBxH = models.recur(activation, kernel_HxH, drive_TxBxH, nudge_TxBxH)
        return jnp.vdot(v_H, jnp.asarray(h_TxBxH)[-1, 0])

    d_TxBxH = jnp.asarray(jax.grad(cost)(jnp.zeros_like(drive_TxBxH)))
    return jax.vmap(optaxclip.norms.tree_norm)(d_TxBxH[::-1])


def lost(norms: np.ndarray, dtype: str) -> float:
    """Returns after how many steps a norm leaves the range of a dtype; NaN: never."""
    inside = np.isfinite(norms) & (norms >= float(jnp.finfo(dtype).tiny))
    return math.nan if inside.all() else float(np.argmin(inside))


def rounded(radius: float, dtype: str) -> float:
    """Returns a radius as a dtype has it."""
    return float(jnp.float32(radius).astype(dtype))


def lost_by_law(radius: float, dtype: str) -> float:
    """Returns after how many steps radius^k leaves the range of a dtype; NaN: never."""
    factor, info = rounded(radius, dtype), jnp.finfo(dtype)
    if factor == 1:
        return math.nan
    end = float(info.max if factor > 1 else info.tiny)
    return float(math.floor(math.log2(end) / math.log2(factor)) + 1)


def slope(norms: np.ndarray, dtype: str) -> float:
    """Fits the change of log(norm) per step, over the second half of those in range.

    By then the largest eigenvalue has the word, whatever the others did at first. NaN
    if there are fewer than two.
    """
    end = lost(norms, dtype)
    count = len(norms) if math.isnan(end) else int(end)
    steps = np.arange(count // 2, count)
    if len(steps) < 2:
        return math.nan
    return float(np.polyfit(steps, np.log(norms[steps].astype(float)), 1)[0])


def run(config: ExplodeConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Goes back through all kinds of chains, and feeds some to clips."""
    journal.expect("explode", len(CHAINS) + len(config.clip))
    seeds = config.seed + np.arange(config.seeds)
    draw_one = functools.partial(draw, config.hidden, config.steps)
    # In turn, as `train.start_all` does.
    drawn = jax.jit(functools.partial(jax.lax.map, draw_one))(seeds)
    rows: Rows = []
    curves: dict[str, np.ndarray] = {}
    for unit, dtype in CHAINS:
        began = time.perf_counter()
        found = np.asarray(_all_norms(unit, dtype, jnp.asarray(config.radius), drawn))
        each = (time.perf_counter() - began) / found[..., 0].size
        for name, norms in zip(KERNELS, np.moveaxis(found, 2, 0), strict=True):
            curves[f"{unit} {name} {dtype}"] = norms
            chain = {"unit": unit, "kernel": name, "dtype": dtype}
            rows += _chain_rows(config, chain, norms, each)
        journal.advance(1)
    came = np.stack([curves[f"linear {name} float32"][:, 0] for name in KERNELS])
    for spec in config.clip:
        began = time.perf_counter()
        kept = _fed(spec, came)
        curves[f"kept {spec}"] = kept
        seconds = (time.perf_counter() - began) / len(config.radius)
        rows += [
            {
                "experiment": "explode",
                "arm": spec,
                "radius": radius,
                "seed": config.seed,
                "updates": config.steps,
                "came": _largest(came[:, i]),
                "kept": _largest(kept[:, i]),
                "broken": int((~np.isfinite(came[:, i])).sum()),
                "broken_kept": int((~np.isfinite(kept[:, i])).sum()),
                "zeroed": int(((came[:, i] > 0) & (kept[:, i] == 0)).sum()),
                "seconds": seconds,
            }
            for i, radius in enumerate(config.radius)
        ]
        journal.advance(1)
    return rows, curves


@functools.partial(jax.jit, static_argnums=(0, 1))
def _all_norms(unit: str, dtype: str, radius_R: jax.Array, drawn: Drawn) -> jax.Array:
    """Returns norms of shape (radii, seeds, kernels, 1 + steps)."""

    def chain(radius, kernel_HxH, v_H, drive_TxBxH):
        scaled_HxH = (radius * kernel_HxH).astype(dtype)
        return norms_back(UNITS[unit], scaled_HxH, v_H, drive_TxBxH)

    over_kernels = jax.vmap(chain, (None, 0, 0, None))
    over_seeds = jax.vmap(over_kernels, (None, 0, 0, 0))
    return jax.vmap(over_seeds, (0, None, None, None))(radius_R, *drawn)


def _chain_rows(
    config: ExplodeConfig, chain: dict[str, str], norms: np.ndarray, seconds: float
) -> Rows:
    """Returns a row per radius and seed, from norms of shape (R, S, 1 + steps)."""
    dtype = chain["dtype"]
    return [
        {
            "experiment": "explode",
            "arm": f"{chain['unit']} units, {chain['kernel']}, {dtype}",
            **chain,
            "radius": radius,
            "seed": config.seed + j,
            "updates": config.steps,
            "slope": slope(norms[i, j], dtype),
            "law": math.log(rounded(radius, dtype)),
            "lost": lost(norms[i, j], dtype),
            "lost_by_law": lost_by_law(radius, dtype),
            "seconds": seconds,
        }
        for i, radius in enumerate(config.radius)
        for j in range(config.seeds)
    ]


def _fed(spec: str, norms: np.ndarray) -> np.ndarray:
    """Feeds norms, whose last axis is time, to a clip; returns those that come out."""
    feed = functools.partial(limits.feed, clips.parse(spec))
    flat = norms.reshape(-1, norms.shape[-1])
    return np.asarray(jax.jit(jax.vmap(feed))(flat).kept).reshape(norms.shape)


def _largest(norms: np.ndarray) -> float:
    return float(norms[np.isfinite(norms)].max())


def table(rows: Rows) -> Table:
    """Returns one line per kind of chain, and per clip."""
    chains = [row for row in rows if "unit" in row]
    fed = [row for row in rows if "unit" not in row]
    radii = [radius for (radius,) in outcomes.by(chains, "radius")]
    result = Table(
        *(Column(name, overflow="fold") for name in ("units", "kernel", "dtype")),
        *(Column(f"radius {radius:g}", justify="right") for radius in radii),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title="explode",
        caption=TABLE_CAPTION,
    )
    for (unit, dtype), same in outcomes.by(chains, "unit", "dtype").items():
        for (kernel,), runs in outcomes.by(same, "kernel").items():
            cells = [_cell(each) for each in outcomes.by(runs, "radius").values()]
            result.add_row(unit, kernel, dtype, *cells)
        if unit == "linear":
            laws = [_law(radius, dtype) for radius in radii]
            result.add_row(unit, "law", dtype, *laws)
        result.add_section()
    for (arm,), same in outcomes.by(fed, "arm").items():
        cells = [
            f"{row['kept']:.3g}, {row['broken_kept']}/{row['broken']}, {row['zeroed']}"
            for row in same
        ]
        result.add_row(arm, "", "float32", *cells)
    return result


def _cell(runs: Rows) -> str:
    steps = stats.spread([run["lost"] for run in runs]).median
    slopes = [run["slope"] for run in _fitted(runs)]
    slope = f"{np.median(slopes):+.4f}" if slopes else "-"
    return f"{slope}, {_steps(steps)}"


def _law(radius: float, dtype: str) -> str:
    slope = math.log(rounded(radius, dtype))
    return f"{slope:+.4f}, {_steps(lost_by_law(radius, dtype))}"


def _fitted(chains: Rows) -> Rows:
    """Returns those that are long enough in range to have a slope."""
    return [row for row in chains if not math.isnan(row["slope"])]


def _steps(steps: float) -> str:
    return f"{steps:.0f}" if math.isfinite(steps) else "-"


def verdict(rows: Rows) -> list[str]:
    """Compares linear chains with the law, others with linear ones, and clips."""
    chains = [row for row in rows if "unit" in row]
    linear = [row for row in chains if row["unit"] == "linear"]
    others = [row for row in chains if row["unit"] != "linear"]
    fed = [row for row in rows if "unit" not in row]
    lines = []
    for (dtype,), same in outcomes.by(linear, "dtype").items():
        lines.append(f"linear units, {dtype}: {_against_law(same)}")
        ones = [row for row in same if row["kernel"] == ONE]
        steps = [
            f"{_steps(row['lost'])} steps at radius {row['radius']:g} (law: "
            f"{_steps(row['lost_by_law'])})"
            for (_,), (row, *_) in outcomes.by(ones, "radius").items()
            if not math.isnan(row["lost"])
        ]
        if steps:
            lines.append(f"one number, {dtype}: out of range after {', '.join(steps)}")
    for (unit,), same in outcomes.by(others, "unit").items():
        lines.append(f"{unit} units: {_against_linear(same)}")
    for (arm,), same in outcomes.by(fed, "arm").items():
        lines.append(
            f"{arm}: of norms up to {max(row['came'] for row in same):.1e} it leaves "
            f"at most {max(row['kept'] for row in same):.3g}; of "
            f"{sum(row['broken'] for row in same)} that are not finite "
            f"{sum(row['broken_kept'] for row in same)} stay so for all to see; "
            f"{sum(row['zeroed'] for row in same)} that are not 0 become 0"
        )
    return lines


def _against_law(chains: Rows) -> str:
    """Says how many linear chains follow the law, of those that have a slope."""
    fitted, said = _fitted(chains), []
    if fitted:
        off = [abs(row["slope"] - row["law"]) for row in fitted]
        farthest = fitted[int(np.argmax(off))]
        said.append(
            f"per step the logarithm of the norm changes by log(radius), within "
            f"{TOLERANCE:g}, in {sum(x <= TOLERANCE for x in off)} of {len(fitted)} "
            f"chains; farthest off, by {max(off):.1g}: {farthest['kernel']}, radius "
            f"{farthest['radius']:g}"
        )
    if len(fitted) < len(chains):
        early = len(chains) - len(fitted)
        said.append(f"{early} of {len(chains)} left the range too early to fit")
    return "; ".join(said)


def _against_linear(chains: Rows) -> str:
    """Compares the slopes of other units with the law, or else when they end."""
    fitted, said = _fitted(chains), []
    if fitted:
        below = sum(row["slope"] < row["law"] for row in fitted)
        growing = sorted({row["radius"] for row in fitted if row["slope"] > 0})
        radii = ", ".join(f"{radius:g}" for radius in growing)
        said.append(
            "the norm falls faster, or grows more slowly, than with linear ones in "
            f"{below} of {len(fitted)} chains, and grows "
            + (f"at radius {radii}" if growing else "in none")
        )
    early = [row for row in chains if math.isnan(row["slope"])]
    if early:
        sooner = sum(not row["lost"] >= row["lost_by_law"] for row in early)
        said.append(
            f"{len(early)} of {len(chains)} left the range too early to fit, {sooner} "
            "of them sooner than linear ones do by the law"
        )
    return "; ".join(said)


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws all norms in float32, one number in all dtypes, and what clips leave."""
    return [
        _draw_norms(results, directory / "norms.png"),
        _draw_dtypes(results, directory / "dtypes.png"),
        _draw_clips(results, directory / "clips.png"),
    ]


def _draw_norms(results: Results, path: Path) -> Path:
    """Draws norms back through time: a row per kernel, a column per kind of unit."""
    config, curves = results.about["config"], results.curves
    figure = Figure(figsize=(11.0, 8.5), layout="constrained")
    axes = figure.subplots(len(KERNELS), len(UNITS), sharex=True, sharey=True)
    steps = np.arange(1 + config["steps"])
    for row, kernel in zip(axes, KERNELS):
        row[0].set_ylabel(f"{kernel}\nnorm of dC/dh")
        for axis, unit in zip(row, UNITS):
            norms = curves[f"{unit} {kernel} float32"]
            for i, radius in enumerate(config["radius"]):
                look = {"color": _colour(i, len(config["radius"]))}
                _plot(axis, norms[i], lw=0.6, alpha=0.6, **look)
                _plot(axis, norms[i][:1], label=f"radius {radius:g}", **look)
                _law_line(axis, steps, radius)
    for axis, unit in zip(axes[0], UNITS):
        axis.set_title(f"{unit} units")
    for axis in axes[-1]:
        axis.set_xlabel("steps back")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(1e-46, 1e42)
    plots.legend(figure, axes[0, 0])
    runs = (
        f"float32, {config['hidden']} units (one number: one of them alone), "
        f"{config['steps']} steps, {config['seeds']} seeds (thick: the first); "
        "dashed: radius^k"
    )
    return plots.save(figure, path, results, runs)


def _colour(place: int, count: int) -> tuple[float, ...]:
    """Returns a colour for one of several radii, from violet to red."""
    return colormaps["turbo"]((place + 0.5) / count)


def _draw_dtypes(results: Results, path: Path) -> Path:
    """Draws one number times itself in every dtype, until it is out of range."""
    config, curves = results.about["config"], results.curves
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    axes = figure.subplots(1, len(DTYPES), sharey=True)
    steps = np.arange(1 + config["steps"])
    for axis, dtype in zip(axes, DTYPES):
        norms = curves[f"linear {ONE} {dtype}"][:, 0]
        for i, radius in enumerate(config["radius"]):
            look = {"color": _colour(i, len(config["radius"]))}
            end = lost(norms[i], dtype)
            label = f"radius {radius:g}"
            inside = norms[i] if math.isnan(end) else norms[i][: int(end)]
            _plot(axis, inside[None], label=label, **look)
            _law_line(axis, steps, rounded(radius, dtype))
            if not math.isnan(end):
                axis.plot(end - 1, inside[-1], "x", **look)
                axis.annotate(
                    f"{end:.0f}",
                    (end - 1, inside[-1]),
                    xytext=(0, 8 if radius > 1 else -14),
                    textcoords="offset points",
                    ha="center",
                    fontsize="small",
                )
        info = jnp.finfo(dtype)
        for bound in (float(info.max), float(info.tiny)):
            axis.axhline(bound, color="0.6", lw=0.8)
        axis.set(title=dtype, xlabel="steps back", yscale="log", ylim=(1e-46, 1e46))
    axes[0].set_ylabel("norm of dC/dh")
    plots.legend(figure, axes[0])
    runs = (
        f"linear units, one number, {config['steps']} steps; grey: largest and "
        "smallest normal number\nx: the last step in range, and how many steps lead "
        "out of it; dashed: radius^k, of the radius rounded to the dtype"
    )
    return plots.save(figure, path, results, runs)


def _draw_clips(results: Results, path: Path) -> Path:
    """Draws norms fed to clips and what comes out, a column per radius."""
    config, curves = results.about["config"], results.curves
    columns = len(config["radius"])
    figure = Figure(figsize=(2.8 + 2.8 * columns, 3.8), layout="constrained")
    axes: Any = figure.subplots(1, columns, sharex=True, sharey=True, squeeze=False)
    came = curves["linear orthogonal float32"][:, 0]
    for i, (radius, axis) in enumerate(zip(config["radius"], axes[0])):
        _plot(axis, came[i][None], label="came", color="black", lw=2.5)
        for spec in config["clip"]:
            kept = curves[f"kept {spec}"][KERNELS.index("orthogonal"), i]
            _plot(axis, kept[None], label=spec, **plots.style(config["clip"], spec))
        broken = np.flatnonzero(~np.isfinite(came[i]))
        if broken.size:
            axis.axvspan(broken[0], config["steps"], color="0.9")
        axis.set(title=f"radius {radius:g}", xlabel="steps back", yscale="log")
    axes[0, 0].set_ylabel("norm of dC/dh")
    plots.legend(figure, axes[0, 0])
    runs = (
        f"linear units, orthogonal kernel, float32, {config['hidden']} units, "
        f"{config['steps']} steps, the first seed; grey: what comes is not finite"
    )
    return plots.save(figure, path, results, runs)


def _plot(axis: Axes, norms: np.ndarray, **look: Any) -> None:
    """Draws norms of shape (seeds, steps); what is 0 or not finite leaves a gap."""
    shown = np.where(np.isfinite(norms) & (norms > 0), norms.astype(float), np.nan)
    axis.plot(shown.T, **look)


def _law_line(axis: Axes, steps: np.ndarray, radius: float) -> None:
    """Draws radius^k as far as it is in the picture."""
    digits = steps * math.log10(radius)
    seen = steps[np.abs(digits) < 50]
    axis.plot(seen, float(radius) ** seen, color="black", ls="--", lw=0.6)


SMOKE = ExplodeConfig(
    experiment="explode",
    radius=(0.9, 1.0, 1.1, 2.0),
    clip=("clip_by_global_norm:1.0",),
    seeds=3,
)
STANDARD = dataclasses.replace(
    SMOKE, radius=(0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0), seeds=20
)
STUDY = Study(
    about="gradients back through time: growth and decay, and what a clip leaves",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(STANDARD, hidden=200, steps=2000, seeds=50),
    },
    facts=lambda config: {
        "data": "normal noise of standard deviation 1; a cost v . h_T, v of norm 1",
        "kernels": "one number, or orthogonal, normal, or sparse as in smart_tanh; all "
        "rescaled to the spectral radius",
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
