"""Per-example clipping against a loop over examples in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import norm, wide

import optaxclip


def grads(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(6, 3, 2)), dtype),
        "b": jnp.asarray(rng.normal(size=(6,)), dtype),
    }


@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_global(limit, dtype):
    g = grads(dtype)
    sums = {name: 0.0 for name in g}
    clipped = 0
    for i in range(6):
        n = norm([leaf[i] for leaf in g.values()])
        scale = min(1.0, limit / n)
        clipped += scale < 1
        for name in g:
            sums[name] = sums[name] + wide(g[name][i]) * scale
    got, count = jax.jit(optaxclip.per_example_global_norm_clip)(g, limit)
    assert int(count) == clipped
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    for name in g:
        assert got[name].dtype == dtype
        np.testing.assert_allclose(
            wide(got[name]), sums[name], rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("uniform", [True, False])
def test_layers(uniform):
    g = grads()
    got, counts = optaxclip.per_example_layer_norm_clip(g, 1.0, uniform)
    for name, size in (("a", 6), ("b", 1)):
        limit = math.sqrt(0.5 if uniform else size / 7)
        norms = [norm([row]) for row in g[name]]
        want = sum(wide(r) * min(1, limit / n) for r, n in zip(g[name], norms))
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)
        assert int(counts[name]) == sum(n > limit for n in norms)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_example_that_is_not_finite_is_loud(bad):
    g = {"a": jnp.ones((3, 2)).at[1, 0].set(bad)}
    total, _ = optaxclip.per_example_global_norm_clip(g, 1.0)
    assert np.isnan(np.asarray(total["a"])).all()


def test_huge_and_tiny_examples():
    g = [jnp.array([[3e30, 4e30], [3e-30, 4e-30]])]
    (total,), count = optaxclip.per_example_global_norm_clip(g, 1e-3)
    np.testing.assert_allclose(total, [6e-4, 8e-4], rtol=1e-6)
    assert int(count) == 1


@pytest.mark.parametrize(
    "function",
    [optaxclip.per_example_global_norm_clip, optaxclip.per_example_layer_norm_clip],
)
def test_bad_input(function):
    with pytest.raises(ValueError, match=r"0th axis, got shapes \[\(2, 3\), \(3,\)\]"):
        function([jnp.ones((2, 3)), jnp.ones(3)], 1.0)
    with pytest.raises(ValueError, match="0th axis"):
        function([jnp.float32(1)], 1.0)
    with pytest.raises(ValueError, match=r"l2_norm_clip must be >= 0, got .*=-1.0"):
        function([jnp.ones((2, 3))], -1.0)
