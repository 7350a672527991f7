"""The laws that every clip obeys, each over the table of factories."""

import functools
import inspect
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import new_magnitude, wide
from tables import BY_NAME, CASES, FAST, HARD, LEARNED, applied, eps, label, tree

import optaxclip
from optaxclip import bounds

pytestmark = pytest.mark.usefixtures("strict")


def rows(cases):
    """All laws of one row after another, for they share what jit has compiled."""
    return pytest.mark.parametrize(
        "case", cases, ids=lambda case: case.name, scope="module"
    )


every, every_hard = rows(CASES), rows(HARD)

RANGES = [
    (jnp.float32, 1e-30),
    (jnp.float32, 1.0),
    (jnp.float32, 1e30),
    (jnp.bfloat16, 1e-30),
    (jnp.bfloat16, 1.0),
    (jnp.float16, 1e3),
    (jnp.float8_e5m2, 1.0),
    (jnp.complex64, 1e-20),
    (jnp.complex64, 1e20),
]


def complex_ok(case, dtype):
    return case.name != "clip_by_value" or not jnp.issubdtype(
        dtype, jnp.complexfloating
    )


def bitwise(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def trees_bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(bitwise, a, b)


@every
@pytest.mark.parametrize("dtype, magnitude", RANGES)
def test_the_new_magnitudes_are_those_of_the_shape(case, dtype, magnitude):
    if not complex_ok(case, dtype):
        dtype = jnp.float32
    updates = tree(dtype, magnitude)
    params = tree(dtype, 1.0, seed=1)
    seen = np.asarray(case.cells(updates, params), np.float64)
    limit = float(np.float32(np.median(seen[seen > 0]) * 0.7))
    kept = np.asarray(
        case.cells(applied(case.make(limit), updates, params), params), np.float64
    )
    want = np.array([new_magnitude(case.shape, m, limit) for m in seen])
    # One rounding of every element, and a few of the norm and the factor. Elements
    # below the smallest normal number of the leaf dtype may round by all of it.
    tiny = float(jnp.finfo(dtype).smallest_normal)
    params_scale = 1e3 if case.name == "adaptive_grad_clip" else 1
    np.testing.assert_allclose(
        kept, want, rtol=4 * eps(dtype), atol=40 * tiny * params_scale
    )


@every_hard
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_within_the_bound_nothing_changes(case, dtype):
    updates = tree(dtype)
    trees_bitwise(applied(case.make(1e6), updates), updates)


@every
def test_dtypes_shapes_and_weak_types_are_kept(case):
    updates = {
        "b": jnp.ones(3, jnp.bfloat16),
        "h": jnp.ones(2, jnp.float16),
        "odd": jnp.asarray(3.0),
        "f": jnp.ones((2, 2), jnp.float32),
    }
    assert updates["odd"].weak_type
    out = applied(case.make(0.1), updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    for name, leaf in updates.items():
        assert out[name].weak_type == leaf.weak_type


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_is_never_silent(case, bad):
    updates = tree(jnp.float32)
    updates["kernel"] = updates["kernel"].at[1, 2].set(bad)
    params = tree(jnp.float32, seed=1)
    out = applied(case.make(0.5), updates, params)
    broken = float(out["kernel"][1, 2])
    if case.elementwise and math.isinf(bad):
        want = new_magnitude(case.shape, math.inf, 0.5)
        assert broken == math.copysign(want, bad)
    else:
        assert math.isnan(broken)
    if case.shape == "drop":
        return
    for name, leaf in updates.items():
        silent = (np.asarray(out[name]) == 0) & (np.asarray(leaf) != 0)
        assert not silent.any(), name


@every
def test_a_cell_that_is_not_finite_does_not_touch_the_others(case):
    clean = tree(jnp.float32)
    params = tree(jnp.float32, seed=1)
    dirty = {**clean, "vector": clean["vector"].at[0].set(jnp.nan)}
    tx = case.make(0.5)
    if "global" in case.name or "at_most" in case.name:
        out = applied(tx, dirty, params)
        for leaf in jax.tree.leaves(out):
            assert np.isnan(np.asarray(leaf)).all()
        return
    want, got = applied(tx, clean, params), applied(tx, dirty, params)
    same = set(clean) - {"vector"}
    if "group" in case.name:
        same -= {n for n in clean if label(n) == label("vector")}
    assert same
    for name in same:
        bitwise(got[name], want[name])


@every
def test_limit_zero_gives_zeros(case):
    out = applied(case.make(0.0), tree(jnp.float32))
    for leaf in jax.tree.leaves(out):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@every
def test_zeros_stay_zeros_even_at_limit_zero(case):
    zeros = jax.tree.map(jnp.zeros_like, tree(jnp.float32))
    for limit in (0.0, 1.0):
        trees_bitwise(applied(case.make(limit), zeros), zeros)


@every
@pytest.mark.parametrize("traced", [False, True])
def test_limit_inf_is_the_identity_bit_for_bit(case, traced):
    updates = tree(jnp.float32, 1e30)
    updates["kernel"] = updates["kernel"].at[0].set(jnp.nan).at[1, 1].set(jnp.inf)
    updates["vector"] = updates["vector"].at[0].set(1e-40)

    def run(limit):
        return applied(case.make(limit), updates)

    out = jax.jit(run)(jnp.float32(jnp.inf)) if traced else run(math.inf)
    trees_bitwise(out, updates)


@every
def test_a_traced_negative_limit_is_zero_and_nan_is_loud(case):
    updates = tree(jnp.float32)
    run = jax.jit(lambda limit: applied(case.make(limit), updates))
    if case.name != "clip_by_value":  # there -limit is the other end
        for leaf in jax.tree.leaves(run(jnp.float32(-1.0))):
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    for leaf in jax.tree.leaves(run(jnp.float32(jnp.nan))):
        assert np.isnan(np.asarray(leaf)).all()


@every
@pytest.mark.parametrize(
    "bad, error",
    [
        (-1.0, ValueError),
        (math.nan, ValueError),
        (np.float32(-2), ValueError),
        (True, TypeError),
        ("1.0", TypeError),
        (None, TypeError),
        (1j, TypeError),
    ],
)
def test_a_bad_limit_is_refused_at_construction(case, bad, error):
    with pytest.raises(error) as caught:
        case.make(bad)
    message = str(caught.value)
    if case.name == "clip_by_value":
        assert message.startswith("clip_by_value: m")
    else:
        assert message.startswith(f"{case.function}: {case.argument} must")
        assert f"got {case.argument}={bad!r}" in message


@every
def test_a_schedule_is_a_limit(case):
    tx = case.make(lambda step: jnp.array([0.5, 0.25])[step])
    updates = tree(jnp.float32)
    params = tree(jnp.float32, seed=1)
    update = jax.jit(tx.update)
    state = tx.init(params)
    for limit in (0.5, 0.25):
        out, state = update(updates, state, params)
        trees_bitwise(out, applied(case.make(limit), updates, params))


@every
@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_a_traced_limit_of_any_dtype_keeps_the_dtypes(case, kind):
    updates = {"even": jnp.ones((3, 2), jnp.bfloat16), "odd": jnp.ones(2)}
    out = jax.jit(lambda c: applied(case.make(c), updates))(jnp.asarray(1, kind))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    want = applied(case.make(1.0), updates)
    chex.assert_trees_all_close(
        jax.tree.map(wide, out), jax.tree.map(wide, want), rtol=1e-6
    )


@every
def test_what_is_not_floating_point_passes_through(case):
    rows = {
        "none": None,
        "masked": optax.MaskedNode(),
        "integer": jnp.arange(3),
        "flag": jnp.array([True]),
        "key": jax.random.key(0),
        "float0": np.zeros(2, jax.dtypes.float0),
        "zero": {},
    }
    clean = {"vector": jnp.array([3.0, 4.0])}
    updates = {**clean, **rows}
    tx = case.make(0.5)
    out = applied(tx, updates, jit=False)
    for name, leaf in rows.items():
        assert out[name] is leaf or name == "zero"
    trees_bitwise(out["vector"], applied(tx, clean, jit=False)["vector"])


@every
def test_updates_without_leaves(case):
    for empty in ({}, [], {"a": None}, {"a": jnp.arange(3)}):
        tx = case.make(0.5)
        out, _ = tx.update(empty, tx.init(empty), empty)
        assert jax.tree.structure(out) == jax.tree.structure(empty)


@every
def test_numpy_arrays_and_python_floats_are_leaves(case):
    mixed = {"vector": np.array([3.0, 4.0], np.float32), "number": 2.0}
    arrays = {"vector": jnp.array([3.0, 4.0]), "number": jnp.asarray(2.0)}
    tx = case.make(0.5)
    trees_bitwise(applied(tx, mixed, jit=False), applied(tx, arrays, jit=False))


@every
def test_jit_equals_eager(case):
    updates, params = tree(jnp.float32, 3.0), tree(jnp.float32, seed=1)
    tx = case.make(0.5)
    chex.assert_trees_all_close(
        applied(tx, updates, params),
        applied(tx, updates, params, jit=False),
        rtol=4 * eps(jnp.float32),
    )


@every
def test_vmap_equals_a_loop(case):
    batch = [tree(jnp.float32, 10.0**i, seed=i + 25) for i in (-25, 0, 1, 25)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)
    tx = case.make(0.5)

    def run(updates):
        return tx.update(updates, tx.init(updates), tree(jnp.float32, seed=9))[0]

    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(run, batch))
    chex.assert_trees_all_close(jax.jit(jax.vmap(run))(stacked), want, rtol=1e-6)


@every
def test_vmap_over_limits_equals_a_loop(case):
    updates = tree(jnp.float32, 3.0)
    limits = jnp.array([0.0, 0.5, 2.0, jnp.inf])
    run = lambda limit: applied(case.make(limit), updates, jit=False)
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(run, limits))
    chex.assert_trees_all_close(jax.jit(jax.vmap(run))(limits), want, rtol=1e-6)


@every
def test_the_state_is_a_fixed_point_from_init_on(case):
    updates = tree(jnp.float32)
    tx = case.make(lambda step: 1 / (1 + step.astype(jnp.float32)))
    structs = jax.tree.map(lambda u: jax.ShapeDtypeStruct(u.shape, u.dtype), updates)
    state = tx.init(structs)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(updates))
    _, after = tx.update(updates, state, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for leaf, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert leaf.weak_type == new.weak_type
    step = lambda s, _: (tx.update(updates, s, updates)[1], None)
    jax.lax.scan(step, state, None, length=3)


@every
def test_a_number_needs_no_state(case):
    if "recorded" in case.name:
        return
    tx = case.make(0.5)
    updates = tree(jnp.float32)
    assert tx.init(updates) == optax.EmptyState()
    out, state = tx.update(updates, None, updates)
    assert state is None
    trees_bitwise(out, applied(tx, updates, jit=False))


@every
def test_a_second_call_does_not_trace_again(case):
    tx = case.make(0.5)
    updates = tree(jnp.float32)
    traces = []

    @functools.partial(jax.jit, compiler_options=FAST)
    def update(*args):
        traces.append(1)
        return tx.update(*args)

    _, state = update(updates, tx.init(updates), updates)
    update(updates, state, updates)
    assert len(traces) == 1


@every
def test_unknown_extra_arguments_are_ignored(case):
    tx = case.make(0.5)
    updates = tree(jnp.float32)
    out, _ = tx.update(updates, tx.init(updates), updates, value=1.0, grad=updates)
    trees_bitwise(out, applied(tx, updates, jit=False))


@every_hard
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_clipping_twice_changes_nothing_more(case, dtype):
    updates, params = tree(dtype, 3.0), tree(dtype, seed=1)
    tx = case.make(0.5)
    once = applied(tx, updates, params)
    twice = applied(tx, once, params)
    chex.assert_trees_all_close(
        jax.tree.map(wide, twice), jax.tree.map(wide, once), rtol=2 * eps(dtype)
    )


@every
def test_scaling_updates_and_limit_scales_the_result(case):
    updates, params = tree(jnp.float32, 3.0), tree(jnp.float32, seed=1)
    double = jax.tree.map(lambda u: 2 * u, updates)
    want = jax.tree.map(lambda u: 2 * u, applied(case.make(0.5), updates, params))
    trees_bitwise(applied(case.make(1.0), double, params), want)


@every
def test_order_and_names_of_leaves_do_not_matter(case):
    updates, params = tree(jnp.float32, 3.0), tree(jnp.float32, seed=1)
    names = dict(
        zip(sorted(updates), ("zz", "yyyy", "xx", "ww", "vvvvvv"), strict=True)
    )
    names = {old: new + "_" * (len(old) % 2) for old, new in names.items()}
    rename = lambda t: {names[n]: leaf for n, leaf in t.items()}
    tx = case.make(0.5)
    want = rename(applied(tx, updates, params))
    got = applied(tx, rename(updates), rename(params))
    chex.assert_trees_all_close(got, want, rtol=4 * eps(jnp.float32))


@functools.lru_cache(maxsize=1)
def slopes(name):
    """Derivatives by updates, params and limit: along tangents, and backwards."""
    make = BY_NAME[name].make

    def run(u, p, c):
        tx = make(c)
        return tx.update(u, tx.init(u), p)[0]

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(point, tangents, cotangents):
        _, push = jax.linearize(run, *point)
        return push(*tangents), jax.linear_transpose(push, *point)(cotangents)

    return both


@every
def test_derivatives_are_finite_at_zero(case):
    params = tree(jnp.float32, seed=1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)
    point, tangents = (zeros, zeros, jnp.float32(0.5)), (ones, ones, jnp.float32(1))
    for leaf in jax.tree.leaves(slopes(case.name)(point, tangents, ones)):
        assert np.isfinite(leaf).all()


@every
@pytest.mark.parametrize("magnitude", [1e-30, 3e30])
def test_derivatives_are_finite_at_the_ends_of_the_range(case, magnitude):
    updates, params = tree(jnp.float32, magnitude), tree(jnp.float32, seed=1)
    ones, limit = jax.tree.map(jnp.ones_like, updates), jnp.float32(magnitude / 2)
    point, tangents = (updates, params, limit), (ones, ones, jnp.float32(1))
    _, (by_updates, _, _) = slopes(case.name)(point, tangents, ones)
    for leaf in jax.tree.leaves(by_updates):
        assert np.isfinite(leaf).all()


@rows([case for case in CASES if case.name.startswith("normalize")])
def test_derivatives_are_finite_where_tiny_updates_are_raised(case):
    """They are about the limit over the magnitude."""
    updates, params = tree(jnp.float32, 1e-30), tree(jnp.float32, seed=1)
    tangent = jax.tree.map(lambda u: u / 1e-30, updates)
    point = updates, params, jnp.float32(1)
    along = tangent, jax.tree.map(jnp.zeros_like, params), jnp.float32(0)
    forward, (by_updates, _, _) = slopes(case.name)(point, along, tangent)
    for leaf in jax.tree.leaves((forward, by_updates)):
        assert np.isfinite(leaf).all()


@every
def test_derivatives_are_those_of_finite_differences(case):
    with jax.enable_x64(True):
        updates = {n: jnp.asarray(wide(u)) for n, u in tree(jnp.float32, 2.0).items()}
        params = {n: jnp.asarray(wide(u)) for n, u in tree(jnp.float32, 1.0, 1).items()}
        direction = {
            n: jnp.asarray(wide(u)) for n, u in tree(jnp.float32, 1, 2).items()
        }

        def run(t):
            moved = jax.tree.map(lambda u, d: u + t * d, updates, direction)
            return case.make(0.7).update(moved, case.make(0.7).init(moved), params)[0]

        @functools.partial(jax.jit, compiler_options=FAST)
        def sloped(t):
            slope = jax.jvp(run, (t,), (jnp.ones_like(t),))[1]
            return run(t), slope, jax.jacrev(run)(t)

        h = 1e-6
        (low, *_), (_, slope, reverse), (high, *_) = map(sloped, (-h, 0.0, h))
        for name in updates:
            numeric = (np.asarray(high[name]) - np.asarray(low[name])) / (2 * h)
            np.testing.assert_allclose(slope[name], numeric, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(
                reverse[name], slope[name], rtol=1e-9, atol=1e-12
            )


@rows([case for case in CASES if case.twin])
@pytest.mark.parametrize("limit", [1e-3, 0.5, 1e3])
def test_equals_optax_where_optax_is_right(case, limit):
    updates, params = tree(jnp.float32, 3.0), tree(jnp.float32, seed=1)
    del updates["empty"], params["empty"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = applied(case.twin(limit), updates, params)
    chex.assert_trees_all_close(
        applied(case.make(limit), updates, params), want, rtol=1e-6
    )


@rows([case for case in HARD if "global" in case.name])
def test_a_global_clip_keeps_the_direction(case):
    updates = tree(jnp.float32, 5.0)
    out = applied(case.make(0.3), updates)
    a = np.concatenate([wide(updates[n]).ravel() for n in updates])
    b = np.concatenate([wide(out[n]).ravel() for n in updates])
    cosine = a @ b / math.sqrt((a @ a) * (b @ b))
    assert 1 - cosine < 1e-12


def test_every_public_factory_is_in_a_table():
    def makes_a_transformation(factory):
        if inspect.isclass(factory) or not callable(factory):
            return False
        made = inspect.signature(factory).return_annotation
        return inspect.isclass(made) and issubclass(made, optax.GradientTransformation)

    rows = {row.name.split(":")[0] for row in (*CASES, *LEARNED)}
    wrappers = {"check_finite", "sharded", "skip_steps", "zero_nonfinite"}
    made = {
        n for n in optaxclip.__all__ if makes_a_transformation(getattr(optaxclip, n))
    }
    assert "clip" in made and "adagc" in made and "acclip" in made
    assert made - rows == wrappers


def test_every_learned_bound_is_in_the_table():
    """In a row whose name begins with the bound, or in a named method."""
    methods = {
        "deviation": "plus",
        "schedule": "adopt_clip",
        "recorded": "parts",
        "constant": "adagc",
        "of": "adagc",
    }
    factories = {n for n in bounds.__all__ if inspect.isfunction(getattr(bounds, n))}
    names = {word for row in LEARNED for word in re.split(r"[ :]", row.name)}
    assert {methods.get(name, name) for name in factories} <= names
