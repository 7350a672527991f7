"""What the figures of the experiments share: how they look, and what they are made of.

A clip has one colour and kind of line in all figures of a run; runs without a clip are
black. Every figure says in its caption how many runs it shows, how long they were, and
on what they were made.
"""

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments import arms, outcomes, stats
from experiments.results import Results, Rows, write

COLOURS = ("tab:red", "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")
# The next clips have the same colours and other lines.
LINES = ("-", "-.", ":", (0, (5, 1)))


def columns(config: dict[str, Any], rows: int, height: float) -> tuple[Figure, Any]:
    """Makes a figure with a column per learning rate."""
    columns = len(config["lr"])
    figure = Figure(
        figsize=(2.8 + 4.4 * columns, height * rows + 0.6), layout="constrained"
    )
    axes = figure.subplots(rows, columns, sharex="row", sharey="row", squeeze=False)
    for lr, axis in zip(config["lr"], axes[0], strict=True):
        axis.set_title(f"learning rate {lr:g}")
    return figure, axes


def style(specs: Sequence[str], spec: str) -> dict[str, Any]:
    """Returns how the lines of one of several clips look."""
    if spec == "none":
        return {"color": "black", "ls": "-"}
    place = [other for other in specs if other != "none"].index(spec)
    line, colour = divmod(place, len(COLOURS))
    return {"color": COLOURS[colour], "ls": LINES[line % len(LINES)]}


def median_and_seeds(
    axis: Axes, updates: np.ndarray, curves: np.ndarray, style: dict[str, Any]
) -> None:
    """Draws curves of shape (seeds, points)."""
    axis.plot(updates, curves.T, color=style["color"], lw=0.5, alpha=0.4)
    worst = np.where(np.isnan(curves), np.inf, curves)
    axis.plot(updates, np.median(worst, axis=0), lw=1.8, **style)


class Panel(NamedTuple):
    """A quantity over updates.

    Attributes:
      name: of the curves; those of the tests have one point more, before training.
      label: of the axis.
      scale: of the axis, linear or log.
      baselines: what is reached without training, by name.
    """

    name: str
    label: str
    scale: str = "linear"
    baselines: Sequence[tuple[str, float]] = ()


def training(
    results: Results, path: Path, panels: Sequence[Panel], caption: str
) -> Path:
    """Draws quantities over updates: a row for each, and a column per learning rate.

    Args:
      results: whose curves have shape (arms, seeds, points), and which hold the
        number of updates at each point as `judged`.
      path: the file.
      panels: the quantities.
      caption: what was run.
    """
    config, curves = results.about["config"], results.curves
    figure, axes = columns(config, rows=len(panels), height=2.7)
    for i, arm in enumerate(arms.grid(config["lr"], config["clip"])):
        look = {**style(config["clip"], arm.clip.spec), "label": arm.clip.spec}
        for axis, panel in zip(axes[:, config["lr"].index(arm.lr)], panels):
            shown = curves[panel.name][i]
            median_and_seeds(axis, curves["judged"][-shown.shape[-1] :], shown, look)
    for row, panel in zip(axes, panels, strict=True):
        row[0].set_ylabel(panel.label)
        row[0].set_yscale(panel.scale)
        for axis in row:
            baselines(axis, panel.baselines)
    for axis in axes[-1]:
        axis.set_xlabel("updates")
    legend(figure, axes[0, 0])
    runs = f"{config['seeds']} seeds (thin; thick: median), "
    return save(figure, path, results, f"{runs}{config['updates']} updates {caption}")


def baselines(axis: Axes, values: Sequence[tuple[str, float]]) -> None:
    """Draws what is reached without training: lines with their names."""
    for name, value in values:
        axis.axhline(value, color="0.4", ls=":", lw=1, zorder=1)
        place = {"xycoords": axis.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        axis.annotate(name, (0.99, value), color="0.3", fontsize="x-small", **place)


def legend(figure: Figure, axis: Axes, title: str | None = None) -> None:
    """Puts the legend of an axis beside the figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", fontsize="small", title=title
    )


def heatmap(
    axis: Axes,
    values: np.ndarray,
    names: tuple[Sequence[str], Sequence[str]],
    texts: Sequence[Sequence[str]],
    hatched: np.ndarray | None = None,
    **colours: Any,
) -> Any:
    """Draws numbers as a table with colours.

    Args:
      axis: where.
      values: what decides the colours, of shape (rows, columns).
      names: of the rows, from below, and of the columns.
      texts: what is written into the cells.
      hatched: which cells are hatched, of the shape of the values.
      **colours: for `pcolormesh`: cmap, norm, vmin, vmax.

    Returns:
      What a colour bar can be made from.
    """
    rows, columns = values.shape
    x, y = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = axis.pcolormesh(x, y, values, edgecolors="white", **colours)
    for i, j in itertools.product(range(rows), range(columns)):
        red, green, blue, _ = mesh.cmap(mesh.norm(values[i, j]))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        place: Any = {"ha": "center", "va": "center", "fontsize": "small"}
        axis.text(j, i, texts[i][j], color="white" if dark else "black", **place)
        if hatched is not None and hatched[i, j]:
            look = {"fill": False, "hatch": "///", "ec": "0.6", "lw": 0}
            axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **look))
    axis.set_yticks(range(rows), names[0])
    axis.set_xticks(range(columns), names[1])
    return mesh


def arms_map(
    axis: Axes,
    runs: Rows,
    value: Callable[[Rows], float],
    spec: str,
    hatched: str = "diverged",
    **colours: Any,
) -> Any:
    """Draws a quantity of every arm: a row per clip, a column per learning rate.

    Args:
      axis: where.
      runs: rows of all arms.
      value: the quantity, of the rows of an arm.
      spec: how it is written.
      hatched: name in the rows of what half the runs, or more, are in hatched cells.
      **colours: for `pcolormesh`: cmap, norm, vmin, vmax.

    Returns:
      What a colour bar can be made from.
    """
    found = outcomes.by(runs, "arm", "lr")
    names = list(dict.fromkeys(arm for arm, _ in found))[::-1]
    lrs = list(dict.fromkeys(lr for _, lr in found))
    cells = [[found[name, lr] for lr in lrs] for name in names]
    values = np.array([[value(cell) for cell in line] for line in cells])
    marked = [
        [2 * sum(run[hatched] for run in cell) >= len(cell) for cell in line]
        for line in cells
    ]
    axis.set_xlabel("learning rate")
    return heatmap(
        axis,
        np.minimum(values, np.finfo(np.float32).max),
        (names, [f"{lr:g}" for lr in lrs]),
        [[format(number, spec) for number in line] for line in values],
        np.array(marked),
        **colours,
    )


def shares(
    axis: Axes, x: Sequence[float], successes: Sequence[int], runs: int, **look: Any
) -> None:
    """Draws shares of runs that succeeded, with Wilson's 95 % intervals."""
    share = np.array(successes) / runs
    ends = np.array([stats.wilson(k, runs) for k in successes]).T
    bars = np.abs(ends - share)
    axis.errorbar(x, share, yerr=bars, marker="o", capsize=4, **look)
    axis.set_ylim(-0.03, 1.03)


def save(figure: Figure, path: Path, results: Results, runs: str) -> Path:
    """Adds the title and what was run, where, and writes the file."""
    about = results.about
    commit = f", commit {about['commit']}" if about["commit"] else ""
    figure.suptitle(about["config"]["experiment"])
    caption = f"{runs}\n{about['device']}, jax {about['versions']['jax']}{commit}"
    figure.supxlabel(caption, fontsize="small")
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=150)
        write(path, buffer.getvalue())
    return path
