"""Norms against float64 sums over the whole range of floating point."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import norm
from tables import as_tree

import optaxclip
from optaxclip import norms

pytestmark = pytest.mark.usefixtures("strict")
ORDERS = [None, 1, math.inf, 0.5, 1.5, 3, 10, "rms"]


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("magnitude", [1e-35, 1e-30, 1e-19, 1.0, 1e19, 1e30, 1e37])
def test_tree_norm_over_the_range_of_float32(ord, magnitude):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) * magnitude for s in ((), (3,), (4, 5))]
    arrays = [np.asarray(a, np.float32) for a in arrays]
    want = norm(arrays, 2 if ord is None else ord)
    if want > 3e38:
        return
    np.testing.assert_allclose(norms.tree_norm(arrays, ord), want, rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 6),
        elements=st.floats(-126, 127).map(lambda e: np.float32(2.0**e)),
    )
)
def test_the_euclidean_norm_of_any_mixture_of_magnitudes(x):
    want = norm([x])
    if want < 3e38:
        np.testing.assert_allclose(norms.tree_norm(jnp.asarray(x)), want, rtol=1e-6)


def test_many_small_elements_beside_one_large_are_not_lost():
    # Each of the small squares alone is below the smallest normal float32.
    x = np.full(2**20, 2.0**-63.5, np.float32)
    x[0] = 2.0**-50
    want = math.sqrt(2.0**-100 + (2**20 - 1) * 2.0**-127)
    np.testing.assert_allclose(norms.tree_norm(jnp.asarray(x)), want, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_float64_has_its_own_range(magnitude):
    with jax.enable_x64(True):
        x = jnp.array([3.0, 4.0]) * magnitude
        assert norms.tree_norm(x).dtype == jnp.float64
        np.testing.assert_allclose(norms.tree_norm(x), 5 * magnitude, rtol=1e-15)
        mixed = [x.astype(jnp.float32), x]
        if 1e-30 < magnitude < 1e30:
            np.testing.assert_allclose(
                norms.tree_norm(mixed), 5 * magnitude * 2**0.5, rtol=1e-7
            )


def test_each_leaf_of_a_mixed_tree_has_the_range_of_its_own_dtype():
    with jax.enable_x64(True):
        for magnitude in (1e-25, 1e25):
            narrow = jnp.asarray(np.array([3.0, 4.0]) * magnitude, jnp.float32)
            cells, _ = optaxclip.scopes.leaf().split([narrow, jnp.ones(1)], None)
            seen = as_tree(cells)
            np.testing.assert_allclose(seen[0], 5 * magnitude, rtol=1e-6)
            assert float(seen[1]) == 1


@pytest.mark.parametrize("ord", ORDERS)
def test_nonfinite_elements_show_in_the_norm(ord):
    finite = jnp.array([1.0, 2.0])
    assert math.isnan(norms.tree_norm([finite, jnp.array([jnp.nan, jnp.inf])], ord))
    assert norms.tree_norm([finite, jnp.array([-jnp.inf])], ord) == math.inf


def test_empty_trees_and_leaves_have_norm_zero():
    for ord in ORDERS:
        assert norms.tree_norm({}, ord) == 0
        assert norms.tree_norm([jnp.zeros((0, 3)), None], ord) == 0


def test_complex_moduli():
    x = jnp.array([3e20 + 4e20j, 0j])
    np.testing.assert_allclose(norms.tree_norm(x), 5e20, rtol=1e-6)


def test_sums_are_float32_or_wider_for_narrow_leaves():
    assert norms.tree_norm(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
    many = [jnp.full(1000, 0.01, jnp.bfloat16) for _ in range(1000)]
    want = norm([np.asarray(many[0])]) * 1000**0.5
    np.testing.assert_allclose(jax.jit(norms.tree_norm)(many), want, rtol=1e-6)


@pytest.mark.parametrize("ord", [None, 1, 1.5, 3, math.inf])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_derivative_is_that_of_the_norm(ord, magnitude):
    rng = np.random.default_rng(1)
    x = rng.normal(size=6)
    dx = rng.normal(size=6)
    h = 1e-6
    p = 2 if ord is None else ord
    want = (norm([x + h * dx], p) - norm([x - h * dx], p)) / (2 * h)
    f = lambda v: norms.tree_norm(v, ord)
    point = jnp.asarray(x * magnitude, jnp.float32)
    _, got = jax.jvp(f, (point,), (jnp.asarray(dx, jnp.float32),))
    np.testing.assert_allclose(got, want, atol=1e-6)
    gradient = jax.grad(f)(point)
    np.testing.assert_allclose(np.asarray(gradient) @ dx, want, atol=1e-6)


@pytest.mark.parametrize("ord", [None, 1, 1.5, 3, math.inf])
def test_derivative_at_zero_is_zero_and_so_is_the_second(ord):
    f = lambda v: norms.tree_norm(v, ord)
    zero = jnp.zeros(3)
    np.testing.assert_array_equal(jax.grad(f)(zero), zero)
    assert np.isfinite(np.asarray(jax.hessian(f)(zero))).all()
    assert np.isfinite(np.asarray(jax.hessian(f)(jnp.array([0.0, 3.0, 4.0])))).all()


def test_ties_for_the_largest_share_the_derivative():
    gradient = jax.grad(lambda v: norms.tree_norm(v, math.inf))(jnp.array([2.0, -2.0]))
    np.testing.assert_array_equal(gradient, [0.5, -0.5])


def test_hessian_of_the_euclidean_norm():
    x = jnp.array([3.0, 4.0])
    want = (np.eye(2) - np.outer([0.6, 0.8], [0.6, 0.8])) / 5
    np.testing.assert_allclose(jax.hessian(norms.tree_norm)(x), want, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300, 1500])
def test_any_number_of_leaves(count):
    leaves = [np.float32(i + 1) for i in range(count)]
    want = math.sqrt(sum((i + 1) ** 2 for i in range(count)))
    got = norms.tree_norm([jnp.asarray(leaf) for leaf in leaves])
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("bad", [0, -1, math.nan, "L2", True, [2]])
def test_other_orders_are_refused(bad):
    for name, make in {
        "norms.tree_norm": lambda: norms.tree_norm(jnp.ones(2), bad),
        "clip_by_leaf_norm": lambda: optaxclip.clip_by_leaf_norm(1.0, ord=bad),
        "clip_by_unit_norm": lambda: optaxclip.clip_by_unit_norm(1.0, ord=bad),
        "clip_by_group_norm": lambda: optaxclip.clip_by_group_norm(1.0, "a", ord=bad),
        "clip_by_global_norm": lambda: optaxclip.clip_by_global_norm(1.0, ord=bad),
        "scopes.tree": lambda: optaxclip.scopes.tree(bad),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: ord must be None.*got ord="):
            make()


def test_a_traced_order_is_refused():
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(lambda p: norms.tree_norm(jnp.ones(2), p))(2)


def test_unitwise_norm_has_the_shape_of_its_array():
    x = jnp.array([[3.0, 0.0], [4.0, 1.0]], jnp.bfloat16)
    got = optaxclip.unitwise_norm(x)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [[5, 1], [5, 1]])
    np.testing.assert_array_equal(optaxclip.unitwise_norm(jnp.array([3, 4])), [5, 5])
