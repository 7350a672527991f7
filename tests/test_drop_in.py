"""optax's own tests of its clipping functions, run against ours."""

import inspect
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.transforms import _clipping, _clipping_test

import optaxclip

EIGHT = [
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "adaptive_grad_clip",
    "unitwise_norm",
    "unitwise_clip",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
]
SUITE = unittest.TestLoader().getTestCaseNames(_clipping_test.ClippingTest)


@pytest.fixture
def replaced(monkeypatch):
    for name in EIGHT:
        monkeypatch.setattr(_clipping, name, getattr(optaxclip, name))


@pytest.mark.parametrize("name", SUITE)
def test_of_optax(replaced, name):
    result = unittest.TestResult()
    _clipping_test.ClippingTest(name).run(result)
    assert result.testsRun == 1
    assert not result.failures + result.errors, (result.failures + result.errors)[0][1]


@pytest.mark.parametrize("name", EIGHT)
def test_signatures_begin_as_those_of_optax(name):
    theirs = inspect.signature(getattr(optax, name, getattr(_clipping, name)))
    ours = inspect.signature(getattr(optaxclip, name))
    head = list(ours.parameters.values())[: len(theirs.parameters)]
    for a, b in zip(head, theirs.parameters.values(), strict=True):
        assert (a.name, a.kind, a.default) == (b.name, b.kind, b.default)


@pytest.mark.parametrize("name", EIGHT[:4])
def test_stateless_as_in_optax(name):
    ours, theirs = getattr(optaxclip, name)(1.0), getattr(optax, name)(1.0)
    assert isinstance(ours, optax.GradientTransformation)
    updates = {"w": jnp.array([3.0, 4.0])}
    assert ours.init(updates) == theirs.init(updates)
    for state in (None, theirs.init(updates)):
        got, kept = ours.update(updates, state, updates)
        want, _ = theirs.update(updates, state, updates)
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)
        assert kept == state


def test_unitwise_functions_equal_those_of_optax():
    rng = np.random.default_rng(0)
    for shape in ((), (3,), (4, 3), (2, 4, 3), (2, 2, 4, 3), (2, 2, 2, 4, 3), (1, 6)):
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        g, m = optaxclip.unitwise_norm(x), 0.5 * optaxclip.unitwise_norm(x * 0 + 1)
        np.testing.assert_allclose(g, _clipping.unitwise_norm(x), rtol=1e-6)
        np.testing.assert_allclose(
            optaxclip.unitwise_clip(g, m, x),
            _clipping.unitwise_clip(g, m, x),
            rtol=1e-6,
        )


def test_unitwise_clip_is_loud_and_keeps_dtypes():
    grad = jnp.array([1.0, jnp.inf], jnp.bfloat16)
    norm = jnp.full(2, jnp.inf)
    out = optaxclip.unitwise_clip(norm, jnp.ones(2), grad)
    assert out.dtype == jnp.bfloat16 and np.isnan(np.asarray(out, np.float32)).all()
    same = optaxclip.unitwise_clip(norm, norm, grad)
    assert np.asarray(same).tobytes() == np.asarray(grad).tobytes()
    with pytest.raises(ValueError, match="must have one shape"):
        optaxclip.unitwise_clip(jnp.ones(1), jnp.ones(2), grad)


def test_replacing_optax_in_a_training_run_gives_the_same_run():
    def loss(w, x):
        return jnp.mean((jnp.tanh(x @ w) - 0.5) ** 2)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)

    def run(clip):
        tx = optax.chain(clip(0.1), optax.adam(0.05))

        def step(carry, _):
            w, state = carry
            grads = jax.grad(loss)(w, x)
            updates, state = tx.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), loss(w, x)

        w = jnp.ones(4)
        return jax.lax.scan(step, (w, tx.init(w)), None, length=50)[1]

    for name in EIGHT[:4]:
        np.testing.assert_allclose(
            run(getattr(optaxclip, name)), run(getattr(optax, name)), rtol=1e-4
        )
