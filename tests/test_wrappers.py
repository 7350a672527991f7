"""zero_nonfinite and check_finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import optaxclip
from optaxclip.wrappers import ZeroNonfiniteState

BAD = {
    "w": jnp.array([3.0, jnp.nan, jnp.inf]),
    "z": jnp.array([1.0 + 1j * jnp.nan, 2j]),
    "n": jnp.arange(2),
    "none": None,
}


def test_zero_nonfinite_replaces_and_counts():
    tx = optaxclip.zero_nonfinite()
    state = tx.init(BAD)
    for total in (3, 6):
        out, state = jax.jit(tx.update)(BAD, state)
        np.testing.assert_array_equal(out["w"], [3, 0, 0])
        np.testing.assert_array_equal(out["z"], [0, 2j])
        assert (int(state.zeroed), int(state.total)) == (3, total)
    out, state = tx.update({**BAD, "w": jnp.ones(3), "z": jnp.ones(1)}, state)
    assert (int(state.zeroed), int(state.total)) == (0, 6)


def test_zero_nonfinite_leaves_finite_bits_alone():
    u = jnp.array([-0.0, 1e-40, 3e38], jnp.float32)
    out, _ = optaxclip.zero_nonfinite().update(u, optaxclip.zero_nonfinite().init(u))
    assert np.asarray(out).tobytes() == np.asarray(u).tobytes()


def test_zero_nonfinite_count_saturates():
    tx = optaxclip.zero_nonfinite()
    full = ZeroNonfiniteState(jnp.int32(0), jnp.int32(2**31 - 2))
    _, state = tx.update(BAD, full)
    assert int(state.total) == 2**31 - 1


def test_check_finite_names_the_leaf_and_counts():
    tx = optax.chain(optaxclip.check_finite(), optaxclip.clip_by_global_norm(1.0))
    run = jax.jit(checkify.checkify(lambda u: tx.update(u, tx.init(u))[0]))
    error, _ = run({"layer": {"w": jnp.array([1.0, jnp.nan, jnp.inf])}})
    assert "2 of 3 elements NaN or inf at layer/w" in error.get()
    error, out = run({"layer": {"w": jnp.array([3.0, 4.0])}})
    error.throw()
    np.testing.assert_allclose(out["layer"]["w"], [0.6, 0.8], rtol=1e-6)


def test_check_finite_is_not_there_unless_checked():
    tx = optaxclip.check_finite()
    with_it = jax.make_jaxpr(lambda u: tx.update(u, tx.init(u))[0])(jnp.ones(3))
    lowered = jax.jit(lambda u: tx.update(u, tx.init(u))[0]).lower(jnp.ones(3))
    assert "is_finite" not in lowered.compile().as_text(), with_it
    out, _ = jax.jit(tx.update)(BAD["w"], tx.init(BAD["w"]))
    np.testing.assert_array_equal(out, BAD["w"])


@pytest.mark.parametrize("make", [optaxclip.zero_nonfinite, optaxclip.check_finite])
def test_empty_trees(make):
    tx = make()
    for empty in ({}, None, [None]):
        out, _ = tx.update(empty, tx.init(empty))
        assert jax.tree.structure(out) == jax.tree.structure(empty)
