"""Clips do inside optax, Flax, Equinox, Keras and orbax what they do alone."""

import functools
import math
import types
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from orbax.checkpoint import v1 as ocp_v1

import optaxclip
from optaxclip import axes, bounds, by_name, recorded, records, scopes, shapes

PARAMS = {"b": jnp.array([1.0, -2.0]), "w": jnp.array([[2.0, 1.0], [0.5, -1.0]])}
# Norms: all 13, b 5, w 12.
GRADS = {"b": jnp.array([3.0, 4.0]), "w": jnp.array([[0.0, -12.0], [0.0, 0.0]])}
LABELS = {"b": "bias", "w": "kernel"}
ONLY_BIAS = {"b": True, "w": False}
ONLY_KERNEL = {"b": False, "w": True}

# Every factory that takes numbers, with numbers that clip GRADS.
FACTORIES = {
    "clip": (optaxclip.clip, {"max_delta": 1.0}),
    "clip_by_value": (
        optaxclip.clip_by_value,
        {"min_value": -1.0, "max_value": 2.0},
    ),
    "clip_by_block_rms": (optaxclip.clip_by_block_rms, {"threshold": 0.5}),
    "clip_by_leaf_norm": (optaxclip.clip_by_leaf_norm, {"max_norm": 1.0}),
    "clip_by_unit_norm": (optaxclip.clip_by_unit_norm, {"max_norm": 1.0}),
    "clip_by_group_norm": (
        optaxclip.clip_by_group_norm,
        {"max_norms": 1.0, "labels": LABELS},
    ),
    "clip_by_global_norm": (optaxclip.clip_by_global_norm, {"max_norm": 1.0}),
    "normalize_by_global_norm": (optaxclip.normalize_by_global_norm, {"scale": 2.0}),
    "normalize_by_leaf_norm": (optaxclip.normalize_by_leaf_norm, {"scale": 2.0}),
    "adaptive_grad_clip": (
        optaxclip.adaptive_grad_clip,
        {"clipping": 0.1, "eps": 1e-3},
    ),
}

# What they give: b = (3, 4), w = ((0, -12), (0, 0)).
ROOT_HALF = math.sqrt(0.5)
CLIPPED = {
    "clip": ([1, 1], -1),
    "clip_by_value": ([2, 2], -1),
    "clip_by_block_rms": ([0.3 * math.sqrt(2), 0.4 * math.sqrt(2)], -1),
    "clip_by_leaf_norm": ([0.6, 0.8], -1),
    "clip_by_unit_norm": ([0.6, 0.8], -1),
    "clip_by_group_norm": ([0.6, 0.8], -1),
    "clip_by_global_norm": ([3 / 13, 4 / 13], -12 / 13),
    "normalize_by_global_norm": ([6 / 13, 8 / 13], -24 / 13),
    "normalize_by_leaf_norm": ([1.2, 1.6], -2),
    # |b| = sqrt 5 in the params, the second column of w has norm sqrt 2.
    "adaptive_grad_clip": (
        [0.06 * math.sqrt(5), 0.08 * math.sqrt(5)],
        -0.1 * math.sqrt(2),
    ),
}


def make(name):
    factory, kwargs = FACTORIES[name]
    return factory(**kwargs)


def make_for(leaf, name):
    """The same clip for a tree of one leaf."""
    factory, kwargs = FACTORIES[name]
    if "labels" in kwargs:
        kwargs = kwargs | {"labels": {leaf: LABELS[leaf]}}
    return factory(**kwargs)


def close(found, wanted, rtol=1e-6):
    jax.tree.map(
        lambda f, w: np.testing.assert_allclose(f, w, rtol=rtol, atol=0), found, wanted
    )


def check_clipped(name, updates, factor=1.0):
    b, w = CLIPPED[name]
    wanted = {"b": factor * np.array(b), "w": factor * np.array([[0, w], [0, 0.0]])}
    close(updates, wanted)


def step(tx, grads=GRADS, params=PARAMS, **extra):
    """One jitted step from a fresh state."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, **extra))(grads, params)


def scalars(record):
    return {
        "norm": float(record.norm),
        "limit": float(record.limit),
        "scale": float(record.scale),
        "clipped": float(record.clipped),
        "steps": int(record.steps),
        "clipped_steps": int(record.clipped_steps),
        "nonfinite_steps": int(record.nonfinite_steps),
    }


# Chains.


@pytest.mark.parametrize("name", FACTORIES)
def test_chain_with_sgd_descends_along_the_clipped_updates(name):
    updates, _ = step(optax.chain(make(name), optax.sgd(0.5)))
    check_clipped(name, updates, -0.5)


def test_named_chain_keeps_the_state_of_a_clip_under_its_name():
    clip = optaxclip.clip_by_global_norm(recorded(1.0))
    tx = optax.named_chain(("clip", clip), ("sgd", optax.sgd(0.5)))
    updates, state = step(tx)
    check_clipped("clip_by_global_norm", updates, -0.5)
    assert float(state["clip"].norm) == 13.0


def test_a_clip_after_adam_bounds_the_step_not_the_gradient():
    tx = optax.chain(optax.adam(0.1), optaxclip.clip_by_global_norm(0.01))
    updates, _ = step(tx)
    # Adam's first step is -0.1 in each of the three elements with a gradient.
    wanted = 0.01 / math.sqrt(3)
    close(updates, {"b": [-wanted] * 2, "w": [[0, wanted], [0, 0]]}, rtol=1e-5)


def test_two_clips_in_a_chain_have_a_record_each_in_the_order_of_the_chain():
    tx = optax.chain(
        optaxclip.clip_by_leaf_norm(recorded(1.0)),
        optax.scale(10.0),
        optaxclip.clip_by_global_norm(recorded(2.0)),
    )
    updates, state = step(tx)
    close(updates, {"b": [0.6 * 2**0.5, 0.8 * 2**0.5], "w": [[0, -(2**0.5)], [0, 0]]})
    first, second = records(state)
    assert {k: float(v) for k, v in optaxclip.by_name(first.norm, GRADS).items()} == {
        "b": 5.0,
        "w": 12.0,
    }
    np.testing.assert_allclose(second.norm, 10 * math.sqrt(2), rtol=1e-6)


def test_fields_of_a_record_are_found_by_optax_tree_get():
    tx = optax.chain(optaxclip.clip_by_global_norm(recorded(1.0)), optax.adam(1e-3))
    _, state = step(tx)
    assert float(optax.tree.get(state, "norm")) == 13.0
    assert int(optax.tree.get(state, "clipped_steps")) == 1


# Parts of a tree.


@pytest.mark.parametrize("name", FACTORIES)
def test_masked_clips_what_it_shows_and_counts_nothing_else(name):
    tx = optax.masked(make(name), ONLY_KERNEL)
    updates, _ = step(tx)
    alone, _ = step(make_for("w", name), {"w": GRADS["w"]}, {"w": PARAMS["w"]})
    assert updates["b"].tolist() == [3.0, 4.0]
    assert updates["w"].tolist() == alone["w"].tolist()
    assert abs(float(updates["w"][0, 1])) < 12


def test_masked_global_norm_is_that_of_the_unmasked_part():
    tx = optax.masked(optaxclip.clip_by_global_norm(recorded(1.0)), ONLY_BIAS)
    updates, state = step(tx)
    close(updates, {"b": [0.6, 0.8], "w": GRADS["w"]})
    assert float(records(state)[0].norm) == 5.0


@pytest.mark.parametrize("name", FACTORIES)
def test_partition_clips_each_part_by_itself(name):
    tx = optax.partition({"bias": make(name), "kernel": optax.identity()}, LABELS)
    updates, _ = step(tx)
    alone, _ = step(make_for("b", name), {"b": GRADS["b"]}, {"b": PARAMS["b"]})
    assert updates["b"].tolist() == alone["b"].tolist() != [3.0, 4.0]
    assert updates["w"].tolist() == GRADS["w"].tolist()


def test_one_clip_per_part_is_not_one_clip_of_all():
    clip = optaxclip.clip_by_global_norm(1.0)
    parts = optax.partition({"bias": clip, "kernel": clip}, LABELS)
    close(step(parts)[0], {"b": [0.6, 0.8], "w": [[0, -1], [0, 0]]})
    whole = optax.chain(
        clip,
        optax.partition({"bias": optax.identity(), "kernel": optax.identity()}, LABELS),
    )
    check_clipped("clip_by_global_norm", step(whole)[0])


def test_a_frozen_leaf_counts_outside_partition_and_not_inside():
    """USERS.md pain 7: 0.6 against 0.006."""
    grads = {"head": jnp.array([3.0, 4.0]), "body": jnp.array([math.sqrt(249975.0)])}
    labels = {"head": "train", "body": "freeze"}
    clip = optaxclip.clip_by_global_norm(1.0)
    frozen = {"train": optax.identity(), "freeze": optax.set_to_zero()}
    outside = optax.chain(clip, optax.partition(frozen, labels))
    close(step(outside, grads, grads)[0]["head"], [0.006, 0.008], rtol=1e-5)
    inside = optax.partition(frozen | {"train": clip}, labels)
    close(step(inside, grads, grads)[0]["head"], [0.6, 0.8], rtol=1e-5)


@pytest.mark.parametrize(
    "axis", [{"b": 0, "w": 0}, lambda path, leaf: 0, 0], ids="tree callable int".split()
)
def test_axes_of_the_whole_model_fit_a_masked_part(axis):
    tx = optax.masked(optaxclip.clip_by_unit_norm(1.0, axis=axis), ONLY_KERNEL)
    updates, _ = step(tx)
    close(updates, {"b": [3, 4], "w": [[0, -1], [0, 0]]})


def test_norms_of_the_whole_model_fit_a_masked_part():
    tx = optax.masked(optaxclip.clip_by_leaf_norm({"b": 1.0, "w": 2.0}), ONLY_KERNEL)
    close(step(tx)[0], {"b": [3, 4], "w": [[0, -2], [0, 0]]})


def test_labels_of_the_whole_model_fit_a_masked_part():
    clip = optaxclip.clip_by_group_norm({"bias": 1.0, "kernel": 2.0}, LABELS)
    updates, _ = step(optax.masked(clip, ONLY_KERNEL))
    close(updates, {"b": [3, 4], "w": [[0, -2], [0, 0]]})


# Accumulation.


def accumulate(tx):
    """The update after two micro-steps with gradients (2, 0) and (0, 2)."""
    params = jnp.zeros(2)
    state = tx.init(params)
    first, state = tx.update(jnp.array([2.0, 0.0]), state, params)
    assert first.tolist() == [0.0, 0.0]
    second, state = tx.update(jnp.array([0.0, 2.0]), state, params)
    return second, state


def test_a_clip_before_multisteps_clips_every_micro_step():
    """USERS.md pain 10: the mean of (1, 0) and (0, 1)."""
    inner = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    tx = optax.chain(optaxclip.clip_by_global_norm(recorded(1.0)), inner)
    updates, state = accumulate(tx)
    close(updates, [-0.5, -0.5])
    assert int(records(state)[0].steps) == 2


def test_a_clip_inside_multisteps_clips_the_mean():
    """USERS.md pain 10: (1, 1), which has norm sqrt 2, becomes (0.707, 0.707)."""
    clip = optaxclip.clip_by_global_norm(recorded(1.0))
    tx = optax.MultiSteps(optax.chain(clip, optax.sgd(1.0)), 2)
    updates, state = accumulate(tx.gradient_transformation())
    close(updates, [-ROOT_HALF, -ROOT_HALF])
    (record,) = records(state)
    np.testing.assert_allclose(record.norm, math.sqrt(2), rtol=1e-6)
    assert int(record.steps) == 1


# Hyperparameters.


@pytest.mark.parametrize("name", FACTORIES)
def test_inject_hyperparams_takes_every_number(name):
    factory, kwargs = FACTORIES[name]
    tx = optax.inject_hyperparams(factory)(**kwargs)
    updates, state = step(tx)
    check_clipped(name, updates)
    numbers = {k: v for k, v in kwargs.items() if isinstance(v, float)}
    assert {k: float(v) for k, v in state.hyperparams.items()} == {
        k: float(np.float32(v)) for k, v in numbers.items()
    }


@pytest.mark.parametrize("name", FACTORIES)
def test_inject_hyperparams_keeps_the_dtypes_of_a_mixed_tree(name):
    factory, kwargs = FACTORIES[name]
    tx = optax.inject_hyperparams(factory)(**kwargs)
    grads = {"b": GRADS["b"].astype(jnp.bfloat16), "w": GRADS["w"]}
    params = {"b": PARAMS["b"].astype(jnp.bfloat16), "w": PARAMS["w"]}
    updates, _ = step(tx, grads, params)
    assert updates["b"].dtype == jnp.bfloat16
    assert updates["w"].dtype == jnp.float32
    b, w = CLIPPED[name]
    np.testing.assert_allclose(updates["b"].astype(jnp.float32), b, rtol=2**-7)
    # A number injected beside bfloat16 params is itself rounded to bfloat16 by optax.
    np.testing.assert_allclose(updates["w"], [[0, w], [0, 0]], rtol=2**-7)


def test_inject_hyperparams_takes_a_schedule_for_max_norm():
    schedule = optax.linear_schedule(1.0, 0.5, 2)
    tx = optax.inject_hyperparams(optaxclip.clip_by_global_norm)(max_norm=schedule)
    state = tx.init(PARAMS)
    for wanted in (1.0, 0.75, 0.5, 0.5):
        updates, state = tx.update(GRADS, state, PARAMS)
        close(updates["b"], [3 / 13 * wanted, 4 / 13 * wanted])
        np.testing.assert_allclose(state.hyperparams["max_norm"], wanted, rtol=1e-6)


def test_a_schedule_needs_no_inject_hyperparams():
    tx = optaxclip.clip_by_global_norm(optax.linear_schedule(1.0, 0.5, 2))
    state = tx.init(PARAMS)
    for wanted in (1.0, 0.75, 0.5, 0.5):
        updates, state = tx.update(GRADS, state)
        close(updates["b"], [3 / 13 * wanted, 4 / 13 * wanted])


def test_a_hyperparameter_set_between_steps_holds_and_does_not_retrace():
    tx = optax.inject_hyperparams(optaxclip.clip_by_global_norm)(max_norm=1.0)
    traces = []

    @jax.jit
    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state)

    state = jax.jit(tx.init)(PARAMS)
    for wanted in (1.0, 0.25, 4.0):
        state.hyperparams["max_norm"] = jnp.asarray(wanted, jnp.float32)
        updates, state = update(GRADS, state)
        close(updates["b"], [3 / 13 * wanted, 4 / 13 * wanted])
    assert len(traces) == 1


@pytest.mark.parametrize(
    "factory, numbers, static, wanted",
    [
        (
            optaxclip.clip_by_unit_norm,
            {"max_norm": 1.0},
            {"axis": lambda path, leaf: ()},
            {"b": [1, 1], "w": [[0, -1], [0, 0]]},
        ),
        (
            optaxclip.clip_by_unit_norm,
            {"max_norm": 1.0},
            {"axis": -1, "ord": 1},
            {"b": [3 / 7, 4 / 7], "w": [[0, -1], [0, 0]]},
        ),
        (
            optaxclip.adaptive_grad_clip,
            {"clipping": 0.1},
            {"axis": axes.flax},
            {
                "b": [0.06 * 5**0.5, 0.08 * 5**0.5],
                "w": [[0, -0.1 * 6.25**0.5], [0, 0]],
            },
        ),
        (
            optaxclip.clip_by_leaf_norm,
            {"max_norm": 1.0},
            {"ord": math.inf},
            {"b": [0.75, 1], "w": [[0, -1], [0, 0]]},
        ),
        (
            optaxclip.clip_by_global_norm,
            {"max_norm": 19.0},
            {"ord": 1, "shape": shapes.rational},
            {"b": [1.5, 2], "w": [[0, -6], [0, 0]]},
        ),
        (
            optaxclip.clip_by_group_norm,
            {"max_norms": 1.0},
            {"labels": lambda tree: LABELS, "ord": 1},
            {"b": [3 / 7, 4 / 7], "w": [[0, -1], [0, 0]]},
        ),
    ],
    ids="axis axis-ord agc-axis ord ord-shape labels-ord".split(),
)
def test_inject_hyperparams_takes_what_is_static_by_static_args(
    factory, numbers, static, wanted
):
    wrapped = optax.inject_hyperparams(factory, static_args=tuple(static))
    updates, state = step(wrapped(**numbers, **static))
    close(updates, wanted)
    assert set(numbers) <= set(state.hyperparams)
    assert not set(static) & set(state.hyperparams)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_an_order_that_inject_hyperparams_traces_is_refused_with_the_way_out(jit):
    tx = optax.inject_hyperparams(optaxclip.clip_by_global_norm)(max_norm=1.0, ord=1)
    with pytest.raises(TypeError, match="name it in static_args"):
        (jax.jit(tx.init) if jit else tx.init)(PARAMS)


# Steps that are not finite.


def test_apply_if_finite_leaves_a_record_as_it_was_on_a_bad_step():
    clip = optaxclip.clip_by_global_norm(recorded(1.0))
    tx = optax.apply_if_finite(optax.chain(clip, optax.sgd(0.5)), 5)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    updates, state = update(GRADS, state, PARAMS)
    check_clipped("clip_by_global_norm", updates, -0.5)
    bad = GRADS | {"b": jnp.array([jnp.nan, 4.0])}
    updates, state = update(bad, state, PARAMS)
    close(updates, jax.tree.map(jnp.zeros_like, GRADS))
    assert scalars(records(state)[0])["steps"] == 1
    updates, state = update(GRADS, state, PARAMS)
    check_clipped("clip_by_global_norm", updates, -0.5)
    assert scalars(records(state)[0]) == {
        "norm": 13.0,
        "limit": 1.0,
        "scale": float(np.float32(1) / np.float32(13)),
        "clipped": 1.0,
        "steps": 2,
        "clipped_steps": 2,
        "nonfinite_steps": 0,
    }


@pytest.mark.parametrize("name", FACTORIES)
def test_apply_if_finite_clips_as_ever_on_a_good_step(name):
    check_clipped(name, step(optax.apply_if_finite(make(name), 3))[0])


def test_a_record_counts_a_bad_step_that_is_not_skipped():
    tx = optaxclip.clip_by_global_norm(recorded(1.0))
    bad = GRADS | {"b": jnp.array([jnp.inf, 4.0])}
    updates, state = step(tx, bad)
    assert all(np.isnan(u).all() for u in jax.tree.leaves(updates))
    assert int(state.nonfinite_steps) == int(state.steps) == 1


# The map of optax over slots that belong to params, as used to give them shardings.

MAPPED = {
    "global": optaxclip.clip_by_global_norm(1.0),
    "global recorded": optaxclip.clip_by_global_norm(recorded(1.0)),
    "schedule": optaxclip.clip_by_leaf_norm(optax.constant_schedule(1.0)),
    "prefix": optaxclip.clip_by_leaf_norm({"b": 1.0, "w": 2.0}),
    "prefix of rules": optaxclip.clip_by_leaf_norm(
        {"b": 1.0, "w": optax.constant_schedule(2.0)}
    ),
    "tree of axes": optaxclip.clip_by_unit_norm(1.0, axis={"b": 0, "w": 0}),
    "group": optaxclip.clip_by_group_norm(1.0, LABELS),
    "group recorded": optaxclip.clip_by_group_norm(recorded(1.0), LABELS),
    "adaptive": optaxclip.adaptive_grad_clip(0.1),
    "zero_nonfinite": optaxclip.zero_nonfinite(),
}


@pytest.mark.parametrize("name", MAPPED)
def test_tree_map_params_takes_slots_for_params_only_if_they_have_their_shape(name):
    tx = optax.chain(MAPPED[name], optax.adam(1e-3))
    state = jax.eval_shape(tx.init, PARAMS)
    found = optax.tree_map_params(
        tx,
        lambda slot, param: slot.shape == param.shape,
        state,
        PARAMS,
        transform_non_params=lambda _: "other",
    )
    assert False not in jax.tree.leaves(found)
    # Adam's two moments of two leaves.
    assert jax.tree.leaves(found[1]).count(True) == 4


# A regression that every framework runs, and its steps by hand.

RATE, LIMIT = 0.1, 0.5
INPUTS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
TARGETS = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
KERNEL = np.random.default_rng(2).normal(size=(3, 2)).astype(np.float32)
BIAS = np.zeros(2, np.float32)


@functools.cache
def regression_by_hand(steps=3):
    """Kernel, bias and gradient norms of descent with a clip by global norm."""
    x, y = INPUTS.astype(np.float64), TARGETS.astype(np.float64)
    kernel, bias = KERNEL.astype(np.float64), BIAS.astype(np.float64)
    norms = []
    for _ in range(steps):
        error = x @ kernel + bias - y
        dk, db = 2 * x.T @ error, 2 * error.sum(axis=0)
        norms.append(math.sqrt((dk * dk).sum() + (db * db).sum()))
        factor = min(1, LIMIT / norms[-1])
        kernel, bias = kernel - RATE * factor * dk, bias - RATE * factor * db
    return kernel, bias, norms


def squared_error(outputs):
    return ((outputs - TARGETS) ** 2).sum()


def recorded_sgd():
    clip = optaxclip.clip_by_global_norm(recorded(LIMIT))
    return optax.chain(clip, optax.sgd(RATE))


def check_regression(kernel, bias, opt_state, steps=3):
    wanted_kernel, wanted_bias, norms = regression_by_hand(steps)
    assert min(norms) > 2 * LIMIT
    np.testing.assert_allclose(kernel, wanted_kernel, rtol=1e-5)
    np.testing.assert_allclose(bias, wanted_bias, rtol=1e-5)
    (record,) = records(opt_state)
    np.testing.assert_allclose(record.norm[...], norms[-1], rtol=1e-5)
    np.testing.assert_allclose(record.scale[...], LIMIT / norms[-1], rtol=1e-5)
    counts = (record.steps, record.clipped_steps, record.nonfinite_steps)
    assert [int(count) for count in counts] == [steps, steps, 0]


def test_flax_train_state():
    module = nn.Dense(2)
    params = {"params": {"kernel": jnp.array(KERNEL), "bias": jnp.array(BIAS)}}
    state = train_state.TrainState.create(
        apply_fn=module.apply, params=params, tx=recorded_sgd()
    )

    @jax.jit
    def train_step(state):
        grads = jax.grad(lambda p: squared_error(state.apply_fn(p, INPUTS)))(
            state.params
        )
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        state = train_step(state)
    found = state.params["params"]
    check_regression(found["kernel"], found["bias"], state.opt_state)


def test_train_state_gives_params_to_an_adaptive_clip():
    state = train_state.TrainState.create(
        apply_fn=None,
        params=PARAMS,
        tx=optax.chain(make("adaptive_grad_clip"), optax.sgd(1.0)),
    )
    after = jax.jit(lambda s: s.apply_gradients(grads=GRADS))(state).params
    b, w = CLIPPED["adaptive_grad_clip"]
    wanted = {"b": PARAMS["b"] - np.array(b), "w": [[2, 1 - w], [0.5, -1]]}
    close(
        after, jax.tree.map(np.asarray, wanted, is_leaf=lambda x: isinstance(x, list))
    )


def linear(seed=0):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
    model.kernel[...] = jnp.array(KERNEL)
    model.bias[...] = jnp.array(BIAS)
    return model


def test_nnx_optimizer_under_nnx_jit():
    model = linear()
    optimizer = nnx.Optimizer(model, recorded_sgd(), wrt=nnx.Param)
    assert int(records(optimizer.opt_state)[0].steps) == 0

    @nnx.jit
    def train_step(model, optimizer):
        grads = nnx.grad(lambda m: squared_error(m(INPUTS)))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        train_step(model, optimizer)
    check_regression(model.kernel[...], model.bias[...], optimizer.opt_state)


def test_nnx_optimizer_with_units_by_name_and_a_record_per_leaf():
    model = linear()
    clip = optaxclip.clip_by(
        scopes.unit(axes.flax), recorded(bounds.relative(0.01)), shapes.hard
    )
    optimizer = nnx.Optimizer(model, optax.chain(clip, optax.sgd(1.0)), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        grads = nnx.grad(lambda m: squared_error(m(INPUTS)))(model)
        optimizer.update(model, grads)

    train_step(model, optimizer)
    x, y, kernel = (np.float64(a) for a in (INPUTS, TARGETS, KERNEL))
    gradient = 2 * x.T @ (x @ kernel - y)
    sizes = [math.sqrt((gradient[:, j] ** 2).sum()) for j in range(2)]
    owns = [math.sqrt((kernel[:, j] ** 2).sum()) for j in range(2)]
    for j in range(2):
        factor = min(1, 0.01 * owns[j] / sizes[j])
        wanted = kernel[:, j] - factor * gradient[:, j]
        np.testing.assert_allclose(model.kernel[...][:, j], wanted, rtol=1e-5)
    (record,) = records(optimizer.opt_state)
    params = nnx.state(model, nnx.Param)
    (norm,) = [
        n for name, n in by_name(record.norm, params).items() if "kernel" in name
    ]
    np.testing.assert_allclose(norm, max(sizes), rtol=1e-5)
    limits = by_name(record.limit, params)
    (limit,) = [c for name, c in limits.items() if "kernel" in name]
    wanted = 0.01 * owns[sizes.index(max(sizes))]
    np.testing.assert_allclose(limit, wanted, rtol=1e-5)


def test_nnx_optimizer_hands_a_known_norm_to_the_clip():
    model = linear()
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    grads = jax.tree.map(jnp.ones_like, grads)
    optimizer.update(model, grads, norm=8.0)
    np.testing.assert_allclose(model.kernel[...], KERNEL - 0.125, rtol=1e-6)
    np.testing.assert_allclose(model.bias[...], [-0.125, -0.125], rtol=1e-6)


class Counter(eqx.Module):
    linear: eqx.nn.Linear
    buffer: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return self.linear(x)


def equinox_model():
    model = Counter(eqx.nn.Linear(3, 2, key=jax.random.key(0)), jnp.arange(5), "reg")
    return eqx.tree_at(
        lambda m: (m.linear.weight, m.linear.bias),
        model,
        (jnp.array(KERNEL.T), jnp.array(BIAS)),
    )


def equinox_grads(model):
    return eqx.filter_grad(lambda m: squared_error(jax.vmap(m)(INPUTS)))(model)


def test_equinox_model_with_an_integer_buffer():
    model, tx = equinox_model(), recorded_sgd()
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(model, opt_state):
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(equinox_grads(model), opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    for _ in range(3):
        model, opt_state = train_step(model, opt_state)
    check_regression(model.linear.weight.T, model.linear.bias, opt_state)
    assert model.buffer.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", [eqx.is_inexact_array, eqx.is_array])
def test_equinox_adaptive_clip_takes_params_filtered_more_loosely(keep):
    """USERS.md pain 15: gradients without and params with the integer buffer."""
    model = equinox_model()
    tx = optaxclip.adaptive_grad_clip(0.01, axis=axes.equinox)
    params = eqx.filter(model, keep)

    @eqx.filter_jit
    def update(model):
        grads = equinox_grads(model)
        return grads, tx.update(grads, tx.init(params), params)[0]

    grads, updates = update(model)
    assert updates.buffer is None
    gradient = np.float64(grads.linear.weight)
    for j in range(2):
        own = math.sqrt((np.float64(KERNEL[:, j]) ** 2).sum())
        size = math.sqrt((gradient[j] ** 2).sum())
        wanted = gradient[j] * 0.01 * own / size
        np.testing.assert_allclose(updates.linear.weight[j], wanted, rtol=1e-5)


def test_equinox_modules_are_trees_of_axes_bounds_and_labels_though_callable():
    """A module with a `__call__` is a pytree, as optax takes it for masks."""
    model = equinox_model().linear
    assert callable(model)

    def tree(weight, bias):
        return eqx.tree_at(lambda m: (m.weight, m.bias), model, (weight, bias))

    updates = tree(jnp.array([[3.0, 4.0], [0.0, 0.5]]), jnp.array([6.0, 8.0]))
    by_axis = optaxclip.clip_by_unit_norm(1.0, axis=tree((1,), (0,)))
    found = by_axis.update(updates, None)[0]
    close((found.weight, found.bias), (np.array([[0.6, 0.8], [0, 0.5]]), [0.6, 0.8]))
    by_leaf = optaxclip.clip_by_leaf_norm(tree(100.0, 5.0))
    found = by_leaf.update(updates, by_leaf.init(updates))[0]
    close((found.weight, found.bias), (updates.weight, np.array([3.0, 4.0])))
    groups = optaxclip.clip_by_group_norm({"k": 100.0, "b": 5.0}, tree("k", "b"))
    found = groups.update(updates, None)[0]
    close((found.weight, found.bias), (updates.weight, np.array([3.0, 4.0])))


def test_equinox_tree_of_axes_covers_the_integer_buffer():
    parts = {"linear": equinox_model().linear, "buffer": jnp.arange(5)}
    axis = {"linear": axes.equinox, "buffer": axes.equinox}
    tx = optaxclip.clip_by_unit_norm(1.0, axis=axis)
    updates = eqx.filter(parts, eqx.is_inexact_array)
    weight = tx.update(updates, None)[0]["linear"].weight
    for row, clipped in zip(KERNEL.T.astype(np.float64), weight, strict=True):
        wanted = row * min(1, 1 / math.sqrt((row * row).sum()))
        np.testing.assert_allclose(clipped, wanted, rtol=1e-6)


def test_keras_custom_loop_with_lists_of_variables():
    """Keras' stateless API: lists of values beside a list of variables with names."""
    variables = [
        types.SimpleNamespace(path="sequential/dense/kernel", shape=(3, 2)),
        types.SimpleNamespace(path="sequential/dense/bias", shape=(2,)),
    ]
    trainable = [jnp.array(KERNEL), jnp.array(BIAS)]
    units = optaxclip.clip_by_unit_norm(1e6, axis=axes.keras(variables))
    tx = optax.chain(units, recorded_sgd())

    @jax.jit
    def train_step(trainable, opt_state):
        def loss(values):
            kernel, bias = values
            return squared_error(INPUTS @ kernel + bias)

        updates, opt_state = tx.update(jax.grad(loss)(trainable), opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    opt_state = tx.init(trainable)
    for _ in range(3):
        trainable, opt_state = train_step(trainable, opt_state)
    check_regression(*trainable, opt_state)
    clipped, _ = optaxclip.clip_by_unit_norm(1.0, axis=axes.keras(variables)).update(
        [jnp.array([[3.0, 0.3], [4.0, 0.4], [0.0, 0.0]]), jnp.array([6.0, 8.0])], None
    )
    close(clipped, [np.array([[0.6, 0.3], [0.8, 0.4], [0, 0]]), np.array([0.6, 0.8])])


# Checkpoints.


def save_and_restore_standard(path, tree, like):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


def save_and_restore_v1(path, tree, like):
    ocp_v1.save(path, tree)
    return ocp_v1.load(path, like)


def abstract(function, *args):
    """Shapes, dtypes and, for orbax, where the arrays are to go."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        jax.eval_shape(function, *args),
    )


STATES = {
    "constant": lambda: optaxclip.clip_by_global_norm(1.0),
    "schedule": lambda: optaxclip.clip_by_leaf_norm(optax.linear_schedule(1, 0, 9)),
    "recorded": lambda: optaxclip.clip_by_global_norm(recorded(1.0)),
    "recorded leaves": lambda: optaxclip.clip_by_leaf_norm(recorded(1.0)),
    "recorded mask": lambda: optax.masked(
        optaxclip.clip_by_leaf_norm(recorded(1.0)), ONLY_BIAS
    ),
    "recorded schedules": lambda: optaxclip.clip_by_group_norm(
        recorded({"bias": 1.0, "kernel": optax.linear_schedule(1, 0, 9)}), LABELS
    ),
}


def run(tx, state, steps):
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(GRADS, state, PARAMS)
    return updates, state


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (f.shape, f.dtype) == (w.shape, w.dtype)
        np.testing.assert_array_equal(f, w)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("orbax", [save_and_restore_standard, save_and_restore_v1])
def test_orbax_restores_a_chain_and_training_goes_on_as_if_never_stopped(
    orbax, name, tmp_path
):
    tx = optax.chain(STATES[name](), optax.adam(0.1))
    _, state = run(tx, tx.init(PARAMS), 2)
    restored = orbax(tmp_path / "state", state, abstract(tx.init, PARAMS))
    same(restored, state)
    same(run(tx, restored, 1), run(tx, state, 1))


@pytest.mark.parametrize("orbax", [save_and_restore_standard, save_and_restore_v1])
def test_a_checkpoint_of_optax_goes_on_with_the_clip_of_the_same_name(orbax, tmp_path):
    def chain(library):
        return optax.chain(
            library.clip_by_global_norm(1.0),
            library.clip(0.5),
            library.clip_by_block_rms(0.4),
            library.adaptive_grad_clip(0.1),
            optax.adam(0.1),
        )

    theirs, ours = chain(optax), chain(optaxclip)
    _, state = run(theirs, theirs.init(PARAMS), 2)
    restored = orbax(tmp_path / "state", state, abstract(ours.init, PARAMS))
    same(restored, state)
    updates, after = run(ours, restored, 1)
    wanted, wanted_after = run(theirs, state, 1)
    assert jax.tree.structure(after) == jax.tree.structure(wanted_after)
    close(updates, wanted, rtol=1e-5)


# Transformations of JAX.


@pytest.mark.parametrize("name", FACTORIES)
def test_a_parameter_that_the_loss_does_not_use_gets_no_update(name):
    """Its gradient is a constant zero in the compiled step, which XLA folds."""
    factory, kwargs = FACTORIES[name]
    if "labels" in kwargs:
        kwargs = kwargs | {"labels": {"used": "bias", "unused": "kernel"}}
    tx = factory(**kwargs)

    @jax.jit
    def train_step(params):
        grads = jax.grad(lambda p: jnp.sum(p["used"] ** 2))(params)
        return tx.update(grads, tx.init(params), params)[0]

    params = {"used": jnp.array([3.0, 4.0]), "unused": jnp.array([[1.0, 2.0]])}
    updates = train_step(params)
    assert updates["unused"].tolist() == [[0.0, 0.0]]
    assert 0 < float(jnp.abs(updates["used"]).max()) < 8


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-30, 1e30])
@pytest.mark.parametrize("shape", [(), (2,), (200, 200)], ids=str)
def test_updates_that_are_constants_of_the_compiled_step_are_clipped(value, shape):
    updates = jax.jit(
        lambda: optaxclip.clip_by_leaf_norm(1.0).update(jnp.full(shape, value), None)[0]
    )()
    norm = value * math.sqrt(math.prod(shape))
    factor = min(1, 1 / norm) if norm else 1
    close(updates, np.full(shape, np.float32(value) * np.float64(factor)), rtol=1e-5)


def test_a_record_is_carried_through_scan():
    sizes = np.array([0.5, 2.0, 1.0, 8.0, np.inf], np.float32)
    tx = optax.chain(optaxclip.clip_by_global_norm(recorded(1.0)), optax.scale(1.0))

    def one(state, size):
        updates, state = tx.update({"u": jnp.array([0.6, 0.8]) * size}, state)
        return state, (updates["u"], records(state)[0])

    init = tx.init({"u": jnp.zeros(2)})
    state, (updates, history) = jax.jit(lambda s: jax.lax.scan(one, s, sizes))(init)
    np.testing.assert_allclose(history.norm, sizes, rtol=1e-6)
    np.testing.assert_allclose(history.scale[:4], [1, 0.5, 1, 0.125], rtol=1e-6)
    assert history.steps.tolist() == [1, 2, 3, 4, 5]
    assert history.clipped_steps[jnp.array([0, 1, 3])].tolist() == [0, 1, 2]
    assert history.nonfinite_steps.tolist() == [0, 0, 0, 0, 1]
    np.testing.assert_allclose(updates[0], [0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(updates[3], [0.6, 0.8], rtol=1e-6)
    assert np.isnan(updates[4]).all()
    assert jax.tree.structure(state) == jax.tree.structure(init)


def test_a_record_inside_multisteps_is_carried_through_scan():
    clip = optaxclip.clip_by_leaf_norm(recorded(bounds.relative(0.1)))
    tx = optax.MultiSteps(optax.chain(clip, optax.adam(0.1)), 2)
    tx = tx.gradient_transformation()

    def one(carry, _):
        params, state = carry
        updates, state = tx.update(GRADS, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (PARAMS, tx.init(PARAMS))
    (_, state), _ = jax.jit(lambda c: jax.lax.scan(one, c, length=5))(carry)
    (record,) = records(state)
    assert int(record.steps) == int(record.clipped_steps) == 2
    assert {k: float(v) for k, v in optaxclip.by_name(record.norm, GRADS).items()} == {
        "b": 5.0,
        "w": 12.0,
    }


@pytest.mark.parametrize(
    "factory",
    [
        optaxclip.clip,
        optaxclip.clip_by_block_rms,
        optaxclip.clip_by_leaf_norm,
        optaxclip.clip_by_unit_norm,
        optaxclip.clip_by_global_norm,
        optaxclip.normalize_by_global_norm,
        optaxclip.normalize_by_leaf_norm,
        optaxclip.adaptive_grad_clip,
        lambda limit: optaxclip.clip_by_value(-1.0, limit),
        lambda limit: optaxclip.clip_by_group_norm(
            {"bias": limit, "kernel": 1}, LABELS
        ),
        lambda limit: optaxclip.clip_by_global_norm(recorded(limit)),
    ],
    ids=[
        *"clip rms leaf unit global normalize normalize-leaf agc".split(),
        *"value group record".split(),
    ],
)
def test_vmap_over_limits_is_a_loop_over_limits(factory):
    limits = [0.0, 0.01, 1.0, 6.5, 100.0, math.inf]

    def one(limit):
        tx = factory(limit)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS)

    # Compiled once, and not once per limit, but without vmap.
    looped = list(map(jax.jit(one), jnp.array(limits)))
    mapped = jax.jit(jax.vmap(one))(jnp.array(limits))
    for i, wanted in enumerate(looped):
        close(jax.tree.map(lambda x, i=i: x[i], mapped), wanted)


def test_vmap_over_limits_of_the_global_norm_on_literals():
    limits = jnp.array([0.0, 1.0, 6.5, 13.0, math.inf])

    def b_of(limit):
        return optaxclip.clip_by_global_norm(limit).update(GRADS, None)[0]["b"]

    wanted = [[0, 0], [3 / 13, 4 / 13], [1.5, 2], [3, 4], [3, 4]]
    close(jax.vmap(b_of)(limits), wanted)


def test_vmap_over_seeds_keeps_a_record_per_seed():
    tx = optax.chain(optaxclip.clip_by_global_norm(recorded(1.0)), optax.adam(0.1))
    sizes = jnp.array([0.5, 2.0, 4.0])
    params = jnp.zeros((3, 2))
    grads = sizes[:, None] * jnp.array([0.6, 0.8])
    state = jax.vmap(tx.init)(params)
    _, state = jax.jit(jax.vmap(tx.update))(grads, state, params)
    (record,) = records(state)
    close(record.norm, [0.5, 2, 4])
    close(record.scale, [1, 0.5, 0.25])
    assert record.clipped_steps.tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", STATES)
def test_params_and_state_are_donated_twice(name):
    tx = optax.chain(STATES[name](), optax.adam(0.1))

    def train_step(params, state):
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    def fresh():
        params = jax.tree.map(jnp.array, PARAMS)
        return params, tx.init(params)

    donated = jax.jit(train_step, donate_argnums=(0, 1))
    plain = jax.jit(train_step)
    other_state = tx.init(PARAMS)
    first = fresh()
    second = donated(*first)
    third = donated(*second)
    # What a step does not read, such as the last norm, is not handed over to it.
    for params, (_, adam) in (first, second):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, adam)))
    same(third, plain(*plain(*fresh())))
    for leaf in jax.tree.leaves(other_state):
        assert not leaf.is_deleted()


# Outside a chain.


@pytest.mark.parametrize("name", sorted(set(FACTORIES) - {"adaptive_grad_clip"}))
def test_a_stateless_clip_updates_without_state_and_params(name):
    tx = make(name)
    check_clipped(name, tx.update(GRADS, None, None)[0])
    check_clipped(name, jax.jit(lambda g: tx.update(g, None, None)[0])(GRADS))
    assert tx.update(GRADS, None, None)[1] is None
    assert tx.init(PARAMS) == optax.EmptyState()


def test_an_adaptive_clip_needs_params_and_no_state():
    tx = make("adaptive_grad_clip")
    check_clipped("adaptive_grad_clip", tx.update(GRADS, None, PARAMS)[0])
    with pytest.raises(ValueError) as refused:
        tx.update(GRADS, None, None)
    assert str(refused.value) == (
        "adaptive_grad_clip: needs params, got None. Call tx.update(updates, state, "
        "params)."
    )


def test_check_finite_updates_without_state_and_params():
    updates, state = optaxclip.check_finite().update(GRADS, None, None)
    assert updates is GRADS
    assert state is None


@pytest.mark.parametrize("name", FACTORIES)
def test_extra_arguments_for_others_pass_by_a_clip(name):
    heard = []

    def listen(updates, state, params=None, *, loss, **extra):
        heard.append((loss, sorted(extra)))
        return updates, state

    listener = optax.GradientTransformationExtraArgs(optax.init_empty_state, listen)
    tx = optax.chain(make(name), listener)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, loss=2.5, value=1.0)
    check_clipped(name, updates)
    assert heard == [(2.5, ["value"])]


# A norm that is known.


def equations(jaxpr):
    """The equations of a jaxpr and of those inside it."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += equations(inner)
    return found


def measurements(function, *args):
    """The primitives that measure arrays; a scalar is not measured."""
    measuring = ("reduce", "while", "dot", "scan", "sort", "integer_pow")
    eqns = equations(jax.make_jaxpr(function)(*args).jaxpr)
    return sorted(
        {
            eqn.primitive.name
            for eqn in eqns
            if eqn.primitive.name.startswith(measuring) and eqn.invars[0].aval.ndim
        }
    )


KNOWN = {
    "chain": lambda clip: optax.chain(clip, optax.scale(1.0)),
    "chain of chains": lambda clip: optax.chain(optax.chain(optax.chain(clip))),
    "named_chain": lambda clip: optax.named_chain(("clip", clip)),
    "masked": lambda clip: optax.masked(clip, {"b": True, "w": True}),
    "partition": lambda clip: optax.partition({"all": clip}, {"b": "all", "w": "all"}),
}


@pytest.mark.parametrize("nesting", KNOWN)
def test_a_known_norm_reaches_the_clip_and_nothing_is_measured(nesting):
    tx = KNOWN[nesting](optaxclip.clip_by_global_norm(1.0))
    state = tx.init(PARAMS)

    def known(grads, norm):
        return tx.update(grads, state, norm=norm)[0]

    close(known(GRADS, 26.0), jax.tree.map(lambda g: np.float64(g) / 26, GRADS))
    close(known(GRADS, 1.0), GRADS)
    assert measurements(known, GRADS, 26.0) == []
    assert measurements(lambda grads: tx.update(grads, state)[0], GRADS)


def test_a_known_norm_is_recorded_and_nothing_is_measured():
    tx = optax.chain(optaxclip.clip_by_global_norm(recorded(1.0)), optax.scale(1.0))
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS, state, norm=jnp.float32(26.0))
    assert scalars(records(state)[0])["norm"] == 26.0

    known = lambda grads, state: tx.update(grads, state, norm=26.0)
    assert measurements(known, GRADS, state) == []
    assert measurements(tx.update, GRADS, state)


def test_a_known_norm_reaches_every_clip_by_global_norm_and_no_other():
    tx = optax.chain(
        optaxclip.clip_by_leaf_norm(recorded(100.0)),
        optaxclip.clip_by_global_norm(recorded(26.0)),
        optaxclip.normalize_by_global_norm(1.0),
    )
    updates, state = tx.update(GRADS, tx.init(PARAMS), norm=26.0)
    close(updates, jax.tree.map(lambda g: np.float64(g) / 26, GRADS))
    leafwise, whole = records(state)
    assert {
        k: float(v) for k, v in optaxclip.by_name(leafwise.norm, GRADS).items()
    } == {"b": 5.0, "w": 12.0}
    assert float(whole.norm) == 26.0


# Finding records.

NESTINGS: dict[str, Any] = {
    "alone": lambda clip: clip,
    "chain": lambda clip: optax.chain(optax.identity(), clip, optax.adam(0.1)),
    "chain of chains": lambda clip: optax.chain(optax.chain(clip), optax.sgd(0.1)),
    "named_chain": lambda clip: optax.named_chain(("a", clip), ("b", optax.sgd(0.1))),
    "masked": lambda clip: optax.masked(clip, {"b": True, "w": True}),
    "mask by callable": lambda clip: optax.masked(
        clip, lambda tree: jax.tree.map(lambda _: True, tree)
    ),
    "partition": lambda clip: optax.partition(
        {"all": optax.chain(clip, optax.sgd(0.1)), "none": optax.set_to_zero()},
        {"b": "all", "w": "all"},
    ),
    "MultiSteps": lambda clip: optax.MultiSteps(clip, 1).gradient_transformation(),
    "MultiSteps outside": lambda clip: optax.chain(
        clip, optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    ),
    "inject_hyperparams": lambda clip: optax.inject_hyperparams(
        lambda rate: optax.chain(clip, optax.sgd(rate))
    )(rate=0.1),
    "apply_if_finite": lambda clip: optax.apply_if_finite(
        optax.chain(clip, optax.adam(0.1)), 3
    ),
    "conditionally_transform": lambda clip: optax.conditionally_transform(
        clip, lambda step: step >= 0
    ),
    "everything": lambda clip: optax.apply_if_finite(
        optax.MultiSteps(
            optax.named_chain(
                ("a", optax.masked(optax.chain(clip), {"b": True, "w": True})),
                ("b", optax.inject_hyperparams(optax.adam)(learning_rate=0.1)),
            ),
            1,
        ).gradient_transformation(),
        3,
    ),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_records_finds_the_record_in(name):
    tx = NESTINGS[name](optaxclip.clip_by_global_norm(recorded(1.0)))
    state = tx.init(PARAMS)
    (record,) = records(state)
    assert scalars(record) == {
        "norm": 0.0,
        "limit": 0.0,
        "scale": 1.0,
        "clipped": 0.0,
        "steps": 0,
        "clipped_steps": 0,
        "nonfinite_steps": 0,
    }
    _, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    for found in (state, jax.device_get(state)):
        (record,) = records(found)
        assert scalars(record) == {
            "norm": 13.0,
            "limit": 1.0,
            "scale": float(np.float32(1) / np.float32(13)),
            "clipped": 1.0,
            "steps": 1,
            "clipped_steps": 1,
            "nonfinite_steps": 0,
        }


@pytest.mark.parametrize(
    "bound, limits",
    [
        (bounds.at_most(recorded(3.0), 1.0), [3]),
        (bounds.at_least(1.0, recorded(3.0)), [3]),
        (bounds.at_most(recorded(3.0), recorded(2.0)), [3, 2]),
        (recorded(bounds.at_most(3.0, 2.0)), [2]),
        (recorded(bounds.at_most(recorded(3.0), 2.0)), [2, 3]),
        (recorded(optax.constant_schedule(2.0)), [2]),
        (bounds.relative(recorded(0.5)), [0.5]),
    ],
    ids="at_most at_least two outer both schedule relative".split(),
)
def test_records_finds_records_inside_bounds(bound, limits):
    _, state = step(optaxclip.clip_by_global_norm(bound))
    assert [float(record.limit) for record in records(state)] == limits
    assert [int(record.steps) for record in records(state)] == [1] * len(limits)


def test_records_finds_one_record_per_label():
    tx = optaxclip.clip_by_group_norm(
        {"bias": recorded(1.0), "kernel": recorded(2.0)}, LABELS
    )
    _, state = step(tx)
    found = [(float(*r.norm), float(*r.limit)) for r in records(state)]
    assert found == [(5.0, 1.0), (12.0, 2.0)]


@pytest.mark.parametrize("state", [(), None, optax.EmptyState(), {"a": jnp.ones(2)}])
def test_records_of_a_state_without_any_is_empty(state):
    assert records(state) == []


def test_records_of_an_unrecorded_clip_is_empty():
    _, state = step(optax.chain(make("clip_by_global_norm"), optax.adam(0.1)))
    assert records(state) == []
