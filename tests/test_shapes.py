"""Shapes against their table, at the edges too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import new_magnitude

from optaxclip import shapes

NAMES = [
    "hard",
    "rational",
    "sqrt",
    "tanh",
    "normalize",
    "drop",
    "floor",
    "reciprocal",
]
VALUES = [0.0, 1e-30, 1e-3, 0.5, 1.0, 1.5, 1e3, 1e30, math.inf]

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [0.0, 1e-30, 1.0, 1e30])
def test_the_table(name, limit):
    shape = getattr(shapes, name)
    got = shape(jnp.array(VALUES), jnp.float32(limit))
    want = [new_magnitude(name, m, limit) for m in VALUES]
    np.testing.assert_allclose(got, want, rtol=4e-7, atol=1e-37)


@pytest.mark.parametrize("name", NAMES)
def test_nan_gives_nan(name):
    shape = getattr(shapes, name)
    nan = jnp.float32(jnp.nan)
    assert jnp.isnan(shape(nan, jnp.float32(1.0)))
    assert jnp.isnan(shape(jnp.float32(2.0), nan))
    assert jnp.isnan(shape(jnp.float32(0.5), nan))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_finite_everywhere(name):
    shape = getattr(shapes, name)
    for limit in (0.0, 1e-20, 1.0, 1e20):
        for m in (0.0, 1e-20, 1.0, 2.0, 1e20):
            slopes = jax.grad(shape, (0, 1))(jnp.float32(m), jnp.float32(limit))
            assert np.isfinite(np.asarray(slopes)).all(), (m, limit)


@pytest.mark.parametrize("name", ["hard", "drop", "reciprocal"])
def test_a_magnitude_within_its_limit_keeps_its_bits(name):
    m = jnp.array([0.0, 1e-37, 0.1, 1.0])
    assert getattr(shapes, name)(m, jnp.float32(1.0)).tobytes() == m.tobytes()


def test_reciprocal_falls_to_its_centre():
    m = jnp.array([1.0, 2.0, 3.0, 6.0, jnp.inf])
    got = shapes.reciprocal(m, jnp.float32(2.0), centre=1.0)
    np.testing.assert_allclose(got, [1.0, 2.0, 1.5, 1.2, 1.0], rtol=1e-6)
