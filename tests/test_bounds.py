"""Bounds: what a clip takes as one, and what they give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import bounds, clip_by, scopes

pytestmark = pytest.mark.usefixtures("strict")
UPDATES = {
    "hidden": {"w": jnp.array([3.0, 4.0]), "b": jnp.array([5.0])},
    "output": jnp.array([6.0, 8.0]),
}


def norms_after(tx, params=None, updates=UPDATES):
    out, _ = tx.update(updates, tx.init(updates), params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): round(
            float(np.linalg.norm(np.asarray(leaf))), 4
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(out)
    }


def test_a_prefix_tree_of_numbers_schedules_and_bounds():
    limits = {
        "hidden": 1.0,
        "output": optax.constant_schedule(2.0),
    }
    want = {"hidden/w": 1.0, "hidden/b": 1.0, "output": 2.0}
    assert norms_after(optaxclip.clip_by_leaf_norm(limits)) == want
    limits = {
        "hidden": {"w": 1.0, "b": bounds.recorded(1.0)},
        "output": bounds.at_most(2.0, 9.0),
    }
    assert norms_after(optaxclip.clip_by_leaf_norm(limits)) == want
    assert (
        norms_after(
            optaxclip.clip_by_leaf_norm({"hidden": 1.0, "output": jnp.float32(2)})
        )
        == want
    )


def test_limits_by_label():
    labels = {"hidden": "h", "output": "o"}
    tx = optaxclip.clip_by_group_norm({"h": 5.0, "o": 1.0}, labels)
    out = norms_after(tx)
    assert out["output"] == 1.0
    np.testing.assert_allclose(
        np.hypot(out["hidden/w"], out["hidden/b"]), 5.0, rtol=1e-4
    )
    with pytest.raises(
        ValueError, match=r"max_norms has no value for o, got values for h"
    ):
        norms_after(optaxclip.clip_by_group_norm({"h": 5.0}, labels))
    with pytest.raises(
        ValueError, match=r"max_norms has a value for x, which does not"
    ):
        norms_after(
            optaxclip.clip_by_group_norm({"h": 5.0, "o": 1.0, "x": 2.0}, labels)
        )


def test_a_prefix_that_does_not_fit_names_the_place():
    with pytest.raises(
        ValueError, match=r"clip_by_leaf_norm: max_norm has no value for output"
    ):
        norms_after(optaxclip.clip_by_leaf_norm({"hidden": 1.0}))
    with pytest.raises(ValueError, match=r"clip_by_global_norm: max_norm"):
        norms_after(optaxclip.clip_by_global_norm({"hidden": 1.0, "output": 2.0}))
    with pytest.raises(ValueError, match=r"must be >= 0, got max_norm=-2.0"):
        optaxclip.clip_by_leaf_norm({"hidden": 1.0, "output": -2.0})


def test_a_limit_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"must be a scalar or fit the magnitudes"):
        norms_after(optaxclip.clip_by_leaf_norm(jnp.ones(3)))


def test_a_schedule_counts_steps_from_zero():
    tx = optaxclip.clip_by_global_norm(lambda step: 1.0 + step.astype(jnp.float32))
    u = jnp.array([30.0, 40.0])
    state = tx.init(u)
    for step in range(3):
        out, state = tx.update(u, state)
        np.testing.assert_allclose(np.linalg.norm(out), 1.0 + step, rtol=1e-6)
    assert int(state.step) == 3


def test_relative_is_a_share_of_the_parameters():
    params = {
        "hidden": {"w": jnp.array([0.0, 1.0]), "b": jnp.array([0.0])},
        "output": jnp.array([0.0, 2.0]),
    }
    tx = clip_by(scopes.leaf(), bounds.relative(0.5, floor=0.1))
    want = {"hidden/w": 0.5, "hidden/b": 0.05, "output": 1.0}
    assert norms_after(tx, params) == want


def test_relative_to_a_bound_of_the_ratio():
    ratio = bounds.recorded(optax.constant_schedule(0.5))
    tx = clip_by(scopes.tree(), bounds.relative(ratio))
    params = jnp.array([2.0])
    _, state = tx.update(jnp.array([6.0]), tx.init(params), params)
    (record,) = optaxclip.records(state)
    assert float(record.norm) == 3.0 and float(record.limit) == 0.5
    np.testing.assert_allclose(record.scale, 1 / 6, rtol=1e-6)


def test_at_most_and_at_least():
    u = jnp.array([3.0, 4.0])
    size = lambda bound: float(
        np.linalg.norm(clip_by(scopes.tree(), bound).update(u, None)[0])
    )
    np.testing.assert_allclose(size(bounds.at_most(1.0, 2.0, 3.0)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(size(bounds.at_least(1.0, 2.0)), 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match="at_most: values must not be empty"):
        bounds.at_most()


def test_states_of_combined_bounds_are_kept_apart():
    tx = optaxclip.clip_by_global_norm(
        bounds.at_most(
            bounds.recorded(9.0), lambda step: 10.0 - 9.0 * step.astype(jnp.float32)
        )
    )
    u = jnp.array([3.0, 4.0])
    state = tx.init(u)
    for want in (5.0, 1.0):
        out, state = jax.jit(tx.update)(u, state)
        np.testing.assert_allclose(np.linalg.norm(out), want, rtol=1e-6)
    (record,) = optaxclip.records(state)
    # It learns what all of them together kept.
    assert int(record.clipped_steps) == 1
    np.testing.assert_allclose(record.scale, 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    "params, message",
    [
        (None, r"adaptive_grad_clip: needs params, got None\. Call tx\.update"),
        ({"hidden": UPDATES["hidden"]}, r"got no param at output"),
        (
            {**UPDATES, "output": jnp.ones(3)},
            r"got \(3,\) for an update of shape \(2,\) at output",
        ),
        (
            {**UPDATES, "output": None},
            r"got NoneType for an update of shape \(2,\) at output",
        ),
    ],
)
def test_params_that_do_not_fit_are_refused(params, message):
    tx = optaxclip.adaptive_grad_clip(0.01)
    with pytest.raises(ValueError, match=message):
        tx.update(UPDATES, tx.init(UPDATES), params)


def test_a_missing_gradient_is_no_error():
    updates = {**UPDATES, "output": None}
    tx = optaxclip.adaptive_grad_clip(0.01)
    out, _ = tx.update(updates, tx.init(UPDATES), UPDATES)
    assert out["output"] is None
