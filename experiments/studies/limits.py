"""Limits that are learned, side by side: one sequence of norms through many clips.

Nothing is trained. Norms like those of gradients, lognormal around a level that slowly
falls, are fed to every clip: calmly at first, then with the four things that happen in
training.

| event | what happens |
|---|---|
| spike | one norm is 50 times as large |
| burst | five norms in a row are 10 times as large |
| NaN | one update is not a number |
| rise | from there on all norms are 3 times as large |

A good limit is hardly moved by the first three and follows the last. Each clip is also
fed the calm norms, the same without any event: how far a limit has been moved is how
far it is from the limit there. An update is an array of one number, so the scope of a
clip makes no difference.

One sequence is one sequence, and in one point it matters which: the rise is by about
10 deviations of the norms, and `zclip` did not follow within its 120 updates for 85 of
the seeds 0 to 99. By about 7, with a DEVIATION of 0.3, it followed after 33 to 62 for
all of the seeds 0 to 11.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

import optaxclip
from experiments import arms, clips, plots
from experiments.config import Config, check_clips, check_seeds, require
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies.study import Study

# Of the logarithm of the calm norms: its standard deviation, and how far its mean falls
# from the first update to the last, from above 0 to below.
DEVIATION, FALL = 0.2, 0.5
# Where the events begin, as shares of the updates, and how large they are.
STARTS = 0.3, 0.45, 0.6, 0.7
SPIKE, BURST, RISE = 50.0, 10.0, 3.0
BURST_UPDATES = 5
# A limit is back when it is within this share of the limit of the calm norms, and has
# followed the rise when it is half way up, so many times that limit.
NEAR, FOLLOWED = 0.1, (1 + RISE) / 2
# Of the palette of Okabe and Ito, for all kinds of colour vision.
LIMIT, CLIPPED, EVENT = "#0072B2", "#D55E00", "#F0E44280"
NORM, LASTING = "0.7", "0.94"
# Panels side by side in a figure that has a panel per clip.
PANELS = 4
TABLE_CAPTION = (
    "Clipped: share of the updates before the spike. Spike: what becomes of it, in "
    "medians of the norms before. Back: updates after the spike and after the burst "
    f"until the limit is within {NEAR:.0%} of what it is without the four events. "
    f"Follows: updates of the rise until it is {FOLLOWED:g} times that. -: not before "
    "the next event or the end, or raised so before the rise. State: numbers "
    "remembered per norm. Warm-up: updates without a limit."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitsConfig(Config):
    """Norms that are fed to clips, whose limits are compared; nothing is trained."""

    clip: tuple[str, ...]
    """Clips: none, NAME or NAME:ARGUMENTS, as in autoclip:10,window=500."""
    seed: int = 0
    """Seed of the norms; every clip sees the same ones."""
    updates: int = 400
    """Number of norms; what happens to them happens at fixed shares of it."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        check_clips(self.clip)
        check_seeds(self.seed)
        require(self.updates >= 100, "updates", ">= 100", self.updates)


class Events(NamedTuple):
    """When something happens: which updates."""

    spike: slice
    burst: slice
    nan: slice
    rise: slice


class Trace(NamedTuple):
    """What a clip did, of shape (updates,) for one sequence of norms.

    Attributes:
      limit: the largest norm it allowed; inf if it had no limit.
      kept: the norm that came out.
      clipped: whether that was smaller.
    """

    limit: Any
    kept: Any
    clipped: Any


def events(updates: int) -> Events:
    """Places the events in a sequence."""
    spike, burst, nan, rise = (round(updates * share) for share in STARTS)
    return Events(
        spike=slice(spike, spike + 1),
        burst=slice(burst, burst + BURST_UPDATES),
        nan=slice(nan, nan + 1),
        rise=slice(rise, updates),
    )


def norms(key: jax.Array, updates: int) -> tuple[jax.Array, jax.Array]:
    """Returns norms with all events, and the calm ones, each of shape (updates,)."""
    level = FALL * (0.5 - jnp.linspace(0, 1, updates))
    calm = jnp.exp(level + DEVIATION * jax.random.normal(key, (updates,)))
    when = events(updates)
    factor = jnp.ones(updates).at[when.spike].set(SPIKE).at[when.burst].set(BURST)
    factor = factor.at[when.nan].set(jnp.nan).at[when.rise].set(RISE)
    return factor * calm, calm


def feed(clip: clips.Clip, norms: jax.Array) -> Trace:
    """Gives updates of these norms to a clip, one after another."""
    transformation = clip.make(clip.threshold)
    params = jnp.ones(1)

    def update(state, norm):
        updates, state = transformation.update(norm[None], state, params)
        (record,) = optaxclip.records(state)
        limit = jnp.reshape(record.limit, ())  # of the one leaf that there is
        kept = optaxclip.norms.tree_norm(updates)
        return state, Trace(limit, kept, record.clipped > 0)

    return jax.lax.scan(update, transformation.init(params), norms)[1]


def run(config: LimitsConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Feeds the norms to every clip."""
    journal.expect("limits", len(config.clip))
    both = jnp.stack(norms(jax.random.key(config.seed), config.updates))
    traces, rows = [], []
    for clip in map(clips.parse, config.clip):
        began = time.perf_counter()
        program = jax.jit(jax.vmap(functools.partial(feed, clip)))
        traces.append(jax.device_get(program(both)))
        rows.append(
            {
                "experiment": "limits",
                "arm": clip.spec,
                "seed": config.seed,
                "updates": config.updates,
                **_metrics(np.asarray(both[0]), traces[-1]),
                "state": _numbers_of_state(clip),
                "seconds": time.perf_counter() - began,
            }
        )
        journal.advance(1)
    found = jax.tree.map(lambda *curves: np.stack(curves), *traces)
    curves = {
        "norm": np.asarray(both[0]),
        "limit": found.limit[:, 0],
        "calm_limit": found.limit[:, 1],
        "kept": found.kept[:, 0],
        "clipped": found.clipped[:, 0],
    }
    for name, when in events(config.updates)._asdict().items():
        curves[name] = np.array([when.start, when.stop - 1])
    return rows, curves


def table(rows: Rows) -> Table:
    """Returns one line per clip."""
    result = Table(
        Column("clip", overflow="fold"),
        *(
            Column(name, justify="right")
            for name in (
                "clipped",
                "spike",
                "back: spike",
                "burst",
                "follows",
                "state",
                "warm-up",
            )
        ),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title="limits",
        caption=TABLE_CAPTION,
    )
    for row in rows:
        result.add_row(
            row["arm"],
            f"{row['clipped']:.1%}",
            f"{row['spike_kept']:.3g}",
            *(_count(row[name]) for name in ("back_spike", "back_burst", "follows")),
            str(row["state"]),
            str(row["warmup"]),
        )
    return result


def verdict(rows: Rows) -> list[str]:
    """Says what the clips leave of the spike, and how many follow the rise."""
    most = max(rows, key=lambda row: row["spike_kept"])
    least = min(rows, key=lambda row: row["spike_kept"])
    lines = [
        f"of the spike, x {SPIKE:g}, {least['arm']} leaves {least['spike_kept']:.2f} "
        f"medians, {most['arm']} {most['spike_kept']:.2f}"
    ]
    following = [row for row in rows if not math.isnan(row["follows"])]
    if following:
        first = min(following, key=lambda row: row["follows"])
        lines.append(
            f"the rise, x {RISE:g}, is followed by {len(following)} of {len(rows)} "
            f"limits, first by {first['arm']} after {_count(first['follows'])} updates"
        )
    return lines


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws the limit of every clip over the norms."""
    return [_draw(results, directory / "limits.png")]


def _draw(results: Results, path: Path) -> Path:
    """Draws the limit of every clip over the norms it was given, a panel per clip."""
    curves, rows = results.curves, results.rows
    figure, axes = _panels(len(rows))
    for i, axis in enumerate(axes):
        _mark_events(axis, results)
        _limit(axis, curves["norm"], curves["limit"][i], curves["clipped"][i])
        name, _, arguments = rows[i]["arm"].partition(":")
        axis.set_title(f"{name}\n{arguments.replace(',', ', ')}", fontsize="medium")
        place = {"transform": axis.transAxes, "ha": "right", "fontsize": "small"}
        axis.text(0.98, 0.03, _what_happened(rows[i]), **place)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, markerscale=3)
    return plots.save(
        figure,
        path,
        results,
        f"the same {len(curves['norm'])} norms for every clip, "
        f"{results.about['data']}\nmedian: of the norms before the spike; followed: "
        f"{results.about['followed']}; no line: no limit yet",
    )


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Makes a figure of panels with shared axes."""
    columns = min(count, PANELS)
    rows = -(-count // columns)
    figure = Figure(figsize=(11, 2.4 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes[0, 0].set_yscale("log")
    axes[0, 0].margins(y=0.15)
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    for axis in axes[:, 0]:
        axis.set_ylabel("norm")
    for place, axis in enumerate(axes.flat):
        if place >= count:
            axis.set_axis_off()
        elif place + columns >= count:
            axis.set_xlabel("updates")
            axis.xaxis.set_tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


def _mark_events(axis: Axes, results: Results) -> None:
    """Shades when something happens to the norms, and says what."""
    width = len(results.curves["norm"]) / 160
    axis.set_xlim(-width, len(results.curves["norm"]) - 1 + width)
    for name in ("spike", "burst", "nan", "rise"):
        first, last = results.curves[name]
        colour = LASTING if name == "rise" else EVENT
        axis.axvspan(first - width, last + width, color=colour, lw=0)
        axis.text(
            (first + last) / 2,
            0.97,
            results.about[name].replace(" at ", " at\n"),
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize="small",
        )


def _limit(
    axis: Axes, norm: np.ndarray, limit: np.ndarray, clipped: np.ndarray
) -> None:
    """Draws a limit over norms, all of shape (updates,)."""
    axis.plot(norm, color=NORM, lw=0.7, label="norm")
    dots = {"color": CLIPPED, "ls": "", "marker": ".", "ms": 2.5}
    axis.plot(np.where(clipped, norm, np.nan), label="norm, clipped", **dots)
    axis.plot(limit, color=LIMIT, lw=1.6, label="limit")


def _what_happened(row: dict[str, Any]) -> str:
    """Says what became of the spike and of the rise."""
    follows = row["follows"]
    rise = "not followed" if np.isnan(follows) else f"followed after {follows:.0f}"
    return f"spike becomes {row['spike_kept']:.2f} medians\nrise {rise}"


def _metrics(norm: np.ndarray, trace: Trace) -> dict[str, float]:
    """Sums up what a clip did with the norms, first, and with the calm ones.

    A number of updates is NaN if that did not happen before the next event, nor is the
    rise followed by a limit that an event before had raised as much.
    """
    when = events(len(norm))
    before = slice(0, when.spike.start)
    limit, calm = np.asarray(trace.limit, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = np.where(limit == calm, 1, limit / calm)
    back, raised = np.abs(moved - 1) <= NEAR, moved >= FOLLOWED
    already = raised[when.rise.start - 1]
    (spike,) = trace.kept[0, when.spike]
    return {
        "clipped": float(trace.clipped[0, before].mean()),
        "spike_kept": float(spike / np.median(norm[before])),
        "back_spike": _first(back[when.spike.stop : when.burst.start]),
        "back_burst": _first(back[when.burst.stop : when.nan.start]),
        "follows": math.nan if already else _first(raised[when.rise]),
        "warmup": int(np.isinf(limit).sum()),
    }


def _first(happened: np.ndarray) -> float:
    return float(np.argmax(happened)) if happened.any() else math.nan


def _count(updates: float) -> str:
    return "-" if math.isnan(updates) else f"{updates:.0f}"


def _numbers_of_state(clip: clips.Clip) -> int:
    """Returns how many numbers a clip remembers of a magnitude, its record aside."""
    state = clip.make(clip.threshold).init(jnp.ones(1))
    (record,) = optaxclip.records(state)
    return sum(leaf.size for leaf in jax.tree.leaves(record.bound))


SMOKE = LimitsConfig(
    experiment="limits",
    clip=(
        "clip_by_global_norm:max_norm=2",
        "mean_clip:ratio=3",
        "ema_clip:ratio=1.5,decay=0.95",
        "zclip:z=2.5,warmup=25,max_norm=inf",
        "autoclip:percentile=10,window=100",
        "percentile_clip:percentile=95,window=128",
        "median_mad:k=3,window=100,warmup=25",
        "quantile_clip:quantile=0.5,rate=0.2",
    ),
)
STANDARD = dataclasses.replace(
    SMOKE,
    clip=tuple(spec.replace("window=100", "window=1000") for spec in SMOKE.clip),
    updates=4000,
)
STUDY = Study(
    about="learned limits: what spikes, NaN and a lasting rise of the norms do to them",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(STANDARD, updates=40_000),
    },
    facts=lambda config: {
        "data": f"lognormal, standard deviation {DEVIATION:g} of the logarithm, whose "
        f"mean falls by {FALL:g}",
        "spike": f"x {SPIKE:g}",
        "burst": f"{BURST_UPDATES} at x {BURST:g}",
        "nan": "NaN",
        "rise": f"all x {RISE:g}",
        "followed": f"the limit is {FOLLOWED:g} times what it is without these events",
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
