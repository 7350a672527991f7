"""Plain recurrent networks on generated sequences: `temporal_order`, `pathological`.

A run has *solved* its task once fewer than 1 % of 1,000 fresh sequences are answered
wrongly. As it may leave the solution again, it is judged on 10,000 at the end: it has
*kept* the solution if fewer than 1 % are wrong, and is *perfect* if none is. Every clip
is run at every learning rate, on the same seeds and sequences. Clips are compared each
at its own best rate, chosen on the first seeds; what it gives is read off the others.
As all runs of a seed begin alike and see the same sequences, they are compared seed by
seed, by McNemar's test. The runs without a clip get one more chance: at low learning
rates, and with four times the updates.

The protocol is that of Pascanu, Mikolov, Bengio, On the difficulty of training
recurrent neural networks, 2013, https://arxiv.org/abs/1211.5063: 50 units, plain SGD, a
fresh batch of 20 sequences per update. `alpha` adds their regulariser Omega, which
makes SGD with a clip what they call SGD-CR; as there, no run has Omega but no clip.
What differs:

- Lengths are shorter and learning rates higher in the small sizes: runs are short.
- A range of lengths has its longest, which theirs leaves out.
- Checks on the way are on 1,000 sequences, not 10,000. Runs go on after they solved it;
  the published program stops when none of 10,000 is wrong.
- Initial values are basic_tanh, and only in the full size of `pathological`
  smart_tanh.
- Their rule for a gradient that is not finite (shrink the recurrent kernel a little) is
  not used.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

from experiments import arms, models, outcomes, plots, stats, train
from experiments.arms import Arm
from experiments.config import (
    TrainingConfig,
    check_counts,
    check_different,
    check_lrs,
    require,
)
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies.study import Study
from experiments.tasks import sequences

SOLVED = 0.01
# Sequences on which runs are judged on the way, and at the end.
FRESH, FINAL = 1_000, 10_000
# Times the updates that runs without a clip get in the control.
PATIENCE = 4
# Two clips differ if McNemar's test gives less.
CHANCE = 0.05
# Curves that are stored and drawn, with the label of their axis.
DYNAMICS = {
    "grad_norm_max": "largest norm\nof the gradient",
    "spectral_radius": "spectral radius",
}
# Panels side by side in the map.
PANELS = 3
TABLE_CAPTION = (
    f"Solved: fewer than {SOLVED:.0%} of {FRESH:,} fresh sequences wrong at some "
    f"check, with Wilson's 95 % interval; kept: of {FINAL:,} at the end; perfect: no "
    "answer wrong then. After: updates until solved, median of the runs that did. "
    "Clipped: share of the updates. Norm: of the gradient before the clip, median over "
    "updates and seeds; largest: of all."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolvingConfig(TrainingConfig):
    """Training of a plain recurrent network on generated sequences."""

    task: tuple[str, ...]
    """Tasks: torder, torder3, add, mul, perm or mem."""
    length: tuple[int, ...]
    """Lengths of the sequences; each is an experiment of its own."""
    longest: int | None = None
    """Draw the length of each batch from LENGTH to this. Default: LENGTH alone."""
    initial: str = "basic_tanh"
    """Initial values: basic_tanh, smart_tanh, sigmoid or flax."""
    hidden: int = 50
    """Units of the network."""
    alpha: tuple[float, ...] = (0.0,)
    """Weights of the regulariser Omega, for all clips but none; 0: without it."""
    control: tuple[float, ...] = ()
    """Learning rates at which runs without a clip get four times the updates."""
    control_length: tuple[int, ...] = ()
    """Lengths of these runs; to be given with CONTROL, and only then."""
    checks: int = 40
    """How often a run is judged."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        super().__post_init__()
        for task in self.task:
            known = ", ".join(sequences.TASKS)
            require(task in sequences.TASKS, "task", f"of {known}", task)
        for name in ("task", "length", "alpha"):
            check_different(name, getattr(self, name))
        lengths = *self.length, *self.control_length
        if self.longest is not None:
            rule = f"> {max(lengths)} (length)"
            require(self.longest > max(lengths), "longest", rule, self.longest)
        for task, length in itertools.product(self.task, lengths):
            sequences.check_length(task, length)
        known = ", ".join(models.INITS)
        require(self.initial in models.INITS, "initial", f"of {known}", self.initial)
        for alpha in self.alpha:
            require(0 <= alpha < np.inf, "alpha", "finite and >= 0", alpha)
            clipped = alpha == 0 or set(self.clip) != {"none"}
            require(clipped, "alpha", "0 without a clip", alpha)
        check_counts(hidden=self.hidden, checks=self.checks)
        both = bool(self.control) == bool(self.control_length)
        rule = "given with control, and only then"
        require(both, "control_length", rule, self.control_length)
        if self.control:
            check_lrs(self.control)
            check_different("control_length", self.control_length)


class Stage(NamedTuple):
    """What is trained side by side: a task at a length.

    Attributes:
      task: a key of `sequences.TASKS`.
      length: the only length of its sequences, or the shortest.
      alpha: weight of Omega.
      control: whether runs without a clip get another chance.
    """

    task: str
    length: int
    alpha: float
    control: bool

    @property
    def part(self) -> str:
        """A name of its own."""
        control = " control" if self.control else ""
        return f"{self.task} {self.length} {self.alpha:g}{control}"

    def grid(self, config: SolvingConfig) -> list[Arm]:
        """Returns the arms."""
        if self.control:
            return arms.grid(config.control, ("none",))
        specs = [spec for spec in config.clip if not (self.alpha and spec == "none")]
        return arms.grid(config.lr, specs)

    def pieces(self, config: SolvingConfig) -> list[int]:
        """Returns the numbers of updates after each of which runs are judged."""
        pieces = train.chunks(config.updates, config.checks)
        return pieces * PATIENCE if self.control else pieces


def study(
    about: str,
    table: Callable[[Rows], Table],
    smoke: SolvingConfig,
    standard: SolvingConfig,
    full: SolvingConfig,
) -> Study:
    """Makes a study of its configs, with what is printed."""
    return Study(
        about=about,
        tiers={"smoke": smoke, "standard": standard, "full": full},
        facts=lambda config: {
            "data": "generated while training, "
            f"{', '.join(config.task)} as in tasks/sequences.py",
            "initial_values": models.INITS[config.initial],
            "solved": f"< {SOLVED:.0%} of {FRESH:,} sequences; at the end of {FINAL:,}",
        },
        run=run,
        table=table,
        verdict=verdict,
        figures=figures,
    )


def stages(config: SolvingConfig) -> list[Stage]:
    """Returns all stages of a run, those of the control last."""
    compared = itertools.product(config.task, config.length, config.alpha, (False,))
    control = itertools.product(config.task, config.control_length, (0.0,), (True,))
    return [Stage(*stage) for stage in (*compared, *control)]


def run(config: SolvingConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Trains all arms on all seeds, stage after stage."""
    todo = stages(config)
    updates = [
        sum(stage.pieces(config)) * len(arms.by_kind(stage.grid(config)))
        for stage in todo
    ]
    journal.expect(config.experiment, sum(updates))
    rows: Rows = []
    curves: dict[str, np.ndarray] = {}
    for stage in todo:
        found, shown = _train(config, stage, journal)
        rows += found
        curves |= {f"{stage.part} {name}": curve for name, curve in shown.items()}
    return rows, curves


def _train(
    config: SolvingConfig, stage: Stage, journal: Journal
) -> tuple[Rows, arms.Curves]:
    """Trains the arms of a stage, and says which runs solved its task and when."""
    lengths = stage.length, (config.longest or stage.length) + 1
    task = sequences.make(stage.task, lengths, FRESH)
    final = sequences.make(stage.task, lengths, FINAL)
    model = models.Recurrent(
        "rnn", config.hidden, task.outputs, config.initial, config.check
    )
    setup = train.Setup(model, "sgd", config.batch, config.check, stage.alpha)
    seeds = config.seed + np.arange(config.seeds)
    grid, pieces = stage.grid(config), stage.pieces(config)
    curves = train.compare(setup, grid, seeds, task, pieces, journal, stage.part, final)
    labels = {**stage._asdict(), "longest": lengths[1] - 1}
    found = outcomes.rows(config.experiment, grid, seeds, sum(pieces), curves, **labels)
    return with_solutions(found, curves["test_error"], pieces), {
        "judged": np.cumsum(pieces),
        **{name: curves[name] for name in DYNAMICS},
    }


def with_solutions(rows: Rows, error: np.ndarray, pieces: list[int]) -> Rows:
    """Returns rows that say when each run solved its task, and whether it kept that.

    Args:
      rows: of all runs, with the error at the end.
      error: shares of wrong answers before training and after each piece, of shape
        (arms, seeds, 1 + pieces).
      pieces: numbers of updates.
    """
    solved_at = outcomes.solved(error, np.cumsum([0, *pieces]), SOLVED)
    return [
        {
            **row,
            "solved_at": float(at),
            "solved": not np.isnan(at),
            "kept": row["final_error"] < SOLVED,
            "perfect": row["final_error"] == 0,
        }
        for row, at in zip(rows, solved_at.reshape(-1), strict=True)
    ]


def arms_table(rows: Rows) -> Table:
    """Returns one line per arm of each stage."""
    names = (
        "lr",
        "updates",
        "solved",
        "kept",
        "perfect",
        "after",
        "clipped",
        "norm",
        "largest",
    )
    result = Table(
        Column("task", no_wrap=True),
        Column("clip", overflow="fold"),
        *(Column(name, justify="right", no_wrap=True) for name in names),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=rows[0]["experiment"],
        caption=TABLE_CAPTION,
    )
    for key, runs in outcomes.by(
        rows, "task", "length", "alpha", "control", "arm", "lr"
    ).items():
        _, _, alpha, _, arm, lr = key
        result.add_row(
            where(runs[0]),
            name(arm, alpha),
            f"{lr:g}",
            str(runs[0]["updates"]),
            rate(runs, "solved"),
            count(runs, "kept"),
            count(runs, "perfect"),
            when(runs),
            outcomes.clipped(runs),
            f"{outcomes.median('grad_norm_median')(runs):.2g}",
            f"{stats.spread([run['grad_norm_max'] for run in runs]).high:.0e}",
        )
    return result


def verdict(rows: Rows) -> list[str]:
    """Compares clips with none, and those with Omega with the same ones without it."""
    lines = []
    for runs in outcomes.by(rows, "task", "length").values():
        found = tuned(runs)
        lines += [
            f"{where(runs[0])}: {_compare(clip, other, found)}"
            for clip in found
            for other in dict.fromkeys([("none", 0.0), (clip[0], 0.0)])
            if other != clip and other in found
        ]
        lines += _control([row for row in runs if row["control"]])
    return lines


def tuned(rows: Rows) -> dict[tuple[str, float], outcomes.Tuned]:
    """Returns each clip and weight of Omega at its best learning rate.

    Args:
      rows: of one task at one length.
    """
    return {
        key: outcomes.tuned(same, cost)
        for key, same in _plain(rows, "arm", "alpha").items()
    }


def _compare(
    clip: tuple[str, float],
    other: tuple[str, float],
    found: dict[tuple[str, float], outcomes.Tuned],
) -> str:
    """Says what a clip does, compared with another or none."""
    verb, p = effect(found[clip].runs, found[other].runs)
    return (
        f"against {name(*other)} {name(*clip)} {verb} (McNemar p = {p:.1g}): it "
        f"{_solves(found[clip])}; {name(*other)} {_solves(found[other])}"
    )


def effect(clip: Rows, other: Rows) -> tuple[str, float]:
    """Compares how often two clips solve a task, seed by seed.

    Args:
      clip: rows of a clip, one per seed.
      other: those of another, with the same seeds.

    Returns:
      A verb, and the p-value of McNemar's test.
    """
    solved, without = ([run["solved"] for run in runs] for runs in (clip, other))
    p = stats.mcnemar(solved, without)
    # That is p if all pairs differ, in one direction.
    if 2 / 2 ** len(solved) >= CHANCE:
        return "cannot be judged, n too small to tell", p
    if p >= CHANCE:
        return "makes no clear difference", p
    return "gains" if sum(solved) > sum(without) else "loses", p


def _solves(found: outcomes.Tuned) -> str:
    solved, kept = rate(found.runs, "solved"), rate(found.runs, "kept")
    return f"solves {solved} and keeps {kept} at learning rate {found.lr:g}"


def _control(runs: Rows) -> list[str]:
    """Says what patience brings without a clip, at the best of the low rates."""
    if not runs:
        return []
    rates = ", ".join(f"{lr:g}" for (lr,) in outcomes.by(runs, "lr"))
    return [
        f"{where(runs[0])}: with {PATIENCE} times the updates none "
        f"{_solves(outcomes.tuned(runs, cost))} (of {rates})"
    ]


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws success against length, when runs solved it, all arms, and the training."""
    return [
        _draw_success(results, directory / "success.png"),
        _draw_times(results, directory / "times.png"),
        _draw_map(results, directory / "map.png"),
        _draw_dynamics(results, directory / "dynamics.png"),
    ]


def _draw_success(results: Results, path: Path) -> Path:
    """Draws shares of solved runs against length: a row per task, a column per rate."""
    config = results.about["config"]
    tasks, lengths = config["task"], config["length"]
    figure, axes = plots.columns(config, rows=len(tasks), height=3.2)
    names = _names(results.rows)
    for (task, lr, arm, alpha), runs in _plain(
        results.rows, "task", "lr", "arm", "alpha"
    ).items():
        line = name(arm, alpha)
        shift = 0.08 * (names.index(line) - (len(names) - 1) / 2)
        by_length = outcomes.by(runs, "length")
        plots.shares(
            axes[tasks.index(task), config["lr"].index(lr)],
            [lengths.index(length) + shift for (length,) in by_length],
            [sum(run["solved"] for run in same) for same in by_length.values()],
            config["seeds"],
            label=line,
            **plots.style(names, line),
        )
    for task, row in zip(tasks, axes, strict=True):
        row[0].set_ylabel(f"{task}: share of runs solved")
    for axis in axes.flat:
        axis.set_xlim(-0.5, len(lengths) - 0.5)
        axis.set_xticks(
            range(len(lengths)), [span(length, config["longest"]) for length in lengths]
        )
    for axis in axes[-1]:
        axis.set_xlabel("length of the sequences")
    plots.legend(figure, axes[0, 0])
    caption = f"{_caption(config)}\nbars: Wilson's 95 % intervals"
    return plots.save(figure, path, results, caption)


def _draw_times(results: Results, path: Path) -> Path:
    """Draws the share of runs not solved yet: a row per length, a column per rate."""
    config = results.about["config"]
    places = list(_plain(results.rows, "task", "length"))
    figure, axes = plots.columns(config, rows=len(places), height=2.2)
    names = _names(results.rows)
    for (task, length, lr, arm, alpha), runs in _plain(
        results.rows, "task", "length", "lr", "arm", "alpha"
    ).items():
        row = axes[places.index((task, length))]
        line = name(arm, alpha)
        times = np.array([run["solved_at"] for run in runs])
        at, waiting = stats.survival(times, config["updates"])
        # Where lines coincide, that without a clip lies below, and is thick.
        look = {**plots.style(names, line), "lw": 3.0 if line == "none" else 1.5}
        axis = row[config["lr"].index(lr)]
        axis.step(at, waiting, where="post", label=line, **look)
        row[0].set_ylabel(f"{where(runs[0])}\nnot solved yet")
        row[0].set_ylim(-0.03, 1.03)
    for axis in axes[-1]:
        axis.set_xlabel("updates")
    plots.legend(figure, axes[0, 0])
    return plots.save(figure, path, results, _caption(config))


def _draw_map(results: Results, path: Path) -> Path:
    """Draws how many runs solved it, a panel per task and length."""
    config = results.about["config"]
    places = _plain(results.rows, "task", "length")
    names = _names(results.rows)[::-1]
    rates = [f"{lr:g}" for lr in config["lr"]]
    rows, columns = -(-len(places) // PANELS), min(len(places), PANELS)
    width, height = 1.0 + 0.7 * len(rates), 1.0 + 0.45 * len(names)
    figure = Figure(
        figsize=(max(3.0 + width * columns, 7.0), 1.2 + height * rows),
        layout="constrained",
    )
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(places) :]:
        axis.set_axis_off()
    for axis, runs in zip(axes.flat, places.values()):
        solved = np.zeros((len(names), len(rates)), int)
        for row in runs:
            line = names.index(name(row["arm"], row["alpha"]))
            solved[line, config["lr"].index(row["lr"])] += row["solved"]
        texts = [[f"{k}/{config['seeds']}" for k in line] for line in solved]
        share, labels = solved / config["seeds"], (names, rates)
        plots.heatmap(axis, share, labels, texts, cmap="viridis", vmin=0, vmax=1)
        axis.set_title(where(runs[0]), fontsize="medium")
        axis.set_xlabel("learning rate")
    caption = f"{_caption(config)}\nk/n: k of n runs solved it"
    return plots.save(figure, path, results, caption)


def _draw_dynamics(results: Results, path: Path) -> Path:
    """Draws `DYNAMICS`: a row for each per task and length, a column per rate."""
    config, curves = results.about["config"], results.curves
    places = list(_plain(results.rows, "task", "length"))
    figure, axes = plots.columns(config, len(DYNAMICS) * len(places), height=2.2)
    names = _names(results.rows)
    for place, stage in _plain(results.rows, "task", "length", "alpha").items():
        first = len(DYNAMICS) * places.index(place[:2])
        lines = axes[first : first + len(DYNAMICS)]
        part = Stage(*place, control=False).part
        for i, (lr, arm) in enumerate(outcomes.by(stage, "lr", "arm")):
            line = name(arm, place[-1])
            look = {**plots.style(names, line), "label": line}
            for axis, shown in zip(lines[:, config["lr"].index(lr)], DYNAMICS):
                updates, curve = curves[f"{part} judged"], curves[f"{part} {shown}"][i]
                plots.median_and_seeds(axis, updates, curve, look)
        for row, label in zip(lines, DYNAMICS.values(), strict=True):
            row[0].set_ylabel(f"{where(stage[0])}\n{label}")
            row[0].set_yscale("log")
    for axis in axes[-1]:
        axis.set_xlabel("updates")
    plots.legend(figure, axes[0, 0])
    caption = f"{_caption(config)}\nthin: seeds; thick: their median"
    return plots.save(figure, path, results, caption)


def where(row: dict[str, Any]) -> str:
    """Names the task and the length of a run."""
    return f"{row['task']} {span(row['length'], row['longest'])}"


def span(shortest: int, longest: int | None) -> str:
    """Writes a length, or a range of lengths."""
    return f"{shortest}" if longest in (None, shortest) else f"{shortest}-{longest}"


def name(arm: str, alpha: float) -> str:
    """Names a clip, with the weight of Omega if there is any."""
    return f"{arm} + {alpha:g} Omega" if alpha else arm


def rate(runs: Rows, what: str) -> str:
    """Writes how many runs did something, with Wilson's interval of the share."""
    low, high = stats.wilson(sum(run[what] for run in runs), len(runs))
    return f"{count(runs, what)} [{low:.2f}, {high:.2f}]"


def count(runs: Rows, what: str) -> str:
    """Writes how many runs did something, of how many."""
    return f"{sum(run[what] for run in runs)}/{len(runs)}"


def when(runs: Rows) -> str:
    """Writes after how many updates runs solved it, the median of those which did."""
    times = [run["solved_at"] for run in runs if run["solved"]]
    return f"{np.median(times):.0f}" if times else "-"


def compared(rows: Rows) -> Rows:
    """Returns all rows but those of the control."""
    return [row for row in rows if not row["control"]]


def _plain(rows: Rows, *names: str) -> dict[tuple[Any, ...], Rows]:
    """Groups all rows but those of the control."""
    return outcomes.by(compared(rows), *names)


def _names(rows: Rows) -> list[str]:
    """Returns the names of all clips and alphas, in their order."""
    return [name(arm, alpha) for alpha, arm in _plain(rows, "alpha", "arm")]


def cost(runs: Rows) -> float:
    """What tuning makes small: runs not solved; among equals not kept, then errors."""
    unsolved, lost = (sum(not run[x] for run in runs) for x in ("solved", "kept"))
    error = float(np.mean([run["final_error"] for run in runs]))
    return unsolved + (lost + error / 2) / (len(runs) + 1)


def _caption(config: dict[str, Any]) -> str:
    return (
        f"plain RNN with {config['hidden']} units, {config['initial']}, SGD, "
        f"{config['seeds']} seeds, {config['updates']} updates of {config['batch']} "
        "sequences"
    )
