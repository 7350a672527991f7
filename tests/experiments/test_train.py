import dataclasses
import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from rich.progress import Progress

import optaxclip
from experiments import arms, clips, devices, train
from experiments.arms import Knobs
from experiments.journal import Journal, Stopped
from experiments.models import Recurrent
from experiments.tasks import image_rows

SEEDS = np.arange(3)
MODEL = Recurrent("rnn", hidden=8, outputs=10)
LR = 0.1
SPECS = "none", "clip_by_global_norm:0.1"
SETUP = train.Setup(MODEL, "sgd", batch=16, log="updates")
PIECES = [12, 12, 6]


@pytest.fixture(scope="module")
def task():
    return image_rows.load(None)


def compare(task, directory, setup=SETUP, pieces=PIECES, seeds=SEEDS, grid=None):
    grid = arms.grid((LR,), SPECS) if grid is None else grid
    journal = Journal(directory, Progress())
    return train.compare(setup, grid, seeds, task, pieces, journal)


@pytest.fixture(scope="module")
def found(task, tmp_path_factory):
    return compare(task, tmp_path_factory.mktemp("found"))


@pytest.fixture(scope="module")
def found_alone(task, tmp_path_factory):
    """The same on one device."""
    one = jax.make_mesh((1,), ("runs",), (AxisType.Auto,))
    spread = functools.partial(devices.Spread, mesh=one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "spread", lambda runs, one_device: spread(runs))
        return compare(task, tmp_path_factory.mktemp("alone"))


def train_without_a_clip(task, seed):
    """SGD as one would write it by hand; returns the loss of each update."""
    start = train.init(MODEL, task, seed)
    key = jax.random.wrap_key_data(start.batches)

    def loss(params, batch):
        return task.score(MODEL.apply(params, *batch[:2]), batch.target).loss

    def update(params, step):
        batch = task.sample(jax.random.fold_in(key, step), SETUP.batch)
        value, grads = jax.value_and_grad(loss)(params, batch)
        optimizer = optax.sgd(LR)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return optax.apply_updates(params, updates), value

    return jax.lax.scan(update, start.params, jnp.arange(30))[1]


def test_a_run_without_a_clip_is_training_as_one_would_write_it(task, found_alone):
    plain = jax.jit(jax.vmap(functools.partial(train_without_a_clip, task)))
    np.testing.assert_allclose(found_alone["loss"][0], plain(SEEDS), rtol=1e-6)
    assert not found_alone["clipped"][0].any()
    assert found_alone["clipped"][1].all()
    assert (found_alone["loss"][1] != found_alone["loss"][0])[:, 1:].all()


class Passing(clips.Clip):
    """A clip that lets every update pass untouched, and records it like any other."""

    def make(self, threshold):
        recorded = super().make(threshold)

        def update(updates, state, params=None):
            return updates, recorded.update(updates, state, params)[1]

        return optaxclip.Clip(recorded.init, update)


def test_threshold_inf_is_bitwise_no_clip(task, found, tmp_path, monkeypatch):
    np.testing.assert_array_equal(found["kept_norm"][0], found["grad_norm"][0])
    # Two programs of the same operations: optimised, one may join a product and a sum
    # that the other rounds one by one.
    plain = {"xla_backend_optimization_level": 0}
    options = {"static_argnums": (0, 1, 2, 3), "compiler_options": plain}
    chunk = jax.jit(train._chunk.__wrapped__, **options)
    monkeypatch.setattr(train, "_chunk", chunk)
    parsed = clips.parse(SPECS[1])
    passing = Passing(parsed.spec, parsed.name, parsed.threshold, parsed.options)
    grid = [arms.Arm(LR, passing), arms.Arm(1.0, passing)]
    none = compare(task, tmp_path / "none")
    untouched = compare(task, tmp_path / "untouched", grid=grid)
    for name in ("loss", "grad_norm", "kept_norm", "weight_norm", "final_loss"):
        np.testing.assert_array_equal(none[name][0], untouched[name][0])


def test_a_run_is_the_same_alone_and_in_one_piece(task, found, tmp_path):
    alone = compare(task, tmp_path, pieces=[30], seeds=SEEDS[1:2])
    # Products of batched matrices may sum in another order: a few units in the last
    # place, 1e-7, which 30 updates at this rate hardly amplify.
    for name, rtol in {"loss": 1e-5, "grad_norm": 1e-4}.items():
        np.testing.assert_allclose(found[name][:, 1], alone[name][:, 0], rtol=rtol)
    both = found["test_loss"][:, 1, [0, -1]], alone["test_loss"][:, 0]
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_the_grid_is_the_same_on_one_device(found, found_alone):
    assert jax.device_count() > found["loss"][..., 0].size
    # As for a run alone.
    for name, rtol in {"loss": 1e-5, "grad_norm": 1e-4, "test_loss": 1e-5}.items():
        np.testing.assert_allclose(found[name], found_alone[name], rtol=rtol)
    np.testing.assert_array_equal(found["clipped"], found_alone["clipped"])


def test_kernels_are_made_one_by_one(task):
    """A batch of matrices would wait for threads that may be waiting for it."""
    lstm = Recurrent("lstm", hidden=8, outputs=10)
    lowered = train.start_all.lower(lstm, devices.spread(3).whole, task, SEEDS)
    program = lowered.compile().as_text()
    kernels = re.findall(r"= \(?f32(\S+)\{.* custom_call_target=\"lapack", program)
    assert kernels == ["[8,8]"] * 2 * 4


def test_seeds_differ_and_arms_share_their_start_and_first_batch(found):
    assert {found[name].shape for name in train.Log._fields} == {(2, 3, 30)}
    assert found["test_loss"].shape == found["test_error"].shape == (2, 3, 4)
    assert found["final_loss"].shape == (2, 3, 1)
    np.testing.assert_array_equal(found["final_loss"], found["test_loss"][..., -1:])
    assert len(set(found["loss"][0, :, 0].tolist())) == 3
    np.testing.assert_array_equal(found["loss"][0, :, 0], found["loss"][1, :, 0])
    first = found["test_loss"][..., 0]
    np.testing.assert_array_equal(first[0], first[1])


def test_what_the_clip_does_is_logged(found):
    none, clipped = (
        {name: found[name][i] for name in train.Log._fields} for i in range(2)
    )
    np.testing.assert_allclose(none["kept_norm"], none["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(clipped["kept_norm"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(clipped["scale"], 0.1 / clipped["grad_norm"], rtol=1e-6)
    for log in (none, clipped):
        np.testing.assert_allclose(log["cosine"], 1, rtol=1e-6)
        moved = log["moved"] * log["weight_norm"]
        np.testing.assert_allclose(moved, LR * log["kept_norm"], rtol=1e-5)


def test_a_summary_is_that_of_the_updates_of_a_chunk(task, found, tmp_path):
    setup = dataclasses.replace(SETUP, log="chunks")
    summed = compare(task, tmp_path, setup)
    assert {summed[name].shape for name in train.Summary._fields} == {(2, 3, 3)}
    ends = np.cumsum(PIECES)
    for piece, (first, end) in enumerate(zip([0, *ends], ends)):
        norm, loss = (found[name][..., first:end] for name in ("grad_norm", "loss"))
        expected = {
            "loss": loss.mean(-1),
            "loss_max": loss.max(-1),
            "grad_norm": norm.mean(-1),
            "grad_norm_median": np.quantile(norm, 0.5, axis=-1),
            "grad_norm_p90": np.quantile(norm, 0.9, axis=-1),
            "grad_norm_p99": np.quantile(norm, 0.99, axis=-1),
            "grad_norm_max": norm.max(-1),
            "kept_norm": found["kept_norm"][..., first:end].mean(-1),
            "clipped": found["clipped"][..., first:end].mean(-1),
            "weight_norm": found["weight_norm"][..., end - 1],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(summed[name][..., piece], value, rtol=1e-5)
    assert (summed["nonfinite"] == -1).all()
    assert (summed["spectral_radius"] > 0.9).all()
    np.testing.assert_array_equal(summed["test_loss"], found["test_loss"])


def test_the_first_update_that_is_not_finite_is_found():
    norms = jnp.array([1.0, jnp.inf, 2.0, jnp.nan])
    log = train.Log(*[norms] * len(train.Log._fields))
    params = {"params": {"recurrence": {}}}
    (first,) = train.summary(log, jnp.int32(40), params).nonfinite
    assert first == 41


def test_what_was_stopped_ends_bit_for_bit_as_if_it_had_not_been(
    task, found, tmp_path, monkeypatch
):
    def stop(journal, updates, best=""):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_is_due", lambda journal: True)
        patch.setattr(Journal, "advance", stop)
        with pytest.raises(Stopped):
            compare(task, tmp_path)
    resumed = compare(task, tmp_path)
    seconds = {"seconds": None}
    np.testing.assert_equal(resumed | seconds, found | seconds)


def test_checking_does_not_change_a_run(task, found, tmp_path):
    setup = dataclasses.replace(SETUP, model=MODEL.clone(check=True), check=True)
    checked = compare(task, tmp_path, setup)
    np.testing.assert_allclose(checked["loss"], found["loss"], rtol=1e-5)
    np.testing.assert_array_equal(checked["clipped"], found["clipped"])


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


def test_check_notices_a_clip_that_exceeds_its_limit(task, tmp_path):
    clip = Doubling("doubling", "clip_by_global_norm", 0.1, ())
    setup = dataclasses.replace(SETUP, check=True)
    with pytest.raises(AssertionError, match="equal"):
        compare(task, tmp_path, setup, pieces=[1], grid=[arms.Arm(LR, clip)])


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
    def __call__(self, x_BxTxF, at=None):
        return nn.Dense(10, name="recurrence")(x_BxTxF.reshape(len(x_BxTxF), -1))


@pytest.fixture(scope="module")
def linear(task):
    return jax.jit(functools.partial(train.init, Linear()))(task, 0)


def test_every_clip_trains_recorded_and_keeps_its_law(clip, task, linear):
    setup = train.Setup(Linear(), "sgd", batch=4, check=True)
    knobs = Knobs(jnp.float32(LR), jnp.float32(clip.threshold))
    before = state = train.begin(setup, clip, knobs, linear)
    clipped = 0
    for _ in range(3):
        state, log = train.step(setup, clip, task, knobs, state)
        clipped += log.clipped
    (record,) = optaxclip.records(state.clip_state)
    assert (record.steps, record.clipped_steps) == (3, clipped)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    chex.assert_tree_all_finite((state.params, log))
    for old, new in zip(*map(jax.tree.leaves, (before.params, state.params))):
        assert (old != new).any()
