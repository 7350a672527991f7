"""Every form of the norms by its name, also those of platforms that are not here."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import norm, wide

import optaxclip
from optaxclip import _forms, _sums, _tiles, bounds

pytestmark = pytest.mark.usefixtures("strict")
FORMS = ("on_cpu", "on_gpu", "by_scales")
WHOLE = {form: getattr(_forms, f"whole_{form}") for form in FORMS}
UNITS = {form: getattr(_forms, f"units_{form}") for form in FORMS}
# What is small everywhere, what is large on a CPU only, and what is large everywhere.
SIZES = (3, _sums.SMALL_ON_CPU + 1, _sums.SMALL + 1)
MATRICES = ((3, 5), (129, 128), (2049, 33), (33, 2049))
MAGNITUDES = [10.0**e for e in (-37, -30, -23, -19, -12, 0, 12, 19, 23, 30, 37, 38)]
# Of ranks 0 to 4, with lengths that are no multiples of 1024; and what a unit spans.
SHAPES = [
    (),
    (7,),
    (5, 4),
    (1025,),
    (2048,),
    (2, 3, 4),
    (2, 3, 4, 5),
    (1500, 2),
    (1, 1),
]
AXES = [(), (), (1,), (0,), (0,), (1,), (1, 2), (0,), (0, 1)]


def values(shape, magnitude=1.0, seed=0):
    """Numbers of both signs whose moduli are the magnitude to almost twice it."""
    rng = np.random.default_rng(seed)
    moduli = rng.uniform(1, 1.9, shape) * magnitude
    return np.asarray(moduli * rng.choice([-1, 1], shape), np.float32)


def inputs(shape):
    """Arrays of one shape over the whole range, mixtures, and what is not finite."""
    flat = [values(shape, magnitude) for magnitude in MAGNITUDES]
    rare, half, nan, inf = (np.array(values(shape, m)) for m in (1e-30, 1e-12, 1, 1))
    rare.flat[rare.size // 2] = 1e30
    half.flat[::2] *= np.float32(1e24)
    nan.flat[-1], inf.flat[0] = np.nan, -np.inf
    both = np.where(np.isinf(inf), inf, nan)
    return [*flat, rare, half, nan, inf, both, np.zeros(shape, np.float32)]


def tolerance(form, size=0):
    """XLA:CPU adds three results one by one, which a GPU adds in a tree."""
    return 1e-4 if form == "on_gpu" and size > _sums.SMALL else 1e-6


def check(got, want, rtol=1e-6):
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(got, np.asarray(want, np.float32), rtol=rtol)


def alike(owner, count):
    return [(list(range(len(owner))), (tuple(owner), count), ())]


def unit_norms(x, axes):
    with np.errstate(all="ignore"):
        return np.sqrt(np.sum(np.square(wide(x)), axis=axes, keepdims=True))


def cell_norms(arrays, owner, count):
    return [norm([x for x, o in zip(arrays, owner) if o == c]) for c in range(count)]


def mixed(count, magnitude=1.0):
    """Arrays of all kinds of shapes, of magnitudes that differ, and their axes."""
    shapes, axes = ((some * count)[:count] for some in (SHAPES, AXES))
    scales = [magnitude * 3.0 ** (i % 7) for i in range(count)]
    return list(map(values, shapes, scales, range(count))), axes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", WHOLE)
def test_a_whole_array_of_any_magnitude_has_its_norm(form, size):
    run = jax.jit(functools.partial(WHOLE[form], kinds=alike([0], 1)))
    for x in inputs((size,)):
        got = run([x])
        assert got.dtype == jnp.float32
        check(got, [norm([x])], tolerance(form, size))


@pytest.mark.parametrize("form", UNITS)
def test_the_units_of_any_magnitude_have_their_norms(form):
    shapes = [shape for shape in MATRICES for _ in range(3)]
    axes = [(0,), (1,), (0, 1)] * len(MATRICES)
    run = jax.jit(lambda xs: UNITS[form](xs, axes, [()] * len(axes)))
    for arrays in zip(*map(inputs, shapes), strict=True):
        for got, x, a in zip(run(arrays), arrays, axes, strict=True):
            assert got.dtype == jnp.float32
            want = unit_norms(x, a)
            check(got, np.where(np.isnan(x).any(a, keepdims=True), np.nan, want))


@pytest.mark.parametrize("count", [1, 3, 129, 400])
@pytest.mark.parametrize("form", WHOLE)
def test_any_number_of_arrays_in_any_cells(form, count):
    magnitudes = [10.0 ** (i % 5 - 2) for i in range(count)]
    arrays = [
        jnp.asarray(values((3,) * (i % 2), m, i)) for i, m in enumerate(magnitudes)
    ]
    several = [(3 * i) % 4 for i in range(count)]  # of 6 cells at least 2 are empty
    cells = [(range(count), count), ([0] * count, 1), (several, 6)]
    one = [WHOLE[form](arrays, alike(*c)) for c in cells] if count < 9 else []
    run = jax.jit(lambda xs: [WHOLE[form](xs, alike(*c)) for c in cells])
    for found in (run(arrays), one):
        for got, c in zip(found, cells):
            check(got, cell_norms(arrays, *c))


@pytest.mark.parametrize("form", WHOLE)
def test_arrays_of_several_kinds_are_put_together_as_means_too(form):
    arrays = [values(s, m, 7) for s, m in (((3,), 1), ((SIZES[1],), 1e25), ((), 1e30))]
    arrays += [values((SIZES[2],), 1e-25), values((2, 2), 1e-30)]
    arrays = list(map(jnp.asarray, arrays))
    owner, sizes = [0, 2, 0, 1, 1], [4, SIZES[2] + 4, SIZES[1], 1]
    kinds = [([0, 3], ((0, 1), 4), ()), ([1, 2, 4], ((2, 0, 1), 4), ())]
    want = np.array(cell_norms(arrays, owner, 4))
    run = jax.jit(lambda xs: [WHOLE[form](xs, kinds, s) for s in (None, sizes)])
    for got in (run(arrays), [WHOLE[form](arrays, kinds, s) for s in (None, sizes)]):
        check(got[0], want, tolerance(form, SIZES[2]))
        check(got[1], want / np.sqrt(sizes), tolerance(form, SIZES[2]))


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e5m2]
)
@pytest.mark.parametrize("form", WHOLE)
def test_narrow_arrays_are_measured_in_float32(form, dtype):
    least, most = (1e-4, 1e4) if jnp.finfo(dtype).bits < 32 else (1e-30, 1e30)
    least, most = (1e-30, 1e30) if dtype == jnp.bfloat16 else (least, most)
    for size in SIZES:
        whole = jax.jit(functools.partial(WHOLE[form], kinds=alike([0, 1], 2)))
        units = jax.jit(lambda xs: UNITS[form](xs, [(0,), (1,)], [(), ()]))
        for magnitude in (least, 1.0, most):
            x = jnp.asarray(values((size,), magnitude), dtype)
            y = jnp.asarray(values((2, size // 2), magnitude, 1), dtype)
            check(whole([x, y]), [norm([x]), norm([y])], tolerance(form, size))
            for got, a, z in zip(units([x, y]), [(0,), (1,)], [x, y], strict=True):
                assert got.dtype == jnp.float32
                check(got, unit_norms(z, a))


@pytest.mark.parametrize("form", WHOLE)
def test_under_vmap_every_example_has_its_own_norm(form):
    shapes = [(3,), (SIZES[1],), (33, 2049)]
    steps = [list(map(values, shapes, [m] * 3)) for m in (1.0, 1e-30, 1e30)]
    arrays = [np.stack(xs) for xs in zip(*steps, strict=True)]
    axes, over = [(0,), (0,), (0,)], [()] * 3
    whole = jax.jit(jax.vmap(lambda xs: WHOLE[form](xs, alike([0, 2, 0], 4))))
    units = jax.jit(jax.vmap(lambda xs: UNITS[form](xs, axes, over)))
    want = [cell_norms(xs, [0, 2, 0], 4) for xs in steps]
    check(whole(arrays), want, tolerance(form, 33 * 2049))
    for got, x in zip(units(arrays), arrays, strict=True):
        check(got, unit_norms(x, (1,)))


@pytest.mark.parametrize("count", [1, 12, 32, 33, 70])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_arrays_in_one_are_summed_each_by_itself(count, magnitude):
    arrays, axes = mixed(count, magnitude)
    got = jax.jit(_tiles.sums)(arrays)
    assert (got.dtype, got.shape) == (np.float64, (count,))
    want = [math.fsum((wide(x) ** 2).ravel()) for x in arrays]
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-12)
    found = jax.jit(functools.partial(_tiles._beside, axes))(arrays)
    for got, x, a in zip(found, arrays, axes, strict=True):
        assert got.dtype == np.float32
        check(got, unit_norms(x, a))


@pytest.mark.parametrize("count", [1, 12, 33, 70])
def test_arrays_cut_out_of_one_are_the_same_bit_for_bit(count):
    arrays, _ = mixed(count)
    given = [jnp.asarray(x).at[...].multiply(1e30) for x in arrays]
    for cut in (_tiles._cut, jax.jit(_tiles._cut), _tiles.cut_out, _forms.together):
        for got, x in zip(cut(given), given, strict=True):
            np.testing.assert_array_equal(got, x, strict=True)


@pytest.mark.parametrize("count", [5, 70])
def test_the_joint_layout_keeps_the_order_of_small_and_large_arrays(count):
    arrays, _ = mixed(count)
    for i, magnitude in ((0, 1e-30), (3, 1e30)):
        arrays[i] = values((SIZES[2],), magnitude, i)
    owner = [(2 * i) % 7 for i in range(count)]
    for cells in ((range(count), count), (owner, 8), ([0] * count, 1)):
        # Backwards too: the kinds say where an array is, not which is next.
        some, o = list(range(count))[::-1], tuple(cells[0])[::-1]
        for kinds in (alike(*cells), [(some, (o, cells[1]), ())]):
            got = jax.jit(functools.partial(_forms._gpu_joint, kinds=kinds))(arrays)
            check(got, cell_norms(arrays, *cells), tolerance("on_gpu", SIZES[2]))


@pytest.mark.parametrize("values", [[1.5, -2.0, np.nan, 0], [True, False, True, True]])
def test_every_entry_is_that_of_its_place_on_every_platform(values):
    vector, places = jnp.asarray(values), [3, 0, 0, 2, 1]
    rows = jnp.stack([vector, vector[::-1]])
    for pick in (_forms.entries_on_cpu, _forms._fenced, _forms._picked, _forms.entries):
        some = functools.partial(pick, places=places)
        for run in (some, jax.jit(some)):
            for got, place in zip(run(vector), places, strict=True):
                np.testing.assert_array_equal(got, vector[place], strict=True)
        for got, place in zip(jax.jit(jax.vmap(some))(rows), places, strict=True):
            np.testing.assert_array_equal(got, rows[:, place], strict=True)
    for got in jax.jit(_forms.entries, static_argnums=1)(vector[0], (0, 0, 0)):
        np.testing.assert_array_equal(got, vector[0], strict=True)


UPDATES = {"b": jnp.array([0.5]), "w": jnp.array([3.0, 4.0])}


def test_the_magnitudes_of_leaves_are_kept_in_one_vector():
    tx = optaxclip.clip_by_leaf_norm(bounds.ema(2.0))
    state = tx.init(UPDATES)
    assert isinstance(state, bounds.MeanState)
    assert (state.mean.shape, state.mean.dtype) == ((2,), jnp.float32)
    assert (state.count.shape, state.count.dtype) == ((2,), jnp.int32)
    _, state = tx.update(UPDATES, state)
    np.testing.assert_allclose(state.mean, [0.5, 5.0])
    for missing in ({**UPDATES, "b": None}, {**UPDATES, "b": jnp.zeros(1)}):
        _, after = tx.update(jax.tree.map(lambda u: u / 3, missing), state)
        np.testing.assert_array_equal(after.mean[0], state.mean[0])
        np.testing.assert_array_equal(after.count, [1, 2])
        assert after.mean[1] < state.mean[1]


def test_entries_are_named_by_leaf_and_by_label_or_refused():
    vector = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    for tree in (UPDATES, {"x": "b", "y": "w", "z": "b"}):
        named = optaxclip.by_name(vector, tree)
        assert list(named) == ["b", "w"]
        np.testing.assert_array_equal(named["w"], [2, 4])
        for wrong in (jnp.ones(3), jnp.ones((2, 1)), jnp.ones(())):
            with pytest.raises(ValueError, match=r"^by_name: values must have.* Pass "):
                optaxclip.by_name(wrong, tree)


def leaves_of(vector):
    return {"b": vector[0], "w": vector[1]}


@pytest.mark.parametrize(
    "tx, name",
    [
        (optaxclip.clip_by_leaf_norm(bounds.ema(2.0)), "bounds.ema"),
        (optaxclip.adagc(1.5), "adagc"),
        (optaxclip.recorded(optaxclip.clip_by_leaf_norm(1.0)), "recorded"),
    ],
)
def test_a_state_in_the_containers_of_version_0_1_is_refused(tx, name):
    state = tx.init(UPDATES)
    old = jax.tree.map(lambda x: leaves_of(x) if x.ndim else x, state)
    with pytest.raises(ValueError, match=rf"^{name}: state .*0\.1.* make it anew"):
        tx.update(UPDATES, old)


@pytest.mark.parametrize("bound", [bounds.ema(2.0), optaxclip.recorded(1.0)])
def test_a_state_of_other_leaves_is_refused(bound):
    tx = optaxclip.clip_by_leaf_norm(bound)
    for other in ({"w": jnp.ones(2)}, {**UPDATES, "z": jnp.ones(2)}):
        with pytest.raises(ValueError, match=r": state must be that of these updates"):
            tx.update(UPDATES, tx.init(other))
