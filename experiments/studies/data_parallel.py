"""One larger LSTM, trained on many devices at once: the same result as on one.

The devices are a mesh of two axes. A batch is split over "data": each device has its
share of the images. Parameters and what Adam remembers of them are split over "model",
along their longest dimension: no device has all of them. The update is that of one
device, `experiments.train.step`, clip included: under `jit` arrays are whole whatever
their shardings, the compiler finds the sums over devices, and a norm is that of the
whole gradient.

The sums are added up in another order, so numbers differ in the last place, and Adam,
which divides by the size of a gradient, makes more of it where a gradient is nearly 0.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

from experiments import arms, clips, models, plots, train
from experiments.config import (
    Config,
    UsageError,
    check_clips,
    check_counts,
    check_lrs,
    check_seeds,
)
from experiments.journal import Journal
from experiments.results import Results, Rows
from experiments.studies.study import Study
from experiments.tasks import Batch, Score, image_rows

# Parameters are compared this many times in a run.
CHECKPOINTS = 10
# The numbers of devices which parameters are split over.
MODEL = 1, 2, 4
# Results are the same with parameters this near, as a share of how far they moved, with
# accuracies and, as a share of them, with factors of the clip.
ALIKE = 0.01
TABLE_CAPTION = (
    "Mesh: devices that share a batch x devices that share the parameters. State: the "
    "share of parameters and optimizer state on a device. First norm: of the first "
    "gradient. Factor: the clip's smallest in the first {} updates, and the largest "
    "difference from one device as a share of it. After these updates: largest "
    "difference of a parameter from that on one device, and how far one moved. "
    "Accuracy and loss: on the test images at the end. "
    "Updates/s: without compilation; virtual CPU devices share the same "
    "cores, so theirs say nothing about real ones."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataParallelConfig(Config):
    """Training of one larger LSTM on many devices at once, compared with one device."""

    hidden: int
    """Units of the LSTM."""
    lr: tuple[float, ...]
    """Learning rates of Adam; every clip is run at each."""
    clip: tuple[str, ...]
    """Clips: none, NAME or NAME:ARGUMENTS, as in autoclip:10,window=500."""
    batch: int
    """Images per update, drawn with replacement and shared out to the devices."""
    seed: int = 0
    """It decides initial values and batches."""
    updates: int = 100
    """Updates of each run."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        check_lrs(self.lr)
        check_clips(self.clip)
        check_seeds(self.seed)
        check_counts(hidden=self.hidden, updates=self.updates, batch=self.batch)


@flax.struct.dataclass
class SplitBatches:
    """A task whose batches are split over the axis "data" of a mesh."""

    task: image_rows.ImageRows
    mesh: Mesh = flax.struct.field(pytree_node=False)

    def sample(self, key: jax.Array, batch: int) -> Batch:
        """Draws training images, the same ones on every mesh."""
        split = NamedSharding(self.mesh, P("data"))
        x_BxTxF, at, label_B = self.task.sample(key, batch)
        x_BxTxF, label_B = jax.lax.with_sharding_constraint((x_BxTxF, label_B), split)
        return Batch(x_BxTxF, at, label_B)

    def score(self, y_BxC: jax.Array, label_B: jax.Array) -> Score:
        """Compares logits with labels."""
        return self.task.score(y_BxC, label_B)

    def judge(self, answer: Callable, key: jax.Array) -> Score:
        """Puts all test images to a model."""
        return self.task.judge(answer, key)


class Trained(NamedTuple):
    """What training on a mesh gives.

    Attributes:
      log: of shape (updates,).
      score: after the last update.
      params: NumPy arrays, before the first update and after each piece.
      share: of the bytes of parameters and optimizer state, those on one device.
      rate: updates per second, compilation not included.
    """

    log: train.Log
    score: train.Score
    params: list[Any]
    share: float
    rate: float


def meshes(config: DataParallelConfig) -> list[Mesh]:
    """Returns one device alone, then meshes of all devices that can share a batch.

    Raises:
      UsageError: if there are several devices, and they cannot share a batch.
    """
    processes, local = jax.process_count(), jax.local_device_count()
    usable = [n for n in range(1, local + 1) if config.batch % (n * processes) == 0]
    if jax.device_count() > 1 and not [n for n in usable if n * processes > 1]:
        raise UsageError(
            f"batch={config.batch} cannot be shared by 2 or more of {local} devices in "
            f"each of {processes} processes. Choose another --batch, such as "
            f"{local * processes}."
        )
    many = [
        device
        for process in range(processes)
        for device in jax.local_devices(process_index=process)[: usable[-1]]
    ]
    shapes = [
        (len(many) // model, model)
        for model in MODEL
        if len(many) % model == 0 and config.hidden % model == 0
    ]
    alone = _mesh((1, 1), jax.local_devices()[:1])
    return [alone, *(_mesh(shape, many) for shape in shapes if len(many) > 1)]


def _mesh(shape: tuple[int, int], devices: list[Any]) -> Mesh:
    kinds = AxisType.Auto, AxisType.Auto
    return jax.make_mesh(shape, ("data", "model"), kinds, devices=devices)


def layout(
    mesh: Mesh, setup: train.Setup, knobs: arms.Knobs, state: train.State
) -> train.State:
    """Returns the sharding of every array of a state.

    What an optimizer remembers of every element of a parameter lies where that does.
    All else, such as what a clip has learned, is the same on every device.
    """
    whole = NamedSharding(mesh, P())

    def split(param):
        longest = max(range(param.ndim), key=lambda axis: param.shape[axis])
        if param.shape[longest] % mesh.shape["model"]:
            return whole
        return NamedSharding(mesh, P(*[None] * longest, "model"))

    opt_state = optax.tree.map_params(
        train.OPTIMIZERS[setup.optimizer](knobs.lr),
        lambda leaf, param: split(param) if leaf.shape == param.shape else whole,
        state.opt_state,
        state.params,
        transform_non_params=lambda _: whole,
    )
    params = jax.tree.map(split, state.params)
    everywhere = jax.tree.map(lambda _: whole, state)
    return everywhere._replace(params=params, opt_state=opt_state)


def train_on(
    mesh: Mesh,
    setup: train.Setup,
    clip: clips.Clip,
    knobs: arms.Knobs,
    start: train.Start,
    task: SplitBatches,
    pieces: list[int],
) -> Trained:
    """Trains on a mesh.

    Args:
      mesh: devices along the axes "data" and "model".
      setup: what is fixed.
      clip: the clip.
      knobs: learning rate and threshold, of shape ().
      start: where the run begins.
      task: where batches and test examples come from.
      pieces: numbers of updates, after each of which the parameters are kept.
    """
    whole = NamedSharding(mesh, P())
    begin = functools.partial(train.begin, setup, clip)
    places = layout(mesh, setup, knobs, jax.eval_shape(begin, knobs, start))
    state = jax.jit(begin, out_shardings=places)(knobs, start)
    gather = jax.jit(lambda tree: tree, out_shardings=whole)
    programs = {
        n: jax.jit(
            functools.partial(train.run_chunk, setup, clip, n),
            out_shardings=(places, whole),
            donate_argnums=2,
        )
        .lower(task, knobs, state)
        .compile()
        for n in set(pieces)
    }
    share = _share_of_a_device(state)
    params, logs, seconds = [jax.device_get(gather(state.params))], [], 0.0
    for updates in pieces:
        began = time.perf_counter()
        state, log = jax.block_until_ready(programs[updates](task, knobs, state))
        seconds += time.perf_counter() - began
        params.append(jax.device_get(gather(state.params)))
        logs.append(jax.device_get(log))
    log = jax.tree.map(lambda *parts: np.concatenate(parts), *logs)
    judge = jax.jit(functools.partial(train.judge, setup.model))
    score = jax.device_get(judge(task, state))
    return Trained(log, score, params, share, sum(pieces) / seconds)


def _share_of_a_device(state: train.State) -> float:
    leaves = jax.tree.leaves((state.params, state.opt_state))
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return here / sum(leaf.nbytes for leaf in leaves)


def run(config: DataParallelConfig, journal: Journal) -> tuple[Rows, arms.Curves]:
    """Trains all arms on all meshes."""
    task = image_rows.load(None, "test")
    model = models.Recurrent("lstm", config.hidden, task.outputs)
    start = jax.jit(functools.partial(train.init, model))(task, config.seed)
    setup = train.Setup(model, "adam", config.batch, log="updates")
    pieces = train.chunks(config.updates, CHECKPOINTS)
    grid, places = arms.grid(config.lr, config.clip), meshes(config)
    journal.expect(config.experiment, len(grid) * len(places) * config.updates)
    rows, losses, differences = [], [], []
    for arm in grid:
        knobs = arms.Knobs(jnp.float32(arm.lr), jnp.float32(arm.clip.threshold))
        alone = None
        for mesh in places:
            began = time.perf_counter()
            split = SplitBatches(task, mesh)
            trained = train_on(mesh, setup, arm.clip, knobs, start, split, pieces)
            alone = alone or trained
            apart = list(map(_difference, trained.params, alone.params))
            factors = trained.log.scale[: pieces[0]]
            factors_alone = alone.log.scale[: pieces[0]]
            losses.append(trained.log.loss)
            differences.append(apart)
            rows.append(
                {
                    "experiment": config.experiment,
                    "arm": arm.clip.spec,
                    "lr": arm.lr,
                    "seed": config.seed,
                    "updates": config.updates,
                    "mesh": "x".join(map(str, mesh.devices.shape)),
                    "test_accuracy": 1 - float(trained.score.error),
                    "test_loss": float(trained.score.loss),
                    "first_grad_norm": float(trained.log.grad_norm[0]),
                    "compared": pieces[0],
                    "factor": float(factors.min()),
                    "factor_difference": float(
                        np.max(np.abs(factors / factors_alone - 1))
                    ),
                    "difference": apart[1],
                    "moved": _difference(trained.params[1], trained.params[0]),
                    "share": trained.share,
                    "rate": trained.rate,
                    "seconds": time.perf_counter() - began,
                }
            )
            journal.advance(config.updates)
    shape = len(grid), len(places), -1
    curves = {
        "loss": np.reshape(losses, shape),
        "difference": np.reshape(differences, shape),
        "judged": np.cumsum([0, *pieces]),
    }
    return rows, curves


def table(rows: Rows) -> Table:
    """Returns one line per arm and mesh."""
    result = Table(
        Column("lr"),
        Column("clip", overflow="fold"),
        *(
            Column(name, justify="right")
            for name in (
                "mesh",
                "state",
                "first norm",
                "factor",
                "off by",
                "difference",
                "moved",
                "accuracy",
                "loss",
                "updates/s",
            )
        ),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title="data_parallel",
        caption=TABLE_CAPTION.format(rows[0]["compared"]),
    )
    for row in rows:
        result.add_row(
            f"{row['lr']:g}",
            row["arm"],
            row["mesh"],
            f"{row['share']:.1%}",
            f"{row['first_grad_norm']:.6f}",
            f"{row['factor']:.2g}",
            f"{row['factor_difference']:.0e}",
            f"{row['difference']:.1e}",
            f"{row['moved']:.1e}",
            f"{row['test_accuracy']:.3f}",
            f"{row['test_loss']:.5f}",
            f"{row['rate']:.1f}",
        )
    return result


def verdict(rows: Rows) -> list[str]:
    """Says whether meshes give what one device gives."""
    by_arm: dict[tuple[float, str], Rows] = {}
    for row in rows:
        by_arm.setdefault((row["lr"], row["arm"]), []).append(row)
    lines = []
    for (lr, arm), (alone, *others) in by_arm.items():
        if not others:
            return ["one device alone: with --devices 8 it has seven virtual ones more"]
        apart = max(row["difference"] for row in others)
        factors = max(row["factor_difference"] for row in others)
        accuracies = [row["test_accuracy"] for row in others]
        same = all(_alike(row, alone) for row in others)
        lines.append(
            f"lr {lr:g}: {arm} gives {'the same' if same else 'ANOTHER'} result on "
            f"{', '.join(row['mesh'] for row in others)} as on one device: after "
            f"{alone['compared']} updates, whose smallest factor was "
            f"{alone['factor']:.2g} and differed by up to {factors:.0e} of itself, "
            f"parameters, moved by up to {alone['moved']:.1e}, differ by up to "
            f"{apart:.1e}; accuracy at the end "
            f"{min(accuracies):.3f} to {max(accuracies):.3f}, on one device "
            f"{alone['test_accuracy']:.3f}"
        )
    return lines


def figures(results: Results, directory: Path) -> list[Path]:
    """Draws the losses on all meshes, and how far parameters are apart."""
    return [_draw(results, directory / "meshes.png")]


def _draw(results: Results, path: Path) -> Path:
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
            style = {"color": plots.COLOURS[j % len(plots.COLOURS)], "label": name}
            loss.plot(curves["loss"][i, j], lw=width, **style)
            apart.plot(curves["judged"], curves["difference"][i, j], "o-", **style)
        loss.set_yscale("log")
        apart.set_yscale("symlog", linthresh=1e-7)
        apart.set(xlabel="updates")
    axes[0, 0].set_ylabel("training loss [nats]")
    axes[1, 0].set_ylabel("largest difference of a parameter\nfrom that on one device")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="mesh")
    return plots.save(
        figure,
        path,
        results,
        f"LSTM with {config['hidden']} units, adam, {config['updates']} updates of "
        f"{config['batch']} images; mesh: {results.about['mesh']}",
    )


def _difference(params: Any, others: Any) -> float:
    """Returns the largest difference of a number in two trees; NaN if one is."""
    apart = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), params, others)
    return float(np.max(jax.tree.leaves(apart)))


def _alike(row: dict[str, Any], alone: dict[str, Any]) -> bool:
    near = row["difference"] <= ALIKE * alone["moved"]
    near &= row["factor_difference"] <= ALIKE
    return near and abs(row["test_accuracy"] - alone["test_accuracy"]) <= ALIKE


SMOKE = DataParallelConfig(
    experiment="data_parallel",
    hidden=192,
    lr=(0.002,),
    clip=("clip_by_global_norm:0.3",),
    batch=48,
)
STANDARD = dataclasses.replace(
    SMOKE,
    hidden=384,
    clip=("clip_by_global_norm:0.3", "autoclip", "adaptive_grad_clip:0.01"),
    batch=96,
)
STUDY = Study(
    about="a larger LSTM, batch and parameters split over devices: same as on one",
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(
            STANDARD, hidden=4096, lr=(0.0003,), batch=1536, updates=1000
        ),
    },
    facts=lambda config: {
        "data": image_rows.about(None),
        "initial_values": models.INITS["flax"],
        "mesh": "devices that share a batch x devices that share the parameters",
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
