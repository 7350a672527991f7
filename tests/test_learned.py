"""The laws of what learns, each over the table of learned methods and bounds."""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from oracles import new_magnitude
from tables import FAST, LEARNED, as_tree

import optaxclip
from optaxclip import bounds, clip_by, scopes

pytestmark = pytest.mark.usefixtures("strict")

ROWS = {row.name: row for row in LEARNED}
STEPS = 200
LATE = 50  # by then every row has limits


def law(*names, slow=False):
    """The rows that obey all of these laws; one of each kind if that is slow to try."""
    rows = [row for row in LEARNED if not {*names} & {*(row.exempt or {})}]
    return each([row for row in rows if not (slow and row.like)])


def each(rows):
    return pytest.mark.parametrize("row", [row.name for row in rows], indirect=True)


@pytest.fixture(scope="module")
def row(request):
    """All laws of one row after another, for they share what jit has compiled."""
    return ROWS[request.param]


def _gradients(seed=0):
    """Updates of so many steps, stacked: their size varies from step to step."""
    rng = np.random.default_rng(seed)
    shapes = {"bb": (3,), "cc": (), "w": (4, 2)}
    size = np.exp(0.7 * rng.normal(size=STEPS))
    return {
        name: (rng.normal(size=(STEPS, *shape)).T * size).T.astype(np.float32)
        for name, shape in shapes.items()
    }


GRADIENTS = _gradients()
# Numbers that bfloat16 and float16 hold.
PARAMS = jax.tree.map(lambda g: np.round(8 + 8 * np.abs(g[0])) / 8, _gradients(1))
NARROW = {"bb": jnp.bfloat16, "cc": jnp.float16, "w": jnp.float32}


def at(tree, steps):
    return jax.tree.map(lambda x: x[steps], tree)


@contextlib.contextmanager
def standard():
    """Promotion as usual: optax relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def promoting(row):
    return standard() if "strict" in (row.exempt or {}) else contextlib.nullcontext()


def scanned(tx, updates):
    """The updates that come out of every step, and the states after it, stacked."""

    def step(state, u):
        out, state = tx.update(u, state, PARAMS)
        return state, (out, state)

    return jax.lax.scan(step, tx.init(PARAMS), updates)[1]


@functools.cache
def _compiled(name):
    row = ROWS[name]
    run = jax.jit(lambda updates: scanned(row.make(), updates))
    with promoting(row):
        return run.lower(GRADIENTS).compile()


def run(row, updates=GRADIENTS):
    return jax.device_get(_compiled(row.name)(updates))


@functools.cache
def _plain(name):
    return jax.device_get(_compiled(name)(GRADIENTS))


def plain(row):
    """What comes of the gradients as they are."""
    return _plain(row.name)


def bitwise(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        if a.tobytes() != b.tobytes():
            np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
            raise AssertionError(f"zeros of another sign at {path}")


def close(got, want, rtol=1e-5, atol=0.0):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol
        ),
        got,
        want,
    )


def knowledge(state):
    """The state without what counts updates, whatever they are."""

    def known(node):
        if isinstance(node, bounds.ScheduleState):
            return None
        return knowledge(node.bound) if isinstance(node, optaxclip.Record) else node

    counts = lambda node: isinstance(node, bounds.ScheduleState | optaxclip.Record)
    return jax.tree.map(known, state, is_leaf=counts)


def filled(value):
    return jax.tree.map(lambda p: np.full_like(p, value), PARAMS)


def damaged(cells, value):
    """An update in which one element of every cell is bad."""
    bad = at(GRADIENTS, 7)
    bad = jax.tree.map(np.array, bad)
    if cells == "element":
        return filled(value)
    bad["w"][1, 1] = value
    if cells == "unit":
        bad["w"][2, 0] = value
    if cells != "tree":
        bad["bb"][0] = value
    if cells in ("leaf", "unit"):
        bad["cc"] = np.full_like(bad["cc"], value)
    return bad


def inserted(more):
    """The gradients with other updates at some steps, and which are the gradients."""
    rest = [i for i in range(STEPS) if i not in more]
    places = np.searchsorted(rest, range(STEPS))
    sequence = jax.tree.map(lambda g: g[places], GRADIENTS)
    for step, update in more.items():
        for name in sequence:
            sequence[name][step] = update[name]
    return sequence, rest


def norms(updates):
    """The norm of every leaf at every step."""
    wide = jax.tree.map(lambda u: np.float64(u).reshape(len(u), -1), updates)
    return {name: np.linalg.norm(u, axis=1) for name, u in wide.items()}


def test_a_row_that_is_like_another_names_one_that_is_tried():
    tried = {row.name for row in LEARNED if not row.like}
    assert len({row.name for row in LEARNED}) == len(LEARNED)
    assert {row.like for row in LEARNED if row.like} <= tried


@law("poison")
def test_a_bad_update_leaves_no_trace_and_is_not_silent(row):
    kinds = [filled(np.nan), filled(np.inf), filled(-np.inf)]
    kinds += [damaged(row.cells, np.nan), damaged(row.cells, np.inf)]
    steps = [LATE, LATE + 1, 77, 120, 121]
    if "early" not in (row.exempt or {}):
        steps, kinds = [0, 1, 3, 6, 7, *steps], kinds + kinds
    sequence, rest = inserted(dict(zip(steps, kinds, strict=True)))
    outs, states = run(row, sequence)
    want_outs, want_states = plain(row)
    bitwise(at(outs, rest), at(want_outs, slice(len(rest))))
    bitwise(knowledge(at(states, rest)), knowledge(at(want_states, slice(len(rest)))))
    for step, bad in zip(steps, kinds, strict=True):
        for name, out in at(outs, step).items():
            assert (out != 0).all()
            nan = np.isnan(bad[name]).any()
            if row.cells != "element" or nan:
                free = np.array_equal(out, bad[name], equal_nan=True)
                assert free or not np.isfinite(out).any(), (step, name, out)


@law("zeros")
def test_zeros_leave_no_trace_and_stay_zeros(row):
    steps = [LATE, LATE + 1, 77, 120, 121]
    if "early" not in (row.exempt or {}):
        steps = [0, 1, 3, 6, 7, *steps]
    sequence, rest = inserted(dict.fromkeys(steps, filled(0.0)))
    outs, states = run(row, sequence)
    want_outs, want_states = plain(row)
    bitwise(at(outs, rest), at(want_outs, slice(len(rest))))
    bitwise(knowledge(at(states, rest)), knowledge(at(want_states, slice(len(rest)))))
    bitwise(at(outs, steps), at(sequence, steps))


@law("alone")
def test_a_damaged_leaf_touches_no_other(row):
    if row.cells == "tree":
        return
    steps = [LATE, LATE + 1, 77, 120, 121]
    nan, zero = ({n: np.array(g) for n, g in GRADIENTS.items()} for _ in range(2))
    nan["w"][steps] = np.array([np.nan, np.inf, -np.inf, np.nan, np.inf])[:, None, None]
    zero["w"][steps] = 0
    (outs, states), (want, want_states) = run(row, nan), run(row, zero)
    same = ("bb", "cc")
    if "zeros" in (row.exempt or {}):  # then they differ, but in this leaf only
        pick = lambda tree: [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if any(f"'{name}'" in jax.tree_util.keystr(path) for name in same)
        ]
        states, want_states = pick(states), pick(want_states)
        assert row.name == "adopt_clip" or states
    else:
        states, want_states = knowledge(states), knowledge(want_states)
        others = [i for i in range(STEPS) if i not in steps]
        bitwise(outs["w"][others], want["w"][others])
    bitwise(states, want_states)
    bitwise({n: outs[n] for n in same}, {n: want[n] for n in same})


@law()
def test_zeros_lock_nothing(row):
    sequence = {n: np.array(g) for n, g in GRADIENTS.items()}
    for name in sequence:
        sequence[name][:5] = 0
    sequence["w"][:65] = 0
    outs, _ = run(row, sequence)
    out, seen = (at(norms(u), slice(-20, None)) for u in (outs, sequence))
    for name in out:
        share = np.median(out[name] / seen[name])
        assert 0.02 < share < 50, (name, share)


def rise(row):
    """By how much the updates that come out grow when those that go in do."""
    factor = np.where(np.arange(STEPS) < 40, 1, 1000).astype(np.float32)
    sequence = jax.tree.map(lambda g: (g.T * factor).T, GRADIENTS)
    outs, _ = run(row, sequence)
    out = norms(outs)
    return [np.median(n[-20:]) / np.median(n[20:40]) for n in out.values()]


@law("rise")
def test_a_lasting_rise_of_scale_is_followed(row):
    assert min(rise(row)) > 100


@each([r for r in LEARNED if "published" in (r.exempt or {}).get("rise", "")])
def test_a_published_rule_never_follows_a_rise_of_scale(row):
    assert max(rise(row)) < 10


@law("range")
def test_magnitudes_over_the_whole_range(row):
    size = np.array([1, 1e-30, 1e30, 1e-10, 1e10, 1e30, 1e-30], np.float32)
    size = np.resize(size, STEPS)
    sequence = jax.tree.map(lambda g: (g.T * size).T, GRADIENTS)
    outs, states = run(row, sequence)
    for leaf in jax.tree.leaves(outs):
        assert np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(states):
        assert not np.isnan(leaf).any()
    for leaf in jax.tree.leaves(at(states, -1)):
        assert np.isfinite(leaf).all()


# The state, and what JAX does to it.


def known(row, step=LATE):
    """The state after so many of the gradients."""
    return jax.tree.map(jnp.asarray, at(plain(row)[1], step))


def stepped(tx, state, updates, params=PARAMS):
    """The updates that come out of every step, and the last state, without jit."""
    outs = []
    for i in range(len(jax.tree.leaves(updates)[0])):
        u = jax.tree.map(jnp.asarray, at(updates, i))
        out, state = tx.update(u, state, params)
        outs.append(out)
    return jax.tree.map(lambda *x: jnp.stack(x), *outs), state


AFTER = slice(LATE + 1, LATE + 3)


@functools.cache
def _eager(name):
    row = ROWS[name]
    return stepped(row.make(), known(row), at(GRADIENTS, AFTER))


def types(tree):
    def type_of(x):
        x = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
        return x.shape, x.dtype, x.weak_type

    return jax.tree.map(type_of, tree)


@law("state")
def test_init_gives_the_types_that_update_gives(row):
    tx = row.make()
    weak = {**narrow(PARAMS), "cc": jnp.asarray(3.0)}
    assert weak["cc"].weak_type
    for params in (PARAMS, weak):
        structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        state = tx.init(structs)
        bitwise(state, tx.init(params))
        out, after = jax.eval_shape(tx.update, params, state, params)
        assert types(after) == types(state)
        assert types(out) == types(jax.tree.map(jnp.asarray, params))


def narrow(tree):
    return {name: jnp.asarray(x, NARROW[name]) for name, x in tree.items()}


@law("narrow", slow=True)
def test_narrow_leaves_with_a_donated_state_and_one_trace(row):
    tx = row.make()
    narrowed = narrow(GRADIENTS)
    want, _ = run(row, jax.tree.map(lambda u: np.asarray(u, np.float32), narrowed))
    params = narrow(PARAMS)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1, compiler_options=FAST)
    def update(updates, state):
        traces.append(1)
        return tx.update(updates, state, params)

    state = tx.init(params)
    for step in range(8):
        out, state = update(at(narrowed, step), state)
        for name, u in out.items():
            assert u.dtype == NARROW[name]
            np.testing.assert_allclose(
                np.asarray(u, np.float32),
                want[name][step],
                rtol=2 * float(jnp.finfo(u.dtype).eps) + 1e-5,
            )
    assert len(traces) == 1
    assert {str(x.dtype) for x in jax.tree.leaves(state)} <= {"float32", "int32"}


@law(slow=True)
def test_jit_equals_eager(row):
    outs, states = plain(row)
    with promoting(row):
        got, state = _eager(row.name)
    close((got, state), (at(outs, AFTER), at(states, AFTER.stop - 1)))


@law(slow=True)
def test_vmap_over_the_number_that_is_tuned(row):
    numbers = [*row.values, *([] if row.free is None else [row.free])]

    def run(number):
        return scanned(row.make(**{row.tuned: number}), GRADIENTS)

    mapped = jax.jit(jax.vmap(run), compiler_options=FAST)
    with promoting(row):
        outs, states = jax.device_get(mapped(jnp.array(numbers, jnp.float32)))
        tx = row.make(**{row.tuned: row.values[1]})
        one = at(at(states, 1), LATE)
        want, state = stepped(tx, jax.tree.map(jnp.asarray, one), at(GRADIENTS, AFTER))
    early = slice(LATE)
    close(at(at((outs, states), 0), early), at(plain(row), early), rtol=1e-4)
    got = at(at(outs, 1), AFTER), at(at(states, 1), AFTER.stop - 1)
    close(got, (want, state), rtol=1e-4)
    assert any((out[0] != out[1]).any() for out in outs.values())
    if row.free is not None:
        bitwise(at(outs, -1), GRADIENTS)


@each([row for row in LEARNED if row.free is not None and not row.like])
def test_inf_is_no_limit_for_updates_that_are_all_the_same(row):
    tx = row.make(**{row.tuned: row.free})
    same = jax.tree.map(lambda p: np.stack([p] * 6), PARAMS)
    bitwise(stepped(tx, tx.init(PARAMS), same)[0], same)


@law(slow=True)
def test_inject_hyperparams_traces_the_numbers(row):
    wrapped = optax.inject_hyperparams(row.factory, static_args=row.static)
    tx = wrapped(**{row.tuned: row.values[1], **row.kwargs})
    plain = row.make(**{row.tuned: row.values[1]})
    with promoting(row):
        state = tx.init(PARAMS)
        assert set(state.hyperparams) >= {row.tuned, *row.kwargs} - {*row.static}
        state = state._replace(inner_state=known(row))
        got, state = stepped(tx, state, at(GRADIENTS, AFTER))
        want = stepped(plain, known(row), at(GRADIENTS, AFTER))
    close((got, state.inner_state), want)


@law()
def test_no_callback_and_no_sort(row):
    tx = row.make()
    with promoting(row):
        state = jax.eval_shape(tx.init, PARAMS)
        jaxpr = jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS)
    assert not {
        name for name in primitives(jaxpr.jaxpr) if "callback" in name or "sort" in name
    }


def primitives(jaxpr):
    """The names of all primitives of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


SIZES = np.array([0, 1, 1e-30, 1e30], np.float32)


@law("derivative", slow=True)
def test_derivatives_through_steps_are_finite(row):
    tx = row.make()
    params = {"w": PARAMS["w"][0]}

    def outs(updates):
        step = lambda state, u: tx.update(u, state, params)[::-1]
        return jax.lax.scan(step, tx.init(params), updates)[1]

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(updates):
        out, push = jax.linearize(outs, updates)
        ones = jax.tree.map(jnp.ones_like, out)
        return push(ones), *jax.linear_transpose(push, updates)(ones)

    for size in SIZES[:2] if "range" in (row.exempt or {}) else SIZES:
        slopes = both({"w": GRADIENTS["w"][:5, 0] * size})
        for kind, slope in zip(("forward", "reverse"), slopes, strict=True):
            assert np.isfinite(slope["w"]).all(), (kind, float(size))


SMOOTH = [
    "zclip:reciprocal",
    "ema_clip",
    "adagn",
    "spam_clip",
    "acclip",
    "clippy",
    "clip_by:mean current unit",
    "clip_by:mean_std current tree",
    "clip_by:relative ema leaf",
]


@each([ROWS[name] for name in SMOOTH])
def test_derivatives_are_those_of_finite_differences(row):
    tx = row.make()
    with jax.enable_x64(True), promoting(row):
        first, second = (
            {"w": jnp.asarray(_gradients(seed)["w"][:8, 0], jnp.float64)}
            for seed in (2, 3)
        )
        params = {"w": jnp.array([1.5, 2.5], jnp.float64)}

        def outs(t):
            def step(state, u):
                out, state = tx.update(u, state, params)
                return state, out

            updates = jax.tree.map(lambda u, d: u + t * d, first, second)
            return jax.lax.scan(step, tx.init(params), updates)[1]["w"]

        h = 1e-6
        value, slope = jax.jit(
            lambda t: jax.jvp(outs, (t,), (jnp.ones_like(t),)), compiler_options=FAST
        )(0.0)
        low, _, high = jax.jit(jax.vmap(outs), compiler_options=FAST)(
            jnp.array([-h, 0.0, h])
        )
        numeric = (high - low) / (2 * h)
        assert slope.dtype == jnp.float64 and (value != first["w"]).any()
        np.testing.assert_allclose(slope, numeric, rtol=1e-6, atol=1e-7)


# Inside of other transformations.


@law(slow=True)
def test_recorded_says_what_was_done_and_changes_no_bit(row):
    tx = row.make()
    if not isinstance(tx, optaxclip.Clip):
        with pytest.raises(TypeError, match=r"recorded: clip must be made by clip_by"):
            optaxclip.recorded(tx)
        return
    noted = optaxclip.recorded(tx)
    updates = at(GRADIENTS, AFTER)
    updates = {name: u * np.float32(3) for name, u in updates.items()}
    want, want_state = stepped(tx, known(row), updates)
    state = noted.init(PARAMS)._replace(bound=known(row))
    got, state = stepped(noted, state, updates)
    bitwise((got, state.bound), (want, want_state))
    assert optaxclip.records(state)[0] is state and int(state.steps) == 2
    seen, kept = (
        jax.tree.leaves(as_tree(tx.scope.split(at(u, -1), None)[0]))
        for u in (updates, got)
    )
    close(list(jnp.atleast_1d(state.norm)), [jnp.max(m) for m in seen])
    cells = [
        (m.max(), k.ravel()[m.argmax()], k.ravel() < (1 - 1e-6) * m.ravel())
        for m, k in zip(seen, kept, strict=True)
    ]
    clipped = np.concatenate([np.asarray(c) for _, _, c in cells])
    np.testing.assert_allclose(float(state.clipped), clipped.mean(), rtol=1e-6)
    for (m, k, _), limit in zip(cells, jnp.atleast_1d(state.limit), strict=True):
        want = new_magnitude(tx.shape.__name__, float(m), float(limit))
        np.testing.assert_allclose(k, want, rtol=1e-6)


@law("trees", slow=True)
def test_masked_and_partition_show_it_a_part_of_the_tree(row):
    tx = row.make()
    shown = {name: name != "w" for name in PARAMS}
    few = at(GRADIENTS, slice(2))
    part = lambda tree: {name: tree[name] for name in tree if shown[name]}
    parts = {True: tx, False: optax.identity()}
    with promoting(row):
        want, _ = stepped(tx, tx.init(part(PARAMS)), part(few), part(PARAMS))
        for whole in (optax.masked(tx, shown), optax.partition(parts, shown)):
            got, _ = stepped(whole, whole.init(PARAMS), few)
            bitwise(part(got), want)
            bitwise(got["w"], few["w"])


@law(slow=True)
def test_in_multisteps_in_apply_if_finite(row):
    """Under jit, where states that are not of one type would be refused."""
    tx = row.make()
    inner = optax.MultiSteps(optax.chain(tx, optax.scale(-1.0)), 2)
    whole = optax.apply_if_finite(inner.gradient_transformation(), 3)
    with standard():
        state = jax.eval_shape(whole.init, PARAMS)
        _, after = jax.eval_shape(whole.update, PARAMS, state, PARAMS)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        if row.name not in ("autoclip", "adagc", "spam_clip", "clippy"):
            return
        few = at(GRADIENTS, slice(4))
        updates = [at(few, 0), filled(np.nan), at(few, 1), at(few, 2), at(few, 3)]
        means = jax.tree.map(lambda u: (u[::2] + u[1::2]) / 2, few)
        update = jax.jit(whole.update, compiler_options=FAST)
        state, outs = whole.init(PARAMS), []
        for u in updates:
            out, state = update(u, state, PARAMS)
            outs.append(jax.tree.map(jnp.negative, out))
        want, _ = stepped(tx, tx.init(PARAMS), means)
    for i in (0, 1, 3):
        bitwise(jax.tree.map(jnp.abs, outs[i]), filled(0.0))
    close(outs[2], at(want, 0))
    close(outs[4], at(want, 1))


def test_orbax_restores_every_state_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(100 * rng.normal(size=x.shape), x.dtype)
    states = {
        f"row{i}": jax.tree.map(draw, jax.eval_shape(row.make().init, PARAMS))
        for i, row in enumerate(LEARNED)
    }
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), states
    )
    with standard(), orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        bitwise(checkpointer.restore(tmp_path / "states", like), states)


# Trees of other leaves.


@law("trees", "others", slow=True)
def test_what_is_not_floating_point_passes_through(row):
    others = {
        "none": None,
        "masked": optax.MaskedNode(),
        "counts": jnp.arange(3),
        "flag": jnp.array([True]),
        "keys": jax.random.key(0),
        "zero": np.zeros(2, jax.dtypes.float0),
    }
    numbers = {"bb": np.array([3, -4, 1], np.float32), "number": 2.0}
    arrays = {name: jnp.asarray(x) for name, x in numbers.items()}
    mixed = {**numbers, **others}
    tx = row.make()
    want, want_state = tx.update(arrays, tx.init(arrays), arrays)
    got, state = tx.update(mixed, tx.init(mixed), mixed)
    for name, leaf in others.items():
        assert got[name] is leaf
    bitwise({name: got[name] for name in arrays}, want)
    for a, b in zip(*map(jax.tree.leaves, (state, want_state)), strict=True):
        if row.cells == "leaf":  # a vector with an entry for what is not measured too
            named = optaxclip.by_name(a, mixed)
            a = jnp.stack([named[name] for name in arrays], axis=-1)
        bitwise(a, b)


@law("trees", "others", slow=True)
def test_trees_without_elements(row):
    tx = row.make()
    for empty in ({}, [], {"a": None}, {"a": jnp.arange(3)}):
        state = tx.init(empty)
        out, after = tx.update(empty, state, empty)
        assert jax.tree.structure(out) == jax.tree.structure(empty)
        assert types(after) == types(state)
    some = {"bb": GRADIENTS["bb"][:2]}
    more = {**some, "empty": np.zeros((2, 0, 3), np.float32)}
    want, _ = stepped(tx, tx.init(at(some, 0)), some, at(some, 0))
    got, state = stepped(tx, tx.init(at(more, 0)), more, at(more, 0))
    bitwise(got["bb"], want["bb"])
    for leaf in jax.tree.leaves(state):
        assert not np.isnan(leaf).any()


def of_leaf(state, name):
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if f"['{name}']" in jax.tree_util.keystr(path)
    ]


FINE = ("leaf", "unit", "element")


@law("others", "alone", slow=True)
def test_a_leaf_without_an_update_keeps_its_state(row):
    if row.cells not in FINE:
        return
    tx, state = row.make(), known(row)
    updates = jax.tree.map(jnp.asarray, at(GRADIENTS, LATE + 1))
    missing = {**updates, "w": None}
    want, _ = tx.update({**updates, "w": 0 * updates["w"]}, state, PARAMS)
    out, after = tx.update(missing, state, PARAMS)
    assert out["w"] is None
    for name in ("bb", "cc"):
        bitwise(out[name], want[name])
    assert types(after) == types(state)
    bitwise(of_leaf(knowledge(after), "w"), of_leaf(knowledge(state), "w"))
    tx.update(updates, after, PARAMS)


@law("others", "state", "leaves", slow=True)
def test_leaves_that_init_did_not_see_are_named(row):
    if row.cells not in FINE:
        return
    tx, state = row.make(), known(row)
    updates = jax.tree.map(jnp.asarray, at(GRADIENTS, LATE + 1))
    more = {**updates, "new": jnp.ones(2)}
    less = {name: u for name, u in updates.items() if name != "w"}
    for tree, place in ((more, "new"), (less, "w")):
        with pytest.raises(ValueError) as caught:
            tx.update(
                tree, state, {**PARAMS, "new": jnp.ones(2)} if tree is more else less
            )
        message = str(caught.value)
        assert re.match(r"(bounds\.)?\w+: (state|updates) must ", message), message
        if row.cells == "leaf":
            assert re.search(rf"shape \(3,\) .* shape \({len(tree)},\)", message)
        elif row.cells == "unit":  # a tuple with an array for every leaf
            assert f"got 3 arrays for {', '.join(sorted(tree))}." in message
        else:
            assert re.search(rf"\b{place}\b", message), message


@law("state")
def test_a_missing_state_is_refused(row):
    message = r"needs its state, got None. Call tx.init\(params\) and pass the state on"
    with pytest.raises(ValueError, match=message):
        row.make().update(PARAMS, None, PARAMS)


# What is refused.

REAL = (True, "1", None, 1j)
SHARES = (-0.1, 1, 1.5, np.nan)
COUNTS = (-1, 2.5, np.nan, np.inf)
REFUSED = [
    *[
        (factory, "percentile", (-1, 100.5, np.nan), REAL, {})
        for factory in (
            optaxclip.autoclip,
            optaxclip.percentile_clip,
            bounds.percentile,
        )
    ],
    *[
        (factory, "quantile", (-0.1, 0, 1.1, np.nan), REAL, {})
        for factory in (optaxclip.quantile_clip, bounds.tracked_quantile)
    ],
    (bounds.streaming_quantile, "quantile", (-0.1, 1.1, np.nan), REAL, {}),
    *[
        (factory, name, (0, -1.0, np.nan, np.inf), REAL, {})
        for factory in (optaxclip.quantile_clip, bounds.tracked_quantile)
        for name in ("rate", "initial")
    ],
    *[
        (factory, "decay", SHARES, REAL, kwargs)
        for factory, kwargs in (
            (optaxclip.zclip, {}),
            (optaxclip.ema_clip, {"ratio": 2.0}),
            (optaxclip.adagc, {}),
            (optaxclip.adaclip, {}),
            (optaxclip.spam_clip, {}),
            (optaxclip.adanorm, {}),
            (optaxclip.acclip, {}),
            (bounds.zscore, {}),
            (bounds.ema, {}),
            (bounds.second_moment, {}),
        )
    ],
    *[
        (factory, name, SHARES, REAL, {})
        for factory, names in (
            (optaxclip.adagn, ("mean_decay", "rms_decay")),
            (bounds.mean_over_rms, ("mean_decay", "rms_decay")),
            (optaxclip.acclip, ("momentum_decay",)),
            (optaxclip.scale_by_stable_adam, ("b1", "b2")),
        )
        for name in names
    ],
    *[
        (factory, "window", (0, -1), (True, 2.5, "8", None), {})
        for factory in (
            optaxclip.autoclip,
            optaxclip.percentile_clip,
            bounds.percentile,
            bounds.median_mad,
        )
    ],
    *[
        (factory, "warmup", COUNTS, REAL, kwargs)
        for factory, kwargs in (
            (optaxclip.zclip, {}),
            (optaxclip.mean_clip, {"ratio": 2.0}),
            (optaxclip.median_clip, {}),
            (optaxclip.adagc, {}),
            (optaxclip.spam_clip, {}),
            (bounds.percentile, {}),
            (bounds.median_mad, {}),
            (bounds.streaming_quantile, {}),
            (bounds.mean, {}),
            (bounds.ema, {}),
            (bounds.deviation, {}),
            (bounds.mean_std, {}),
            (bounds.zscore, {}),
        )
    ],
    *[
        (factory, "warmup", (5, np.int32(9)), (), {"window": 4})
        for factory in (bounds.percentile, bounds.median_mad)
    ],
    (optaxclip.zclip, "z", (0, -1.0, np.nan), REAL, {}),
    (bounds.zscore, "z", (0, -1.0, np.nan), REAL, {}),
    (optaxclip.ema_clip, "ratio", (1, 0.5, np.nan), REAL, {}),
    (optaxclip.adagc, "ratio", (1, 0.5, np.nan), REAL, {}),
    (bounds.ema, "ratio", (1, 0.5, np.nan), REAL, {}),
    (bounds.ema, "ratio", (-0.5, np.nan), REAL, {"observe": "raw"}),
    (bounds.mean, "ratio", (-0.5, np.nan), REAL, {"observe": "current"}),
    (optaxclip.mean_clip, "ratio", (-0.5, np.nan), REAL, {}),
    (optaxclip.norm_growth_clip, "factor", (1, 0.5, np.nan), REAL, {}),
    (bounds.growth, "factor", (1, 0.5, np.nan), REAL, {}),
    (optaxclip.spam_clip, "threshold", (1, 0.5, np.nan), REAL, {}),
    (bounds.second_moment, "threshold", (1, 0.5, np.nan), REAL, {}),
    *[
        (factory, "k", (-1, np.nan), REAL, {})
        for factory in (
            optaxclip.median_clip,
            bounds.deviation,
            bounds.mean_std,
            bounds.median_mad,
        )
    ],
    *[
        (factory, "eps", (-1e-8, np.nan), REAL, {})
        for factory in (
            optaxclip.zclip,
            optaxclip.adagn,
            optaxclip.acclip,
            optaxclip.scale_by_stable_adam,
            bounds.zscore,
            bounds.mean_over_rms,
        )
    ],
    (optaxclip.zclip, "max_norm", (-1.0, np.nan), REAL, {}),
    (optaxclip.adagc, "max_norm", (-1.0, np.nan), REAL, {}),
    (optaxclip.adopt_clip, "exponent", (-1.0, np.nan), REAL, {}),
    (optaxclip.clippy, "ratio", (-1.0, np.nan), REAL, {}),
    (optaxclip.clippy, "absolute", (-1.0, np.nan), REAL, {}),
    (optaxclip.acclip, "alpha", (0, -1.0, np.nan), REAL, {}),
    *[
        (factory, name, ("other", None, 1, True), (), {})
        for factory, name in (
            (optaxclip.zclip, "beyond"),
            (bounds.zscore, "beyond"),
            (optaxclip.quantile_clip, "step"),
            (bounds.tracked_quantile, "step"),
            (bounds.ema, "start"),
            (bounds.ema, "observe"),
        )
    ],
    *[
        # What is kept is at most the limit, so a limit that learns it can only fall.
        (factory, "observe", ("kept", "other", None, 1, True), (), {})
        for factory in (
            bounds.mean,
            bounds.deviation,
            bounds.mean_std,
            bounds.percentile,
            bounds.median_mad,
            bounds.streaming_quantile,
        )
    ],
]


def in_full(factory):
    of_bounds = factory.__module__.startswith("optaxclip.bounds")
    return f"bounds.{factory.__name__}" if of_bounds else factory.__name__


@pytest.mark.parametrize(
    "factory, name, values, types, kwargs",
    REFUSED,
    ids=[f"{in_full(row[0])}-{row[1]}" for row in REFUSED],
)
def test_a_bad_argument_is_refused_at_construction(
    factory, name, values, types, kwargs
):
    for bad, error in [(v, ValueError) for v in values] + [
        (t, TypeError) for t in types
    ]:
        with pytest.raises(error) as caught:
            factory(**{**kwargs, name: bad})
        message = str(caught.value)
        assert message.startswith(f"{in_full(factory)}: {name} must"), message
        assert f"got {name}={bad!r}. " in message
        assert re.search(r"\. (Pass|Use) ", message), message


@pytest.mark.parametrize(
    "factory",
    [
        optaxclip.autoclip,
        optaxclip.percentile_clip,
        bounds.percentile,
        bounds.median_mad,
    ],
)
def test_a_window_that_is_traced_is_refused(factory):
    def make(window):
        factory(window=window)
        return window

    with pytest.raises(TypeError, match=r"window must be .* static_args='window'"):
        make(jnp.int32(8))
    with pytest.raises(TypeError, match=r"window must be .* static_args='window'"):
        jax.jit(make)(8)


def test_inject_hyperparams_needs_to_know_that_a_window_is_static():
    tx = optax.inject_hyperparams(optaxclip.autoclip)(window=8)
    with pytest.raises(TypeError, match=r"autoclip: window .*static_args='window'"):
        tx.init(PARAMS)


WINDOWS = {
    "alone": lambda bound: bound,
    "at_most": lambda bound: bounds.at_most(1.0, bound),
    "at_least": lambda bound: bounds.at_least(bound, 1.0),
    "plus": lambda bound: bounds.plus(bound, bounds.mean()),
    "phases": lambda bound: bounds.phases(1.0, bound),
    "parts": lambda bound: {"a": 1.0, "b": bound},
    "relative": lambda bound: bounds.relative(bound),
    "recorded": lambda bound: optaxclip.recorded(bound),
    "nested": lambda bound: bounds.recorded({"a": bounds.at_most(1.0, bound)}),
}


@pytest.mark.parametrize("inside", WINDOWS)
@pytest.mark.parametrize("make", [bounds.percentile, bounds.median_mad])
def test_a_window_of_every_element_is_refused(make, inside):
    bound = WINDOWS[inside](make(window=50))
    message = (
        r"clip_by: bound must not remember a window .* got window=50: 50 copies of the "
        r"params\. Use bounds\.tracked_quantile"
    )
    for scope in (scopes.element(), scopes.side()):
        with pytest.raises(ValueError, match=message):
            clip_by(scope, bound)
    for scope in (scopes.tree(), scopes.leaf(), scopes.unit(), scopes.peak()):
        clip_by(scope, bound)
    clip_by(scopes.element(), bounds.jointly(make(window=50)))


def test_the_units_of_a_state_are_mapped_as_params_and_its_vectors_are_not():
    params = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}
    one_more = lambda x: x + 1
    units = optaxclip.clip_by_unit_norm(bounds.ema(2.0))
    state = units.init(params)
    mapped = optax.tree.map_params(units, one_more, state)
    chex.assert_trees_all_equal(mapped, jax.tree.map(one_more, state))
    leaves = optaxclip.clip_by_leaf_norm(bounds.ema(2.0))
    state = leaves.init(params)
    mapped = optax.tree.map_params(leaves, one_more, state)
    chex.assert_trees_all_equal(mapped, state)
