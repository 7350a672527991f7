"""Training: pure functions of one run, compiled in chunks for many runs at once.

`init`, `loss`, `begin`, `step` and `run_chunk` are written for one run. `start` maps
the first over seeds; `sweep` maps the others over the grid of arms and seeds, spread
over all devices, compiles a chunk of updates, and calls it in a Python loop, which can
report how far it is.

All arms see the same initial values and batches: they depend on the seed and the number
of the update only.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from experiments import devices
from experiments.arms import Knobs
from experiments.clips import Clip

OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
# Share by which float32 sums may put a clipped norm above what it should be.
SLACK = 1e-5


class Score(NamedTuple):
    """How a model does on the test examples.

    Attributes:
      loss: mean cross entropy, in nats.
      accuracy: share of right answers.
    """

    loss: Any
    accuracy: Any


class Start(NamedTuple):
    """Where the runs of a seed begin, whatever the knobs."""

    params: Any
    key: jax.Array
    score: Score


class State(NamedTuple):
    """What a run carries from one update to the next."""

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array


class Log(NamedTuple):
    """What the updates leave, of shape (updates,) in a run.

    Attributes:
      loss: mean cross entropy of the batch, in nats.
      grad_norm: Euclidean norm of the whole gradient before the clip.
      clipped: whether the clip made anything smaller.
      scale: the smallest factor the clip multiplied anything by.
    """

    loss: Any
    grad_norm: Any
    clipped: Any
    scale: Any


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is fixed when a chunk is compiled.

    Attributes:
      model: maps (B, T, F) to logits (B, C).
      clip: the kind of clip.
      optimizer: a key of `OPTIMIZERS`, what follows the clip.
      batch: examples per update.
      check: whether values are checked while running (needs `chex.chexify`).
    """

    model: nn.Module
    clip: Clip
    optimizer: str
    batch: int
    check: bool

    def transformation(self, knobs: Knobs) -> optax.GradientTransformation:
        """Returns clip and optimizer."""
        clip = self.clip.make(knobs.threshold)
        return optax.chain(
            checked(clip) if self.check else clip, OPTIMIZERS[self.optimizer](knobs.lr)
        )


def checked(clip: optaxclip.Clip) -> optax.GradientTransformationExtraArgs:
    """Makes the same clip, which also checks its law (needs `chex.chexify`).

    What comes out is measured again: no magnitude may be larger than what the shape
    makes of the one that went in and of its limit at this update.
    """

    def update(updates, state, params=None, **extra_args):
        def measured(tree):
            return clip.scope.split(tree, None)[0]

        new, following = clip.update(updates, state, params, **extra_args)
        seen = measured(updates)
        limits, _ = clip.bound.limit(state, seen, lambda who: measured(params))
        most = jax.tree.map(clip.shape, seen, limits)
        exceeds = jax.tree.map(
            lambda kept, most: kept > most * (1 + SLACK), measured(new), most
        )
        chex.assert_trees_all_equal(exceeds, jax.tree.map(jnp.zeros_like, exceeds))
        return new, following

    return optax.GradientTransformationExtraArgs(clip.init, update)


def init(model: nn.Module, seed: jax.Array, task: Any) -> Start:
    """Returns initial parameters, and how they do."""
    params_key, run_key = jax.random.split(jax.random.key(seed))
    x_BxTxF, label_B = task.test()
    params = model.init(params_key, x_BxTxF[:1])
    return Start(params, run_key, Score(*loss(params, model, x_BxTxF, label_B)))


def loss(
    params: Any, model: nn.Module, x_BxTxF: jax.Array, label_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns mean cross entropy, in nats, and the share of right answers."""
    logits_BxC = jnp.asarray(model.apply(params, x_BxTxF))
    chex.assert_shape(logits_BxC, (*label_B.shape, None))
    losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, label_B)
    return jnp.mean(losses_B), jnp.mean(jnp.argmax(logits_BxC, -1) == label_B)


def begin(setup: Setup, knobs: Knobs, start: Start) -> State:
    """Returns the state before the first update."""
    opt_state = setup.transformation(knobs).init(start.params)
    return State(start.params, opt_state, start.key, jnp.zeros((), jnp.int32))


def step(setup: Setup, task: Any, knobs: Knobs, state: State) -> tuple[State, Log]:
    """Makes one update."""
    key = jax.random.fold_in(state.key, state.step)
    x_BxTxF, label_B = task.sample(key, setup.batch)
    value_and_grads = jax.value_and_grad(loss, has_aux=True)
    (value, _), grads = value_and_grads(state.params, setup.model, x_BxTxF, label_B)
    updates, opt_state = setup.transformation(knobs).update(
        grads, state.opt_state, state.params
    )
    (record,) = optaxclip.records(opt_state)
    norm = optaxclip.norms.tree_norm(grads, axis_name=())
    log = Log(value, norm, record.clipped > 0, record.scale)
    params = optax.apply_updates(state.params, updates)
    return State(params, opt_state, state.key, state.step + 1), log


def run_chunk(
    setup: Setup, updates: int, task: Any, knobs: Knobs, state: State
) -> tuple[State, Log, Score]:
    """Makes some updates, then judges the model."""

    def body(state, _):
        return step(setup, task, knobs, state)

    state, log = jax.lax.scan(body, state, length=updates)
    return state, log, Score(*loss(state.params, setup.model, *task.test()))


def chunks(updates: int, count: int) -> list[int]:
    """Cuts updates into pieces of one length, and a shorter last one if need be."""
    length = max(updates // count, 1)
    rest = updates % length
    return [length] * (updates // length) + [rest] * (rest > 0)


def start(model: nn.Module, seeds: np.ndarray, task: Any, check: bool) -> Start:
    """Initialises the model for every seed; leaves have shape (seeds, ...)."""
    over = devices.spread(len(seeds), one_device=check)
    each = over.map(lambda task, seed: init(model, seed, task), shared=1)
    program = jax.jit(each, out_shardings=over.whole)
    starts = (_checked(program) if check else program)(task, over.place(seeds))
    return jax.tree.map(lambda leaf: leaf[: len(seeds)], starts)


def sweep(
    setup: Setup,
    knobs: Knobs,
    starts: Start,
    task: Any,
    pieces: list[int],
    report: Callable[[int, Score], None],
) -> tuple[Log, Score]:
    """Trains every arm on every seed, all side by side on all devices.

    Args:
      setup: what is fixed.
      knobs: learning rates and thresholds, of shape (arms,).
      starts: where the seeds begin, with leaves of shape (seeds, ...), as `start`
        returns them for the same `check`.
      task: where batches and test examples come from.
      pieces: numbers of updates, after each of which the models are judged.
      report: called after each piece with its length and the scores.

    Returns:
      The log, of shape (arms, seeds, updates), and the scores, of shape (arms, seeds,
      1 + pieces), the first before training.
    """
    shape = len(knobs.lr), len(starts.score.loss)
    arm, seed = np.indices(shape).reshape(2, -1)
    runs = devices.spread(arm.size, one_device=setup.check)
    knobs = runs.place(jax.tree.map(lambda knob: np.asarray(knob)[arm], knobs))

    def begin_one(starts, knobs, seed):
        return begin(setup, knobs, jax.tree.map(lambda leaf: leaf[seed], starts))

    state = jax.jit(runs.map(begin_one, shared=1))(starts, knobs, runs.place(seed))
    programs = {n: _chunk_of_runs(setup, n, runs) for n in set(pieces)}
    logs, scores = [], []
    before = jax.tree.map(lambda leaf: np.tile(leaf, (shape[0], 1)), starts.score)
    for updates in pieces:
        state, *found = programs[updates](task, knobs, state)
        log, score = jax.tree.map(
            lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), runs.gather(found)
        )
        logs.append(log)
        scores.append(score)
        report(updates, score)
    log = jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *logs)
    return log, jax.tree.map(lambda *s: np.stack(s, axis=-1), before, *scores)


def _chunk_of_runs(setup: Setup, updates: int, runs: devices.Spread) -> Callable:
    """Compiles a function of a task, and knobs and states of all runs.

    The states are donated. While values are checked, runs follow each other instead:
    checks cannot see into loops that are mapped, and the norm of a clip has one.
    """
    chunk = functools.partial(run_chunk, setup, updates)
    if not setup.check:
        return jax.jit(runs.map(chunk, shared=1), donate_argnums=2)

    def one_by_one(task, knobs, states):
        return jax.lax.map(lambda run: chunk(task, *run), (knobs, states))

    return _checked(jax.jit(one_by_one))


def _checked(program: Callable) -> Callable:
    # At exit chex warns of checks that nobody looked at, of those it looked at too.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return chex.chexify(program, async_check=False)
