"""The figures, drawn from stored results.

A clip has one colour and kind of line in all figures of a run; runs without a clip are
black.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments import arms
from experiments.results import Results

COLOURS = ("tab:red", "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")
# The next clips have the same colours and other lines.
LINES = ("-", "-.", ":", (0, (5, 1)))
# Of the palette of Okabe and Ito, for all kinds of colour vision.
LIMIT, CLIPPED, EVENT = "#0072B2", "#D55E00", "#F0E44280"
NORM, LASTING = "0.7", "0.94"
# Panels side by side in a figure that has a panel per clip.
PANELS = 4
# Losses and norms are shown in this many windows of updates.
WINDOWS = 100


def training(results: Results, path: Path) -> Path:
    """Draws loss, accuracy and gradient norm over updates, a column per rate."""
    config, curves = results.about["config"], results.curves
    figure, axes = _grid_of_axes(config, rows=3, height=2.7)
    ends, loss = _windows(curves["loss"], np.mean)
    _, norm = _windows(curves["grad_norm"], np.max)
    for i, arm in enumerate(arms.grid(config["lr"], config["clip"])):
        column = axes[:, config["lr"].index(arm.lr)]
        style = {**_style(config, arm), "label": arm.clip.spec}
        _median_and_seeds(column[0], ends, loss[i], style)
        _median_and_seeds(
            column[1], curves["judged"], curves["test_accuracy"][i], style
        )
        _median_and_seeds(column[2], ends, norm[i], style)
        if arm.clip.name == "clip_by_global_norm" and arm.clip.spec != "none":
            column[2].axhline(arm.clip.threshold, color=style["color"], ls="--", lw=1)
    for column in axes.T:
        column[0].set_yscale("log")
        column[1].set_ylim(0, 1)
        column[2].set(yscale="log", xlabel="updates")
    axes[0, 0].set_ylabel("training loss [nats]\nmean of each window")
    axes[1, 0].set_ylabel("accuracy on test images")
    axes[2, 0].set_ylabel("gradient norm before the clip\nlargest of each window")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return _save(
        figure,
        path,
        results,
        f"{config['cell']} with {config['hidden']} units, {config['optimizer']}, "
        f"{config['seeds']} seeds (thin; thick: median), {config['updates']} updates "
        f"of {config['batch']} images, {len(ends)} windows; dashed: limit of the norm",
    )


def cliff_paths(results: Results, path: Path) -> Path:
    """Draws the paths of all clips from one start, and the error along them."""
    config, curves = results.about["config"], results.curves
    figure, axes = _grid_of_axes(config, rows=2, height=3.8)
    window = curves["surface_w"], curves["surface_b"]
    meshes = [_errors(axis, *window, curves["surface"]) for axis in axes[0]]
    for i, arm in enumerate(arms.grid(config["lr"], config["clip"])):
        surface, error = axes[:, config["lr"].index(arm.lr)]
        w, b = curves["path_w"][i], curves["path_b"][i]
        # Paths coincide at first: the one without a clip lies below, and is thick.
        width = 2.5 if arm.clip.spec == "none" else 0.7
        style = {**_style(config, arm), "lw": width, "zorder": 4 - width}
        label = f"{arm.clip.spec}, to ({w[-1]:.3g}, {b[-1]:.3g})"
        surface.plot(w, b, label=label, **style)
        error.plot(curves["path_error"][i], **style)
    for surface, error in axes.T:
        surface.plot(curves["path_w"][0, 0], curves["path_b"][0, 0], "ko", mfc="white")
        surface.set(xlabel="w", xlim=window[0][[0, -1]], ylim=window[1][[0, -1]])
        surface.legend(loc="lower left", fontsize="x-small")
        error.set(yscale="log", xlabel="updates")
    axes[0, 0].set_ylabel("b")
    axes[1, 0].set_ylabel("error E along the path")
    figure.colorbar(meshes[0], ax=axes[0], label="error E(w, b)", extend="min")
    runs = f"{config['updates']} updates from the circle; paths may leave the window"
    return _save(figure, path, results, runs)


def cliff_starts(results: Results, path: Path) -> Path:
    """Draws the final error of every start: a row per clip, a column per rate."""
    config, curves = results.about["config"], results.curves
    figure, axes = _grid_of_axes(config, rows=len(config["clip"]), height=3.0)
    meshes = []
    for i, arm in enumerate(arms.grid(config["lr"], config["clip"])):
        axis = axes[config["clip"].index(arm.clip.spec), config["lr"].index(arm.lr)]
        place = curves["starts_w"], curves["starts_b"]
        meshes.append(_errors(axis, *place, curves["error"][i]))
        share = f"{results.rows[i]['reached']:.1%} reach the target"
        axis.set_title(f"{arm.clip.spec}, lr {arm.lr:g}: {share}", fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("w at the start")
    for axis in axes[:, 0]:
        axis.set_ylabel("b at the start")
    figure.colorbar(meshes[0], ax=axes, label="error E at the end", extend="min")
    runs = (
        f"{config['starts']} x {config['starts']} starts, {config['updates']} updates"
    )
    return _save(figure, path, results, f"{runs}; darkest: the target is reached")


def limits(results: Results, path: Path) -> Path:
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
    return _save(
        figure,
        path,
        results,
        f"the same {len(curves['norm'])} norms for every clip, "
        f"{results.about['data']}\nmedian: of the norms before the spike; followed: "
        f"{results.about['followed']}; no line: no limit yet",
    )


def meshes(results: Results, path: Path) -> Path:
    """Draws losses and differences of parameters on all meshes, a column per arm."""
    config, curves = results.about["config"], results.curves
    grid = arms.grid(config["lr"], config["clip"])
    figure = Figure(figsize=(2.8 + 4.0 * len(grid), 6.0), layout="constrained")
    axes = figure.subplots(2, len(grid), sharex=True, sharey="row", squeeze=False)
    names = list(dict.fromkeys(row["mesh"] for row in results.rows))
    for i, (arm, (loss, apart)) in enumerate(zip(grid, axes.T, strict=True)):
        loss.set_title(f"{arm.clip.spec}, lr {arm.lr:g}", fontsize="medium")
        for j, name in enumerate(names):
            # All lines coincide: those below are thicker.
            width = 1.0 + 1.5 * (len(names) - 1 - j)
            style = {"color": COLOURS[j % len(COLOURS)], "label": name}
            loss.plot(curves["loss"][i, j], lw=width, **style)
            apart.plot(curves["judged"], curves["difference"][i, j], "o-", **style)
        loss.set_yscale("log")
        apart.set_yscale("symlog", linthresh=1e-7)
        apart.set(xlabel="updates")
    axes[0, 0].set_ylabel("training loss [nats]")
    axes[1, 0].set_ylabel("largest difference of a parameter\nfrom that on one device")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="mesh")
    return _save(
        figure,
        path,
        results,
        f"LSTM with {config['hidden']} units, adam, {config['updates']} updates of "
        f"{config['batch']} images; mesh: {results.about['mesh']}",
    )


def _grid_of_axes(
    config: dict[str, Any], rows: int, height: float
) -> tuple[Figure, Any]:
    """Makes a figure with a column per learning rate."""
    columns = len(config["lr"])
    figure = Figure(
        figsize=(2.8 + 4.4 * columns, height * rows + 0.6), layout="constrained"
    )
    axes = figure.subplots(rows, columns, sharex="row", sharey="row", squeeze=False)
    for lr, axis in zip(config["lr"], axes[0], strict=True):
        axis.set_title(f"learning rate {lr:g}")
    return figure, axes


def _style(config: dict[str, Any], arm: arms.Arm) -> dict[str, Any]:
    if arm.clip.spec == "none":
        return {"color": "black", "ls": "-"}
    place = [clip for clip in config["clip"] if clip != "none"].index(arm.clip.spec)
    line, colour = divmod(place, len(COLOURS))
    return {"color": COLOURS[colour], "ls": LINES[line % len(LINES)]}


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


def _windows(
    curve: np.ndarray, reduce: Callable[..., np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Reduces (..., updates) to (..., windows); also returns where each window ends."""
    parts = np.array_split(curve, min(WINDOWS, curve.shape[-1]), axis=-1)
    ends = np.cumsum([part.shape[-1] for part in parts])
    return ends, np.stack([reduce(part, axis=-1) for part in parts], axis=-1)


def _median_and_seeds(
    axis: Axes, updates: np.ndarray, curves: np.ndarray, style: dict[str, Any]
) -> None:
    """Draws curves of shape (seeds, points)."""
    axis.plot(updates, curves.T, color=style["color"], lw=0.5, alpha=0.4)
    worst = np.where(np.isnan(curves), np.inf, curves)
    axis.plot(updates, np.median(worst, axis=0), lw=1.8, **style)


def _errors(axis: Axes, w: np.ndarray, b: np.ndarray, error: np.ndarray) -> Any:
    """Draws errors of shape (b, w), all on one scale: darkest is below 0.001."""
    norm = LogNorm(1e-3, 0.5, clip=True)
    return axis.pcolormesh(w, b, error, norm=norm, cmap="viridis", shading="nearest")


def _save(figure: Figure, path: Path, results: Results, runs: str) -> Path:
    """Adds the title and what was run, where, and writes the file."""
    about = results.about
    commit = f", commit {about['commit']}" if about["commit"] else ""
    figure.suptitle(about["config"]["experiment"])
    caption = f"{runs}\n{about['device']}, jax {about['versions']['jax']}{commit}"
    figure.supxlabel(caption, fontsize="small")
    figure.savefig(path, dpi=150)
    return path
