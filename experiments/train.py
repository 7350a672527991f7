"""Training: pure functions of one run, compiled in chunks for many runs at once.

`init`, `begin`, `step`, `run_chunk` and `judge` are written for one run. `compare`
maps them over the grid of arms and seeds, spread over all devices, compiles a chunk of
updates, and calls it in a Python loop, in which a journal shows and keeps how far it
is.

All arms see the same initial values, batches and examples to be judged on: they depend
on the seed and the number of the update only.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

import optaxclip
from experiments import arms, devices, models, omega
from experiments.arms import Arm, Curves, Knobs
from experiments.clips import Clip
from experiments.journal import Journal, Records
from experiments.tasks import Score

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
}
# Share by which float32 sums may put a clipped norm above what it should be.
SLACK = 1e-5
# Added to the number of updates where the examples of the last judgement are drawn.
FINAL = 2**30


class Start(NamedTuple):
    """Where the runs of a seed begin, whatever the knobs.

    Attributes:
      params: initial parameters.
      batches: data of the key of its batches.
      examples: data of the key of the examples it is judged on.
    """

    params: Any
    batches: jax.Array
    examples: jax.Array


class State(NamedTuple):
    """What a run carries from one update to the next.

    Attributes:
      params: of the model.
      clip_state: what the clip has learned.
      opt_state: of the optimizer after it.
      step: number of updates.
      batches: data of the key of the batches of the seed.
      examples: the same, of the examples it is judged on.
    """

    params: Any
    clip_state: Any
    opt_state: Any
    step: jax.Array
    batches: jax.Array
    examples: jax.Array


class Log(NamedTuple):
    """What an update leaves; of shape (updates,) in a run.

    Attributes:
      loss: of the batch, in the unit of the task.
      grad_norm: Euclidean norm of the whole gradient before the clip.
      kept_norm: the same after the clip.
      cosine: of the angle by which the clip turned the gradient.
      clipped: whether the clip made anything smaller.
      scale: the smallest factor the clip multiplied anything by.
      moved: norm of the update as a share of that of the parameters.
      weight_norm: norm of the parameters before the update.
    """

    loss: Any
    grad_norm: Any
    kept_norm: Any
    cosine: Any
    clipped: Any
    scale: Any
    moved: Any
    weight_norm: Any


class Summary(NamedTuple):
    """What a chunk of updates leaves; of shape (1,), that is one point in time.

    Attributes:
      loss: mean over the updates.
      loss_max: largest; NaN if any is.
      grad_norm: mean of the norms before the clip.
      grad_norm_median: their median.
      grad_norm_p90: nine in ten are not larger.
      grad_norm_p99: 99 in 100 are not larger.
      grad_norm_max: the largest.
      kept_norm: mean of the norms after the clip.
      cosine: mean.
      clipped: share of the updates that were clipped.
      scale: the smallest factor.
      moved: mean.
      weight_norm: norm of the parameters before the last update.
      spectral_radius: of the recurrent kernel at the end; NaN where gates have several.
      nonfinite: number of the first update of the run whose gradient was not finite,
        or -1 while there was none in the chunk.
    """

    loss: Any
    loss_max: Any
    grad_norm: Any
    grad_norm_median: Any
    grad_norm_p90: Any
    grad_norm_p99: Any
    grad_norm_max: Any
    kept_norm: Any
    cosine: Any
    clipped: Any
    scale: Any
    moved: Any
    weight_norm: Any
    spectral_radius: Any
    nonfinite: Any


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is fixed when a chunk is compiled, besides the kind of clip.

    Attributes:
      model: its `apply(params, x, at)` gives what the task scores.
      optimizer: a key of `OPTIMIZERS`, what follows the clip.
      batch: examples per update.
      check: whether values are checked while running (needs `chex.chexify`).
      alpha: weight of the regulariser Omega.
      log: whether each update is recorded, or a summary of each chunk.
    """

    model: nn.Module
    optimizer: str
    batch: int
    check: bool = False
    alpha: float = 0.0
    log: Literal["chunks", "updates"] = "chunks"


def checked(clip: optaxclip.Clip) -> optax.GradientTransformationExtraArgs:
    """Makes the same clip, which also checks its law (needs `chex.chexify`).

    What comes out is measured again: no magnitude may be larger than what the shape
    makes of the one that went in and of its limit at this update, nor be NaN if that
    was finite.
    """

    def update(updates, state, params=None, **extra_args):
        def measured(tree):
            return clip.scope.split(tree, None)[0]

        new, following = clip.update(updates, state, params, **extra_args)
        seen = measured(updates)
        limits, _ = clip.bound.limit(state, seen, lambda who: measured(params))
        most = jax.tree.map(clip.shape, seen, limits)
        exceeds = jax.tree.map(
            lambda kept, most, seen: (
                (kept > most * (1 + SLACK)) | (jnp.isnan(kept) & jnp.isfinite(seen))
            ),
            measured(new),
            most,
            seen,
        )
        chex.assert_trees_all_equal(exceeds, jax.tree.map(jnp.zeros_like, exceeds))
        return new, following

    return optax.GradientTransformationExtraArgs(clip.init, update)


def init(model: nn.Module, task: Any, seed: jax.Array) -> Start:
    """Returns initial parameters, and the keys of a seed."""
    params_key, batches, examples = jax.random.split(jax.random.key(seed), 3)
    params = model.init(params_key, task.sample(batches, 1).x_BxTxF)
    return Start(params, jax.random.key_data(batches), jax.random.key_data(examples))


def begin(setup: Setup, clip: Clip, knobs: Knobs, start: Start) -> State:
    """Returns the state before the first update."""
    clip_state = clip.make(knobs.threshold).init(start.params)
    opt_state = OPTIMIZERS[setup.optimizer](knobs.lr).init(start.params)
    return State(
        start.params,
        clip_state,
        opt_state,
        jnp.zeros((), jnp.int32),
        start.batches,
        start.examples,
    )


def step(
    setup: Setup, clip: Clip, task: Any, knobs: Knobs, state: State
) -> tuple[State, Log]:
    """Makes one update.

    Clip and optimizer are the links of `optax.chain`, called one by one because what
    passes between them is recorded.
    """
    transformation = clip.make(knobs.threshold)
    optimizer = OPTIMIZERS[setup.optimizer](knobs.lr)
    clip_update = (checked(transformation) if setup.check else transformation).update
    batch = task.sample(_key(state.batches, state.step), setup.batch)
    score, grads = omega.gradient(state.params, setup.model, task, batch, setup.alpha)
    kept, clip_state = clip_update(grads, state.clip_state, state.params)
    updates, opt_state = optimizer.update(kept, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    (record,) = optaxclip.records(clip_state)
    grad_norm = optaxclip.norms.tree_norm(grads, axis_name=())
    kept_norm = optaxclip.norms.tree_norm(kept, axis_name=())
    directions = jax.tree.map(lambda leaf: leaf / grad_norm, grads)
    cosine = optax.tree.vdot(directions, kept) / kept_norm
    clipped = record.clipped > 0
    weight_norm = optax.tree.norm(state.params)
    log = Log(
        loss=score.loss,
        grad_norm=grad_norm,
        kept_norm=kept_norm,
        cosine=jnp.where(clipped, cosine, 1.0),
        clipped=clipped,
        scale=record.scale,
        moved=optax.tree.norm(updates) / weight_norm,
        weight_norm=weight_norm,
    )
    following = state._replace(
        params=params,
        clip_state=clip_state,
        opt_state=opt_state,
        step=state.step + 1,
    )
    return following, log


def run_chunk(
    setup: Setup,
    clip: Clip,
    updates: int,
    task: Any,
    knobs: Knobs,
    state: State,
) -> tuple[State, Log | Summary]:
    """Makes some updates."""

    def body(state, _):
        return step(setup, clip, task, knobs, state)

    end, log = jax.lax.scan(body, state, length=updates)
    return end, log if setup.log == "updates" else summary(log, state.step, end.params)


def summary(log: Log, first: jax.Array, params: Any) -> Summary:
    """Sums up a chunk, of which the first update and the last parameters are given."""
    norms = log.grad_norm
    median, p90, p99 = jnp.quantile(norms, jnp.array([0.5, 0.9, 0.99]))
    kernel = models.recurrent_kernel(params)
    broken = ~jnp.isfinite(norms)
    found = Summary(
        loss=jnp.mean(log.loss),
        loss_max=jnp.max(log.loss),
        grad_norm=jnp.mean(norms),
        grad_norm_median=median,
        grad_norm_p90=p90,
        grad_norm_p99=p99,
        grad_norm_max=jnp.max(norms),
        kept_norm=jnp.mean(log.kept_norm),
        cosine=jnp.mean(log.cosine),
        clipped=jnp.mean(log.clipped, dtype=jnp.float32),
        scale=jnp.min(log.scale),
        moved=jnp.mean(log.moved),
        weight_norm=log.weight_norm[-1],
        spectral_radius=(
            jnp.float32(jnp.nan) if kernel is None else models.spectral_radius(kernel)
        ),
        nonfinite=jnp.where(broken.any(), first + jnp.argmax(broken), -1),
    )
    return jax.tree.map(lambda number: number[None], found)


def judge(model: nn.Module, task: Any, state: State) -> Score:
    """Returns how the model of a run does on the examples of a task."""
    answer = functools.partial(model.apply, state.params)
    return task.judge(answer, _key(state.examples, state.step))


def _key(data: jax.Array, number: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.wrap_key_data(data), number)


def chunks(updates: int, count: int) -> list[int]:
    """Cuts updates into as many pieces, or one per update, of one length or two."""
    count = min(count, updates)
    length, longer = divmod(updates, count)
    return [length + 1] * longer + [length] * (count - longer)


def compare(
    setup: Setup,
    grid: Sequence[Arm],
    seeds: np.ndarray,
    task: Any,
    pieces: list[int],
    journal: Journal,
    part: str = "",
    final: Any = None,
) -> Curves:
    """Trains every arm on every seed, all of one kind of clip side by side.

    Args:
      setup: what is fixed.
      grid: the arms.
      seeds: the seeds.
      task: where batches and the examples for judging come from.
      pieces: numbers of updates, after each of which the models are judged.
      journal: shows and keeps how far it is.
      part: a name for this comparison, if a run makes several.
      final: what the models are judged on once more at the end. Default: the task.

    Returns:
      Arrays by name: those of `Log`, of shape (arms, seeds, updates), or of `Summary`,
      (arms, seeds, pieces); `test_loss` and `test_error`, (arms, seeds, 1 + pieces),
      the first before training; `final_loss` and `final_error`, (arms, seeds, 1); and
      `seconds`, (arms,), those of the program, compilation included, divided
      by the arms in it.
    """

    def run_kind(clip: Clip, knobs: Knobs) -> Curves:
        name = f"{part} {clip.name} {clip.options}".strip()
        return _sweep(
            setup, clip, knobs, seeds, task, pieces, journal, name, final or task
        )

    return arms.run(grid, run_kind)


def _sweep(
    setup: Setup,
    clip: Clip,
    knobs: Knobs,
    seeds: np.ndarray,
    task: Any,
    pieces: list[int],
    journal: Journal,
    part: str,
    final: Any,
) -> Curves:
    """Trains the arms of one kind side by side; see `compare`."""
    shape = len(knobs.lr), len(seeds)
    arm, seed = np.indices(shape).reshape(2, -1)
    runs = devices.spread(arm.size, one_device=setup.check)
    unchecked = setup.model.clone(check=False)
    starts = start_all(unchecked, runs.whole, task, seeds)
    knobs = jax.tree.map(lambda knob: np.asarray(knob)[arm], knobs)
    placed = runs.place(knobs)
    chunk = _checked(_chunk_in_turn) if setup.check else _chunk

    def begin() -> tuple[State, Records]:
        state = begin_all(setup, clip, runs, starts, placed, runs.place(seed))
        return state, judged("test", task, state, state.step)

    def advance(state: State, updates: int) -> tuple[State, Records]:
        state, log = chunk(setup, clip, updates, runs, task, placed, state)
        score = judged("test", task, state, state.step)
        found = {**runs.gather(log._asdict()), **score}
        if journal.board is not None:
            step = int(runs.gather(state.step)[0])
            journal.board(part, step, _medians(knobs, found, shape))
        return state, found

    def end(state: State) -> Records:
        # Other examples than at the last check.
        return judged("final", final, state, state.step + FINAL)

    def judged(name: str, task: Any, state: State, number: jax.Array) -> Records:
        # Without these all kinds are judged by the same compiled program.
        asked = state._replace(clip_state=(), opt_state=(), step=number)
        score = runs.gather(_judge(unchecked, runs, task, asked))
        return {
            f"{name}_{what}": number[:, None]
            for what, number in score._asdict().items()
        }

    def best(found: Records) -> str:
        return f"best loss {np.nanmin(found['test_loss'], initial=np.inf):.3g}"

    found = journal.carry(
        part,
        begin,
        pieces,
        advance,
        end=end,
        pack=runs.gather,
        unpack=runs.place,
        best=best,
    )
    seconds = found["seconds"].sum() / shape[0]
    return {
        name: np.full(shape[0], seconds)
        if name == "seconds"
        else curve.reshape(*shape, *curve.shape[1:])
        for name, curve in found.items()
    }


def _medians(
    knobs: Knobs, found: Records, shape: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Returns by arm and name the medians over seeds of the means over time."""
    lr, threshold = (np.reshape(knob, shape)[:, 0] for knob in knobs)
    arms_of = [f"lr {x!s}, threshold {y!s}" for x, y in zip(lr, threshold)]
    medians = {
        name: np.median(curve.mean(-1).reshape(shape), axis=1)
        for name, curve in found.items()
    }
    return {
        arm: {name: float(values[i]) for name, values in medians.items()}
        for i, arm in enumerate(arms_of)
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def start_all(
    model: nn.Module, whole: NamedSharding, task: Any, seeds: np.ndarray
) -> Start:
    """Initialises the model for every seed; every device has the whole of it.

    One after another: an orthogonal kernel is made by LAPACK, which on CPUs hands a
    batch of matrices to the threads that it is called from, and waits for them. On few
    cores two such calls can wait for each other for ever.
    """
    starts = jax.lax.map(functools.partial(init, model, task), seeds)
    return jax.lax.with_sharding_constraint(starts, whole)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin_all(
    setup: Setup,
    clip: Clip,
    runs: devices.Spread,
    starts: Start,
    knobs: Knobs,
    seeds: Any,
) -> State:
    """Returns the states of all runs, whose seeds are places in `starts`."""

    def begin_one(starts, knobs, seed):
        return begin(setup, clip, knobs, jax.tree.map(lambda x: x[seed], starts))

    return runs.map(begin_one, shared=1)(starts, knobs, seeds)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6)
def _chunk(
    setup: Setup,
    clip: Clip,
    updates: int,
    runs: devices.Spread,
    task: Any,
    knobs: Knobs,
    states: State,
) -> tuple[State, Log | Summary]:
    """Makes some updates of all runs."""
    chunk = functools.partial(run_chunk, setup, clip, updates)
    return runs.map(chunk, shared=1)(task, knobs, states)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _chunk_in_turn(
    setup: Setup,
    clip: Clip,
    updates: int,
    runs: devices.Spread,
    task: Any,
    knobs: Knobs,
    states: State,
) -> tuple[State, Log | Summary]:
    """Makes some updates of one run after another.

    Checks cannot see into loops that are mapped, and the norm of a clip has one.
    """
    chunk = functools.partial(run_chunk, setup, clip, updates, task)
    return jax.lax.map(lambda run: chunk(*run), (knobs, states))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _judge(model: nn.Module, runs: devices.Spread, task: Any, states: State) -> Score:
    """Judges the models of all runs."""
    judge_one = functools.partial(judge, model)
    return runs.map(judge_one, shared=1)(task, states)


def _checked(program: Callable) -> Callable:
    # At exit chex warns of checks that nobody looked at, of those it looked at too.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return chex.chexify(program, async_check=False)
