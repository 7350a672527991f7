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
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Column, Table

from experiments import arms, models, plots, train
from experiments.config import DataParallelConfig, UsageError
from experiments.results import Results
from experiments.studies.study import Rows, Study
from experiments.tasks import digits_rows

# Parameters are compared, and models judged, this many times in a run.
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
    "Updates/s: with judging, without compilation; virtual CPU devices share the same "
    "cores, so theirs say nothing about real ones."
)


@flax.struct.dataclass
class SplitBatches:
    """A task whose batches are split over the axis "data" of a mesh."""

    task: digits_rows.DigitsRows
    mesh: Mesh = flax.struct.field(pytree_node=False)

    def sample(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """Draws training images, the same ones on every mesh."""
        split = NamedSharding(self.mesh, P("data"))
        return jax.lax.with_sharding_constraint(self.task.sample(key, batch), split)

    def test(self) -> tuple[jax.Array, jax.Array]:
        """Returns all test images and labels."""
        return self.task.test()


class Trained(NamedTuple):
    """What training on a mesh gives.

    Attributes:
      log: of shape (updates,).
      score: after the last update.
      params: NumPy arrays, before the first update and after each piece.
      share: of the bytes of parameters and optimizer state, those on one device.
      rate: updates per second, judging included and compilation not.
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
) -> Any:
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
        setup.transformation(knobs),
        lambda leaf, param: split(param) if leaf.shape == param.shape else whole,
        state.opt_state,
        state.params,
        transform_non_params=lambda _: whole,
    )
    params = jax.tree.map(split, state.params)
    return state._replace(params=params, opt_state=opt_state, key=whole, step=whole)


def train_on(
    mesh: Mesh,
    setup: train.Setup,
    knobs: arms.Knobs,
    start: train.Start,
    task: SplitBatches,
    pieces: list[int],
) -> Trained:
    """Trains on a mesh.

    Args:
      mesh: devices along the axes "data" and "model".
      setup: what is fixed.
      knobs: learning rate and threshold, of shape ().
      start: where the run begins.
      task: where batches and test examples come from.
      pieces: numbers of updates, after each of which the model is judged.
    """
    whole = NamedSharding(mesh, P())
    begin = functools.partial(train.begin, setup)
    places = layout(mesh, setup, knobs, jax.eval_shape(begin, knobs, start))
    state = jax.jit(begin, out_shardings=places)(knobs, start)
    gather = jax.jit(lambda tree: tree, out_shardings=whole)
    programs = {
        n: jax.jit(
            functools.partial(train.run_chunk, setup, n),
            out_shardings=(places, whole, whole),
            donate_argnums=2,
        )
        .lower(task, knobs, state)
        .compile()
        for n in set(pieces)
    }
    share = _share_of_a_device(state)
    params, found, seconds = [jax.device_get(gather(state.params))], [], 0.0
    for updates in pieces:
        began = time.perf_counter()
        state, *log_and_score = jax.block_until_ready(
            programs[updates](task, knobs, state)
        )
        seconds += time.perf_counter() - began
        params.append(jax.device_get(gather(state.params)))
        found.append(jax.device_get(log_and_score))
    logs, scores = zip(*found, strict=True)
    log = jax.tree.map(lambda *parts: np.concatenate(parts), *logs)
    return Trained(log, scores[-1], params, share, sum(pieces) / seconds)


def _share_of_a_device(state: train.State) -> float:
    leaves = jax.tree.leaves((state.params, state.opt_state))
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return here / sum(leaf.nbytes for leaf in leaves)


def run(config: DataParallelConfig, progress: Progress) -> tuple[Rows, arms.Curves]:
    """Trains all arms on all meshes."""
    task = digits_rows.load()
    model = models.RowClassifier("lstm", config.hidden, task.classes)
    start = jax.jit(functools.partial(train.init, model))(config.seed, task)
    pieces = train.chunks(config.updates, CHECKPOINTS)
    grid, places = arms.grid(config.lr, config.clip), meshes(config)
    total = len(grid) * len(places) * config.updates
    bar = progress.add_task(config.experiment, total=total, best="")
    rows, losses, differences = [], [], []
    for arm in grid:
        setup = train.Setup(model, arm.clip, "adam", config.batch, check=False)
        knobs = arms.Knobs(jnp.float32(arm.lr), jnp.float32(arm.clip.threshold))
        alone = None
        for mesh in places:
            began = time.perf_counter()
            split = SplitBatches(task, mesh)
            trained = train_on(mesh, setup, knobs, start, split, pieces)
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
                    "test_accuracy": float(trained.score.accuracy),
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
            progress.update(bar, advance=config.updates)
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
    return [plots.meshes(results, directory / "meshes.png")]


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
    clip=("clip_by_global_norm:0.3", "autoclip", "adaptive_grad_clip:0.01"),
    batch=48,
)
STUDY = Study(
    about="a larger LSTM, batch and parameters split over devices: same as on one",
    tiers={
        "smoke": SMOKE,
        "standard": dataclasses.replace(
            SMOKE, hidden=768, lr=(0.001,), batch=192, updates=500
        ),
    },
    facts={
        "data": digits_rows.ABOUT,
        "initial_values": models.INIT,
        "mesh": "devices that share a batch x devices that share the parameters",
    },
    run=run,
    table=table,
    verdict=verdict,
    figures=figures,
)
