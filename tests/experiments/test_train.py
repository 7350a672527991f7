import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from experiments import clips, devices, train
from experiments.arms import Knobs
from experiments.models import RowClassifier
from experiments.tasks import digits_rows

SEEDS = np.arange(3)
MODEL = RowClassifier("rnn", hidden=8, classes=10)
LR = 0.1
KNOBS = Knobs(jnp.array([LR, LR]), jnp.array([jnp.inf, 0.1]))
BATCH = 16


@pytest.fixture(scope="module")
def task():
    return digits_rows.load()


@pytest.fixture(scope="module")
def starts(task):
    return train.start(MODEL, SEEDS, task, check=False)


@pytest.fixture(scope="module")
def swept(task, starts):
    return sweep(task, starts)


@pytest.fixture(scope="module")
def swept_alone(task):
    """The same on one device."""
    spread = functools.partial(devices.Spread, mesh=jax.make_mesh((1,), ("runs",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "spread", lambda runs, one_device: spread(runs))
        return sweep(task, train.start(MODEL, SEEDS, task, check=False))


def sweep(task, starts, chunks=(12, 12, 6), clip=None, check=False):
    clip = clips.parse("none") if clip is None else clip
    setup = train.Setup(MODEL.clone(check=check), clip, "sgd", BATCH, check)
    return train.sweep(setup, KNOBS, starts, task, list(chunks), lambda *_: None)


def on_one_device(starts):
    return jax.device_put(starts, jax.devices()[0])


def train_without_a_clip(task, seed):
    """SGD as one would write it by hand; returns the loss of each update."""
    start = train.init(MODEL, seed, task)

    def update(params, step):
        batch = task.sample(jax.random.fold_in(start.key, step), BATCH)
        grad = jax.value_and_grad(train.loss, has_aux=True)
        (loss, _), grads = grad(params, MODEL, *batch)
        optimizer = optax.sgd(LR)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return optax.apply_updates(params, updates), loss

    return jax.lax.scan(update, start.params, jnp.arange(30))[1]


def test_threshold_inf_is_bitwise_training_without_a_clip(task, swept_alone):
    log, _ = swept_alone
    plain = jax.jit(jax.vmap(functools.partial(train_without_a_clip, task)))
    np.testing.assert_array_equal(log.loss[0], plain(SEEDS))
    assert not log.clipped[0].any()
    assert log.clipped[1].all()
    assert (log.loss[1] != log.loss[0])[:, 1:].all()


def test_a_run_is_the_same_alone_and_in_one_piece(task, starts, swept):
    log, score = swept
    one = jax.tree.map(lambda leaf: leaf[1:2], starts)
    alone, alone_score = sweep(task, one, chunks=(30,))
    # Products of batched matrices may sum in another order: a few units in the last
    # place, 1e-7, which 30 updates at this rate hardly amplify.
    np.testing.assert_allclose(log.loss[:, 1], alone.loss[:, 0], rtol=1e-5)
    np.testing.assert_allclose(log.grad_norm[:, 1], alone.grad_norm[:, 0], rtol=1e-4)
    np.testing.assert_allclose(
        score.loss[:, 1, [0, -1]], alone_score.loss[:, 0], rtol=1e-5
    )


def test_the_grid_is_the_same_on_one_device(swept, swept_alone):
    (log, score), (alone, alone_score) = swept, swept_alone
    assert jax.device_count() > log.loss[..., 0].size
    # As for a run alone, below.
    np.testing.assert_allclose(log.loss, alone.loss, rtol=1e-5)
    np.testing.assert_allclose(log.grad_norm, alone.grad_norm, rtol=1e-4)
    np.testing.assert_array_equal(log.clipped, alone.clipped)
    np.testing.assert_allclose(score.loss, alone_score.loss, rtol=1e-5)


def test_seeds_differ_and_arms_share_their_start_and_first_batch(swept):
    log, score = swept
    assert log.loss.shape == log.grad_norm.shape == log.clipped.shape == (2, 3, 30)
    assert score.accuracy.shape == score.loss.shape == (2, 3, 4)
    assert len(set(log.loss[0, :, 0].tolist())) == 3
    np.testing.assert_array_equal(log.loss[0, :, 0], log.loss[1, :, 0])
    np.testing.assert_array_equal(score.loss[0, :, 0], score.loss[1, :, 0])


def test_checking_does_not_change_a_run(task, starts, swept):
    log, _ = swept
    checked, _ = sweep(task, on_one_device(starts), check=True)
    np.testing.assert_allclose(checked.loss, log.loss, rtol=1e-5)
    np.testing.assert_array_equal(checked.clipped, log.clipped)


class Doubling(clips.Clip):
    """A clip that breaks its law."""

    def make(self, threshold):
        lawful = super().make(threshold)

        def update(updates, state, params=None):
            new, state = lawful.update(updates, state, params)
            return jax.tree.map(lambda u: 2 * u, new), state

        clip = optaxclip.Clip(lawful.init, update)
        clip.scope, clip.bound, clip.shape = lawful.scope, lawful.bound, lawful.shape
        return clip


def test_check_notices_a_clip_that_exceeds_its_limit(task, starts):
    clip = Doubling("doubling", "clip_by_global_norm", 0.1, ())
    with pytest.raises(AssertionError, match="equal"):
        sweep(task, on_one_device(starts), chunks=(1,), clip=clip, check=True)


NORMS = (1.0, 2.0, 0.0, 3.0, jnp.nan, 90.0, 1.0, 90.0, jnp.inf, 2.0)


@pytest.mark.parametrize(
    "spec",
    [
        "adagn",
        "adanorm:0.5",
        "adaptive_grad_clip:0.1",
        "normalize_by_leaf_norm:2",
        "spam_clip:4,warmup=1",
        "zclip:2,warmup=2,max_norm=inf",
    ],
)
def test_check_knows_the_limit_of_every_cell_at_every_update(spec):
    direction = {"w": jnp.array([[3.0, 0.1], [-4.0, 0.2]]), "b": jnp.array([0.5])}

    def feed(clip):
        checked = train.checked(clip.make(clip.threshold))
        state = checked.init(direction)
        for norm in NORMS:
            updates = jax.tree.map(lambda d, norm=norm: d * norm, direction)
            _, state = checked.update(updates, state, direction)
        return state

    clip = clips.parse(spec)
    (record,) = optaxclip.records(feed(clip))
    assert record.steps == len(NORMS)
    with pytest.raises(AssertionError, match="equal"):
        feed(Doubling(clip.spec, clip.name, clip.threshold, clip.options))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x_BxTxF):
        return nn.Dense(10)(x_BxTxF.reshape(len(x_BxTxF), -1))


@pytest.fixture(scope="module")
def linear(task):
    return jax.jit(functools.partial(train.init, Linear()))(0, task)


def test_every_clip_trains_recorded_and_keeps_its_law(clip, task, linear):
    setup = train.Setup(Linear(), clip, "sgd", batch=4, check=True)
    knobs = Knobs(jnp.float32(LR), jnp.float32(clip.threshold))
    before = state = train.begin(setup, knobs, linear)
    clipped = 0
    for _ in range(3):
        state, log = train.step(setup, task, knobs, state)
        clipped += log.clipped
    (record,) = optaxclip.records(state.opt_state)
    assert (record.steps, record.clipped_steps) == (3, clipped)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    chex.assert_tree_all_finite((state.params, log))
    for old, new in zip(*map(jax.tree.leaves, (before.params, state.params))):
        assert (old != new).any()


def test_check_notices_hidden_states_that_are_not_finite(starts):
    apply = chex.chexify(jax.jit(MODEL.clone(check=True).apply), async_check=False)
    params = jax.tree.map(lambda leaf: leaf[0], starts.params)
    with pytest.raises(AssertionError, match="finite"):
        apply(params, jnp.full((1, 8, 8), jnp.nan))
    apply(params, jnp.ones((1, 8, 8)))


def test_a_model_refuses_what_is_no_batch_of_sequences():
    with pytest.raises(AssertionError, match="rank"):
        MODEL.init(jax.random.key(0), jnp.ones((4, 64)))
