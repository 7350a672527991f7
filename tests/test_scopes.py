"""What each scope measures, and that it puts the directions back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import as_tree

import optaxclip
from optaxclip import clip_by, scopes, shapes

pytestmark = pytest.mark.usefixtures("strict")
UPDATES = {
    "cell": {"kernel": jnp.array([[3.0, 0.0], [4.0, -1.0]]), "bias": jnp.array([2.0])},
    "head": jnp.array([-6.0, 8.0]),
    "step": jnp.array(7),
}


def magnitudes(scope, updates=UPDATES):
    return as_tree(scope.split(updates, None)[0])


def assert_tree(got, want):
    got, want = (jax.tree.map(np.asarray, t) for t in (got, want))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_element():
    assert_tree(
        magnitudes(scopes.element()),
        {
            "cell": {"kernel": [[3.0, 0], [4, 1]], "bias": [2.0]},
            "head": [6.0, 8.0],
            "step": None,
        }
        | {
            "cell": {
                "kernel": np.array([[3.0, 0], [4, 1]]),
                "bias": np.array([2.0]),
            },
            "head": np.array([6.0, 8.0]),
        },
    )


def test_side():
    seen = magnitudes(scopes.side())
    assert_tree(seen["negative"]["head"], np.array([6.0, 0.0]))
    assert_tree(seen["positive"]["head"], np.array([0.0, 8.0]))
    assert seen["positive"]["step"] is None


def test_unit():
    seen = magnitudes(scopes.unit())
    assert_tree(seen["cell"]["kernel"], np.array([[5.0, 1.0]]))
    assert_tree(seen["head"], np.array([10.0]))


def test_leaf():
    assert_tree(
        magnitudes(scopes.leaf()),
        {
            "cell": {"kernel": np.sqrt(26.0), "bias": 2.0},
            "head": 10.0,
            "step": None,
        },
    )


@pytest.mark.parametrize("make", [scopes.leaf, scopes.peak])
def test_a_leaf_that_is_not_measured_has_the_entry_zero(make):
    shown = {**UPDATES, "hidden": optax.MaskedNode(), "head": None}
    cells, _ = make().split(shown, None)
    (vector,) = cells.arrays
    assert cells.places.measured == [True, True, False, False]
    assert vector.shape == (4,) and vector.dtype == jnp.float32
    np.testing.assert_array_equal(vector[2:], [0, 0])
    assert magnitudes(make(), shown)["head"] is None
    assert magnitudes(make(), shown)["hidden"] == optax.MaskedNode()


def test_group_takes_a_prefix_or_a_callable():
    labels = {"cell": "hidden", "head": "output", "step": "output"}
    want = {"hidden": np.sqrt(30.0), "output": 10.0}
    assert_tree(magnitudes(scopes.group(labels)), want)
    assert_tree(magnitudes(scopes.group(lambda updates: labels)), want)


def test_a_label_without_leaves_has_magnitude_zero():
    labels = {"cell": "hidden", "head": "hidden", "step": "counter"}
    seen = magnitudes(scopes.group(labels))
    assert float(seen["counter"]) == 0
    tx = optaxclip.clip_by_group_norm({"hidden": 1.0, "counter": 1.0}, labels)
    tx.update(UPDATES, tx.init(UPDATES))


def test_tree_measures_or_takes_what_is_known():
    assert_tree(magnitudes(scopes.tree()), np.sqrt(130.0))
    known = lambda norm: as_tree(scopes.tree().split(UPDATES, norm)[0])
    assert float(known(3.0)) == 3.0
    assert known(jnp.bfloat16(3)).dtype == jnp.float32


@pytest.mark.parametrize("bad", [-1.0, jnp.ones(2), "5", True])
def test_a_known_norm_is_checked(bad):
    tx = optaxclip.clip_by_global_norm(1.0)
    with pytest.raises((ValueError, TypeError), match="update: norm must"):
        tx.update(UPDATES, None, norm=bad)


def test_a_known_nan_is_loud():
    tx = optaxclip.clip_by_global_norm(1.0)
    out, _ = tx.update(UPDATES, None, norm=jnp.nan)
    assert np.isnan(np.asarray(out["head"])).all()


def test_only_the_tree_scope_listens_to_a_known_norm():
    tx = optaxclip.clip_by_leaf_norm(1.0)
    got, _ = tx.update(UPDATES, None, norm=1e9)
    np.testing.assert_allclose(got["head"], [-0.6, 0.8], rtol=1e-6)


def test_a_leaf_without_a_label_is_named():
    tx = optaxclip.clip_by_group_norm(1.0, {"cell": "hidden", "step": "hidden"})
    with pytest.raises(ValueError, match=r"labels has no value for head"):
        tx.init(UPDATES)


def test_complex_elements_keep_their_phase():
    u = jnp.array([3.0 + 4.0j, 0.1j, 0j])
    got, _ = clip_by(scopes.element(), 1.0).update(u, None)
    np.testing.assert_allclose(got, [0.6 + 0.8j, 0.1j, 0j], rtol=1e-6)
    assert got.dtype == jnp.complex64


def test_complex_has_no_sides():
    tx = optaxclip.clip_by_value(-1.0, 1.0)
    with pytest.raises(TypeError, match=r"complex updates have no sides.* at w"):
        tx.update({"w": jnp.array([1j])}, None)


def test_signed_zeros_and_subnormals_survive():
    u = jnp.array([-0.0, 0.0, 1e-40, -3.0])
    for tx in (optaxclip.clip(1.0), optaxclip.clip_by_value(-1.0, 1.0)):
        got = np.asarray(tx.update(u, None)[0])
        assert got[:3].tobytes() == np.asarray(u)[:3].tobytes()
        assert got[3] == -1


def peaks(rescale, limit, u, shape=shapes.hard):
    return np.asarray(clip_by(scopes.peak(rescale), limit, shape).update(u, None)[0])


PEAKED = jnp.array([[0.5, -4.0, 8.0], [-8.0, 2.0, 0.0]])


@pytest.mark.parametrize("rescale", [False, True])
def test_a_peak_cuts_what_is_beyond_and_leaves_the_rest(rescale):
    got = peaks(rescale, 3.0, PEAKED)
    cut = [3 * 4 / 8, 3, 3] if rescale else [3, 3, 3]
    want = np.array([[0.5, -cut[0], cut[1]], [-cut[2], 2.0, 0.0]], np.float32)
    within = np.abs(PEAKED) <= 3
    assert got[within].tobytes() == np.asarray(PEAKED)[within].tobytes()
    np.testing.assert_allclose(got, want, rtol=1e-7)
    assert np.abs(got).max() == 3
    assert peaks(rescale, 8.0, PEAKED).tobytes() == np.asarray(PEAKED).tobytes()
    np.testing.assert_array_equal(peaks(rescale, 0.0, PEAKED), 0 * PEAKED)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("limit", [0.1, 1.0, 3.7])
def test_the_new_peak_is_the_new_magnitude(rescale, dtype, limit):
    u = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)) * 3, dtype)
    got = peaks(rescale, limit, u)
    assert got.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.abs(np.float64(got)).max(), limit, rtol=2 * eps)
    within = np.abs(np.float64(u)) <= limit
    assert 0 < within.sum() < u.size
    assert got[within].tobytes() == np.asarray(u)[within].tobytes()


def test_clamping_to_a_peak_is_the_nearest_point_within():
    """The projection is the only point p with (u - p) (q - p) <= 0 for all q within."""
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.normal(size=7) * 3, jnp.float32)
    p = np.float64(peaks(False, 2.0, u))
    for q in rng.uniform(-2, 2, size=(100, 7)):
        assert (np.float64(u) - p) @ (q - p) <= 1e-5


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_peak_that_is_not_finite_is_loud_in_its_leaf_only(rescale, bad):
    updates = {"bad": PEAKED.at[0, 1].set(bad), "good": PEAKED}
    tx = clip_by(scopes.peak(rescale), 3.0)
    got, _ = tx.update(updates, tx.init(updates))
    assert np.isnan(np.asarray(got["bad"])).all()
    want = peaks(rescale, 3.0, PEAKED)
    assert np.asarray(got["good"]).tobytes() == want.tobytes()
    free, _ = clip_by(scopes.peak(rescale), jnp.inf).update(updates, None)
    assert np.asarray(free["bad"]).tobytes() == np.asarray(updates["bad"]).tobytes()


@pytest.mark.parametrize("rescale", [False, True])
def test_a_floor_raises_the_peak_and_nothing_else(rescale):
    got = peaks(rescale, 10.0, jnp.array([1.0, -5.0, 3.0]), shapes.floor)
    np.testing.assert_allclose(got, [1.0, -10.0, 3.0], rtol=1e-7)
    zeros = peaks(rescale, 10.0, jnp.zeros(3), shapes.floor)
    np.testing.assert_array_equal(zeros, np.zeros(3))


@pytest.mark.parametrize("rescale", [False, True])
def test_a_complex_peak_keeps_its_phase(rescale):
    u = jnp.array([3.0 + 4.0j, 0.3 - 0.4j, -1.2 + 1.6j])
    got = peaks(rescale, 1.0, u)
    small = 2 / 5 if rescale else 1
    want = [0.6 + 0.8j, 0.3 - 0.4j, small * (-0.6 + 0.8j)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got.dtype == jnp.complex64 and got[1] == np.complex64(0.3 - 0.4j)


def test_magnitudes_of_a_peak_are_those_of_the_inf_norm():
    assert_tree(
        magnitudes(scopes.peak()),
        {"cell": {"kernel": 4.0, "bias": 2.0}, "head": 8.0, "step": None},
    )
    assert not scopes.peak().elementwise
