"""Diagnosis: which warning comes how many updates before the damage.

Plain SGD at several learning rates, with a clip and without, on three tasks:

| setting | network |
|---|---|
| adding | LSTM, one number out, squared error |
| text | tanh units, next character |
| digits | tanh units, rows of images |

How a run ended is found afterwards, from the median of its last 25 losses:

- damaged: it is more than 20 % above the loss before training. The damage is the first
  update from which to the end the loss is no longer below what it was before training,
  that is, for at least half of the 51 updates around, as far as they are there; before
  the first it counts as below. It lasts for at least 25 updates.
- sound: it is at least 20 % below the loss before training.
- neither: it has not learned, or was lost in the last moment.

A warning is found as it would be in training: at an update it knows that one and those
before. It is late if it comes after the damage, missing if it never does, and a false
alarm if it comes in a sound run. Some warnings need ten updates to compare with, so
only damage after those says which warning is earlier. A warning is good if it is
missing in at most a tenth of these runs, and a false alarm in at most a tenth of the
sound ones; the first good one is chosen on the first half of the seeds, and reported
on the others.

Bengio, Simard, Frasconi (Learning long-term dependencies with gradient descent is
difficult, 1994) and Pascanu, Mikolov, Bengio (On the difficulty of training recurrent
neural networks, 2013, https://arxiv.org/abs/1211.5063) say why gradients explode; when
one notices is measured here.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

from experiments import arms, models, outcomes, plots, stats, train
from experiments.config import TrainingConfig, check_counts, check_different, require
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies.study import Study
from experiments.tasks import image_rows, sequences, text

# Updates before and after one that are looked at for the damage, which lasts as long;
# also the last ones, which say how a run ended.
AROUND = 25
# How a run may end, and the share of the loss before training by which it must differ.
DAMAGED, SOUND, NEITHER = ENDS = "damaged", "sound", "neither"
MARGIN = 0.2
# Updates of which the loss is the mean where it is compared with that of the start.
MEAN = 10
# Most and fewest updates before one of which there is a running median.
WINDOW, FEWEST = 100, 10
# First update at which every warning can fire.
ABLE = max(MEAN - 1, FEWEST)
# Shares of the damaged runs that a good warning may miss, and of the sound ones in
# which it may be a false alarm; and of how many runs of each kind, at least.
MISSED, FALSE, ENOUGH = 0.1, 0.1, 5
# Sequences, and windows of text, on which models are judged.
SEQUENCES, WINDOWS = 200, 40
# Times a run is judged, which is when it can be stopped.
PIECES = 4
LOGGED = "loss", "grad_norm", "weight_norm", "moved"
TABLE_CAPTION = (
    f"Fires: in so many of the runs damaged after update {ABLE}, from which every "
    "warning can fire. Delay: updates from the damage to the warning, below 0 if it "
    "comes before; median and range, inf: never. False alarms: in so many of the sound "
    "runs, without and with a clip."
)


class Trace(NamedTuple):
    """What is known of a run; arrays have shape (updates,).

    Attributes:
      start: loss on the examples for judging, before training.
      loss: of the batches.
      grad_norm: before the clip.
      weight_norm: before the update.
      moved: norm of the update as a share of that of the weights.
    """

    start: float
    loss: np.ndarray
    grad_norm: np.ndarray
    weight_norm: np.ndarray
    moved: np.ndarray


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task and a network.

    Attributes:
      cell: of the network.
      make: makes the task of a config.
      about: says which one it is.
    """

    cell: str
    make: Callable[["DiagnoseConfig"], Any]
    about: Callable[["DiagnoseConfig"], str]


SETTINGS = {
    "adding": Setting(
        "lstm",
        lambda config: sequences.make("add", config.length, SEQUENCES),
        lambda config: "generated while training, add as in tasks/sequences.py",
    ),
    "text": Setting(
        "rnn",
        lambda config: text.load(config.data, config.length, examples=WINDOWS),
        lambda config: text.about(config.data, config.length),
    ),
    "digits": Setting(
        "rnn",
        lambda config: image_rows.load(None),
        lambda config: image_rows.about(None),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(TrainingConfig):
    """Training with clips and without, watched for warnings."""

    setting: tuple[str, ...]
    """Tasks: adding, text, digits."""
    length: int = 50
    """Steps of the sequences of adding and text."""
    hidden: int = 32
    """Units of the networks."""
    data: Path | None = None
    """File with the text. Default: the documentation of Python."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        super().__post_init__()
        check_different("setting", self.setting)
        for setting in self.setting:
            known = ", ".join(SETTINGS)
            require(setting in SETTINGS, "setting", f"of {known}", setting)
        sequences.check_length("add", self.length)
        check_counts(hidden=self.hidden)
        # What is damaged after all warnings can fire must have time to last.
        fewest = ABLE + 1 + AROUND
        require(self.updates >= fewest, "updates", f">= {fewest}", self.updates)


def running_median(values: np.ndarray) -> np.ndarray:
    """Returns for each update the median of the values before it.

    Args:
      values: of shape (updates,); NaN is taken as inf.

    Returns:
      Medians of the `WINDOW` values before each, or of all if there are no more; inf
      where there are fewer than `FEWEST`.
    """
    known = np.where(np.isnan(values), np.inf, values)
    # NaN fills up the windows of the first updates, and is left out.
    filled = np.concatenate([np.full(WINDOW, np.nan), known])
    before = np.lib.stride_tricks.sliding_window_view(filled, WINDOW)[: len(values)]
    medians = np.full(len(values), np.inf)
    medians[FEWEST:] = np.nanmedian(before[FEWEST:], axis=1)
    return medians


def _last_mean(values: np.ndarray) -> np.ndarray:
    """Returns the means of the last `MEAN` values; -inf where there are fewer."""
    last = np.lib.stride_tricks.sliding_window_view(values, MEAN).mean(1, float)
    return np.concatenate([np.full(MEAN - 1, -np.inf), last])


# Whether a warning fires, at each update. What is compared with NaN fires.
WARNINGS: dict[str, Callable[[Trace], np.ndarray]] = {
    "loss not finite": lambda run: ~np.isfinite(run.loss),
    "gradient not finite": lambda run: ~np.isfinite(run.grad_norm),
    "loss above start": lambda run: ~(_last_mean(run.loss) <= run.start),
    "loss > 3 x median": lambda run: ~(run.loss <= 3 * running_median(run.loss)),
    "gradient > 10 x median": lambda run: (
        ~(run.grad_norm <= 10 * running_median(run.grad_norm))
    ),
    "gradient > 100 x median": lambda run: (
        ~(run.grad_norm <= 100 * running_median(run.grad_norm))
    ),
    "weights > 2 x start": lambda run: ~(run.weight_norm <= 2 * run.weight_norm[0]),
    "weights > 10 x start": lambda run: ~(run.weight_norm <= 10 * run.weight_norm[0]),
    "update > 0.1 x weights": lambda run: ~(run.moved <= 0.1),
    "update > weights": lambda run: ~(run.moved <= 1),
}
MEANINGS = {
    "loss above start": f"mean of the last {MEAN} batches; start: before training",
    "median": f"of the last {WINDOW} updates before, at least {FEWEST}",
    "weights": "Euclidean norm of all parameters",
    "update": "Euclidean norm of the update, as applied",
}


class End(NamedTuple):
    """How a run ended.

    Attributes:
      end: one of `ENDS`.
      damage: first update of the damage, as above; NaN if it is not damaged.
    """

    end: str
    damage: float


def judge(run: Trace) -> End:
    """Returns how a run ended, as above."""
    last = stats.spread(run.loss[-AROUND:]).median
    if last > (1 + MARGIN) * run.start:
        first = _onset(run)
        lasts = len(run.loss) - first >= AROUND
        return End(DAMAGED, float(first)) if lasts else End(NEITHER, np.nan)
    return End(SOUND if last <= (1 - MARGIN) * run.start else NEITHER, np.nan)


def _onset(run: Trace) -> int:
    """Returns the update after the last at which losses around are mostly below."""
    below = np.concatenate([np.ones(AROUND, bool), run.loss < run.start])
    mostly = [
        bool(np.mean(below[update : update + 2 * AROUND + 1]) > 0.5)
        for update in range(len(run.loss))
    ]
    return int(np.flatnonzero([True, *mostly])[-1])


def warned(run: Trace) -> dict[str, float]:
    """Returns at which update each warning fires first; NaN: at none."""
    return {name: _first(fires(run)) for name, fires in WARNINGS.items()}


def _first(fires: np.ndarray) -> float:
    return float(np.argmax(fires)) if fires.any() else np.nan


def run(config: DiagnoseConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Trains all arms on all seeds in each setting, and looks for what happened."""
    grid = arms.grid(config.lr, config.clip)
    kinds = len(arms.by_kind(grid))
    journal.expect("diagnose", config.updates * kinds * len(config.setting))
    rows: Rows = []
    curves: dict[str, np.ndarray] = {}
    for name in config.setting:
        found = _train(config, name, grid, journal)
        rows += _rows(config, name, grid, found)
        for key in ("start", *LOGGED):
            curves[f"{name} {key}"] = found[key]
    return rows, curves


def _train(
    config: DiagnoseConfig, name: str, grid: list[arms.Arm], journal: Journal
) -> arms.Curves:
    """Trains in a setting; `start` is the loss before training, (arms, seeds)."""
    task = SETTINGS[name].make(config)
    model = models.Recurrent(
        SETTINGS[name].cell, config.hidden, task.outputs, check=config.check
    )
    setup = train.Setup(model, "sgd", config.batch, config.check, log="updates")
    seeds = config.seed + np.arange(config.seeds)
    pieces = train.chunks(config.updates, PIECES)
    curves = train.compare(setup, grid, seeds, task, pieces, journal, name)
    return {**curves, "start": curves["test_loss"][..., 0]}


def _rows(
    config: DiagnoseConfig, name: str, grid: list[arms.Arm], curves: arms.Curves
) -> Rows:
    """Returns a row per run: how it ended, and when each warning fired first."""
    return [
        {
            "experiment": "diagnose",
            "setting": name,
            "arm": arm.clip.spec,
            "lr": arm.lr,
            "seed": config.seed + j,
            "updates": config.updates,
            "start_loss": float(curves["start"][i, j]),
            "test_loss": float(curves["test_loss"][i, j, -1]),
            **judge(_trace(curves, i, j))._asdict(),
            **warned(_trace(curves, i, j)),
            "seconds": float(curves["seconds"][i] / config.seeds),
        }
        for i, arm in enumerate(grid)
        for j in range(config.seeds)
    ]


def _trace(curves: arms.Curves, arm: int, seed: int, setting: str = "") -> Trace:
    names = (f"{setting} {name}".strip() for name in ("start", *LOGGED))
    return Trace(*(curves[name][arm, seed] for name in names))


class Record(NamedTuple):
    """What a warning is worth.

    Attributes:
      name: of the warning.
      delays: updates from the damage to it, one per damaged run; NaN: it is missing.
      false: number of sound runs in which it fires.
      runs: number of sound runs.
    """

    name: str
    delays: list[float]
    false: int
    runs: int

    @property
    def fired(self) -> int:
        """In how many damaged runs it fires."""
        return int(np.sum(~np.isnan(self.delays)))

    @property
    def is_good(self) -> bool:
        """Whether it hardly misses a damaged run, and hardly alarms in a sound one."""
        enough = self.fired >= (1 - MISSED) * len(self.delays)
        return enough and self.false <= FALSE * self.runs

    def __str__(self) -> str:
        """Says what it is worth."""
        return (
            f"fires in {self.fired} of {len(self.delays)} damaged runs"
            f"{_when(self.delays)}, and in {self.false} of {self.runs} sound ones"
        )


def records(runs: Rows) -> list[Record]:
    """Returns what each warning is worth in runs damaged once all can fire."""
    damaged, sound = _late(runs), _ended(runs, SOUND)
    return [
        Record(
            name,
            [row[name] - row["damage"] for row in damaged],
            sum(not np.isnan(row[name]) for row in sound),
            len(sound),
        )
        for name in WARNINGS
    ]


def _ended(runs: Rows, end: str) -> Rows:
    return [row for row in runs if row["end"] == end]


def _late(runs: Rows) -> Rows:
    """Returns the runs damaged at an update before which every warning can fire."""
    return [row for row in _ended(runs, DAMAGED) if row["damage"] > ABLE]


def _when(delays: list[float]) -> str:
    """Says when warnings came, in the runs where they did."""
    known = [delay for delay in delays if not np.isnan(delay)]
    if not known:
        return ""
    delay = stats.spread(known)
    side = "before" if delay.median < 0 else "after"
    late = f"median {abs(delay.median):g} updates {side} the damage"
    return f" ({late}, range {delay.low:g} to {delay.high:g})"


def table(rows: Rows) -> Table:
    """Returns one line per setting and warning."""
    result = Table(
        *(Column(name, overflow="fold") for name in ("setting", "warning")),
        *(
            Column(name, justify="right")
            for name in ("fires", "delay", "false: none", "false: clip")
        ),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title="diagnose",
        caption=TABLE_CAPTION,
    )
    for (setting,), runs in outcomes.by(rows, "setting").items():
        none = records([row for row in runs if row["arm"] == "none"])
        clipped = records([row for row in runs if row["arm"] != "none"])
        for record, plain, clip in zip(records(runs), none, clipped, strict=True):
            result.add_row(
                setting,
                record.name,
                f"{record.fired}/{len(record.delays)}",
                f"{stats.spread(record.delays):g}" if record.delays else "-",
                f"{plain.false}/{plain.runs}",
                f"{clip.false}/{clip.runs}",
            )
    return result


def verdict(rows: Rows) -> list[str]:
    """Says which warning is the best in each setting, and what NaN is worth."""
    lines = []
    for (setting,), runs in outcomes.by(rows, "setting").items():
        lines += [f"{setting}: {line}" for line in _findings(runs)]
    return lines


def _findings(runs: Rows) -> list[str]:
    """Says what was found in one setting."""
    damaged = _ended(runs, DAMAGED)
    counts = "; ".join(
        f"{arm}: " + ", ".join(f"{len(_ended(same, end))} {end}" for end in ENDS)
        for (arm,), same in outcomes.by(runs, "arm").items()
    )
    if not damaged:
        return [f"no run is damaged ({counts}), so there is nothing to foresee"]
    onset = stats.spread([row["damage"] for row in damaged])
    nan = "loss not finite"
    delays = [row[nan] - row["damage"] for row in damaged]
    lost = int(np.sum(~np.isnan(delays)))
    early = len(damaged) - len(_late(runs))
    left_out = (
        f"{early} of {len(damaged)} damaged runs are damaged by update {ABLE}, before "
        "which not every warning can fire: which comes first is judged without them"
    )
    return [
        f"runs: {counts}; damage from update {onset:g} on (median and range)",
        *([left_out] if early else []),
        _choice(runs),
        f"the loss is not finite in {lost} of {len(damaged)} damaged runs"
        f"{_when(delays)}",
    ]


def _choice(runs: Rows) -> str:
    """Chooses the first good warning on half of the seeds; reports it on the others."""
    seeds = sorted({row["seed"] for row in runs})
    first = set(seeds[: len(seeds) // 2])
    choosing = [row for row in runs if row["seed"] in first]
    others = [row for row in runs if row["seed"] not in first]
    halves = choosing, others
    late = [len(_late(half)) for half in halves]
    sound = [len(_ended(half, SOUND)) for half in halves]
    if min(late + sound) < ENOUGH:
        return (
            f"which warning comes first cannot be judged from fewer than {ENOUGH} runs "
            f"damaged after update {ABLE} and {ENOUGH} sound ones in each half of the "
            f"seeds: there are {late[0]} and {late[1]} damaged, {sound[0]} and "
            f"{sound[1]} sound"
        )
    found = records(choosing)
    if not any(record.fired for record in found):
        return f"no warning fires in any of {late[0]} damaged runs"
    good = [record for record in found if record.is_good]
    if not good:
        return (
            f"no warning fires in at least {1 - MISSED:.0%} of {late[0]} damaged runs "
            f"and in at most {FALSE:.0%} of {sound[0]} sound ones"
        )
    name = min(good, key=_median).name
    (held,) = [record for record in records(others) if record.name == name]
    kept = "good there too" if held.is_good else "not good there"
    return (
        f"the first good warning on half of the seeds is {name}; on the others it "
        f"{held}: {kept}"
    )


def _median(record: Record) -> float:
    return stats.spread(record.delays).median


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws one damaged run of each setting, and when warnings come in all of them."""
    return [
        _draw_timeline(results, directory / "timeline.png"),
        _draw_delays(results, directory / "delays.png"),
    ]


def _draw_timeline(results: Results, path: Path) -> Path:
    """Draws a run per column: its norms, and at which updates each warning fires."""
    settings = results.about["config"]["setting"]
    figure = Figure(figsize=(3.2 + 4.2 * len(settings), 10), layout="constrained")
    axes = figure.subplots(
        4, len(settings), squeeze=False, sharex="col", height_ratios=(2, 2, 2, 3)
    )
    for setting, column in zip(settings, axes.T, strict=True):
        _draw_run(results, setting, column)
    for row, label in zip(
        axes, ("loss", "gradient norm", "weight norm", "warnings"), strict=True
    ):
        row[0].set_ylabel(label)
    for axis in axes[-1, 1:]:
        axis.set_yticklabels([])
    for axis in axes[-1]:
        axis.set_xlabel("updates")
    plots.legend(figure, axes[0, 0])
    caption = "dotted: the damage; dots: a warning fires, circle: for the first time"
    return _save(figure, path, results, caption)


def _draw_run(results: Results, setting: str, axes: np.ndarray) -> None:
    """Draws the damaged run of which the damage is at the median, and its twins.

    It is one of those damaged once all warnings can fire, if there are any. Where no
    run is damaged it is the first one.
    """
    config = results.about["config"]
    grid = arms.grid(config["lr"], config["clip"])
    runs = [row for row in results.rows if row["setting"] == setting]
    found = _late(runs) or _ended(runs, DAMAGED)
    damaged = sorted(found, key=lambda row: row["damage"])
    chosen = damaged[len(damaged) // 2] if damaged else runs[0]
    end = _last_update(chosen)
    for axis in axes[:3]:
        axis.set_yscale("log")
    for i, arm in enumerate(grid):
        if arm.lr != chosen["lr"]:
            continue
        run = _trace(results.curves, i, chosen["seed"] - config["seed"], setting)
        shown = arm.clip.spec == chosen["arm"]
        look = plots.style(config["clip"], arm.clip.spec)
        look |= {"lw": 1.4 if shown else 0.8, "label": arm.clip.spec}
        for axis, curve in zip(axes, (run.loss, run.grad_norm, run.weight_norm)):
            finite = np.where(np.isfinite(curve), curve, np.nan)
            axis.plot(finite[: end + 1], **look)
        if shown:
            axes[0].axhline(run.start, color="0.6", lw=0.8, label="before training")
            _draw_warnings(axes[3], run, end)
    for axis in axes:
        axis.axvline(chosen["damage"], color="0.4", ls=":", lw=1.2)
        axis.set_xlim(-0.02 * end, 1.02 * end)
    axes[0].set_title(
        f"{setting}, lr {chosen['lr']:g}, {chosen['arm']}, seed {chosen['seed']}",
        fontsize="medium",
    )


def _last_update(row: dict[str, Any]) -> int:
    """Returns the last update to be drawn: a while after all has happened."""
    times = [row[name] for name in ("damage", *WARNINGS)]
    last = np.nanmax([*times, 0])
    return int(min(1.25 * last + 10, row["updates"] - 1))


def _draw_warnings(axis: Axes, run: Trace, end: int) -> None:
    """Draws at which updates each warning fires."""
    for place, fires in enumerate(WARNINGS.values()):
        at = np.flatnonzero(fires(run)[: end + 1])
        axis.plot(at, np.full(at.size, place), "k.", ms=2)
        axis.plot(at[:1], np.full(at[:1].size, place), "ko", ms=6, mfc="white")
    _name_warnings(axis)


def _draw_delays(results: Results, path: Path) -> Path:
    """Draws when warnings come in runs damaged once all can fire: a column each."""
    settings = results.about["config"]["setting"]
    figure = Figure(figsize=(3.2 + 5.2 * len(settings), 5.2), layout="constrained")
    axes = figure.subplots(1, len(settings), squeeze=False, sharex=True, sharey=True)
    for setting, axis in zip(settings, axes[0], strict=True):
        found = records([row for row in results.rows if row["setting"] == setting])
        for place, record in enumerate(found):
            _draw_record(axis, place, record)
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.axvline(0, color="0.4", ls=":", lw=1.2)
        axis.set_title(f"{setting}: {len(found[0].delays)} runs", loc="left")
        axis.set_xlabel("updates after the damage (below 0: before)")
        title = {"transform": axis.transAxes, "va": "bottom", "fontsize": "small"}
        axis.text(1.02, 1.0, "missing  false", **title)
    _name_warnings(axes[0, 0])
    caption = (
        f"dots: runs damaged after update {ABLE}, from which every warning can fire; "
        "bar: median; false: alarms in sound runs"
    )
    return _save(figure, path, results, caption)


def _draw_record(axis: Axes, place: int, record: Record) -> None:
    """Draws a warning in a line of its own."""
    delays = np.array([delay for delay in record.delays if not np.isnan(delay)])
    # Dots which would cover each other are put above each other.
    lift = 0.5 * (np.arange(len(delays)) + 0.5) / max(len(delays), 1) - 0.25
    axis.plot(np.sort(delays), place + lift, ".", color="tab:blue", ms=4, alpha=0.6)
    if record.delays and np.isfinite(_median(record)):
        axis.plot([_median(record)] * 2, [place - 0.38, place + 0.38], "k-", lw=2)
    missing = len(record.delays) - record.fired
    axis.text(
        1.02,
        place,
        f"{missing}/{len(record.delays)}   {record.false}/{record.runs}",
        transform=axis.get_yaxis_transform(),
        va="center",
        fontsize="small",
    )


def _name_warnings(axis: Axes) -> None:
    axis.set_yticks(range(len(WARNINGS)), list(WARNINGS))
    axis.set_ylim(len(WARNINGS) - 0.4, -0.6)


def _save(figure: Figure, path: Path, results: Results, what: str) -> Path:
    config = results.about["config"]
    rates = ", ".join(f"{lr:g}" for lr in config["lr"])
    runs = (
        f"{config['seeds']} seeds, SGD, lr {rates}, {config['updates']} updates of "
        f"{config['batch']} examples, {config['hidden']} units"
    )
    return plots.save(figure, path, results, f"{runs}\n{what}")


SMOKE = DiagnoseConfig(
    experiment="diagnose",
    setting=("digits",),
    lr=(0.3, 0.75),
    clip=("none", "clip_by_global_norm:0.25"),
    seeds=10,
    updates=260,
    batch=20,
)
STANDARD = dataclasses.replace(
    SMOKE,
    setting=("adding", "text", "digits"),
    lr=(0.3, 0.75, 2.0),
    seeds=14,
    updates=500,
)
STUDY = Study(
    about="warnings of a run that is going to be lost: which comes how early",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(
            STANDARD,
            lr=(0.1, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0),
            clip=("none", *(f"clip_by_global_norm:{c}" for c in (0.25, 1.0))),
            seeds=20,
            updates=2000,
            length=100,
            hidden=128,
        ),
    },
    facts=lambda config: {
        "data": {name: SETTINGS[name].about(config) for name in config.setting},
        "initial_values": models.INITS["flax"],
        "damage": f"median of the last {AROUND} losses more than {MARGIN:.0%} above "
        f"that before training (sound: at least {MARGIN:.0%} below); from there on at "
        f"least half of the {2 * AROUND + 1} losses around are not below it, {AROUND} "
        "updates or longer",
        "warnings": MEANINGS,
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
