"""Inside `shard_map`: what one device gives, with scalar collectives, or a refusal."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    KINDS,
    ORDS,
    SPECS,
    UNITS,
    all_reduced,
    check_equal,
    leading,
    learned_on_one_device,
    learning,
    mapped,
    mesh,
    one_step,
    placed,
    scans_of,
    sequence,
    state_specs,
    stateless,
    stateless_on_one_device,
    steps_of,
    updates,
)
from oracles import norm
from tables import FAST, as_tree

import optaxclip
from optaxclip import bounds, clip_by, norms, scopes
from optaxclip._compat import vary

# Every public factory -----------------------------------------------------------------


@pytest.mark.parametrize("tracked", [True, False])
def test_every_factory_equals_one_device(tracked):
    rows = stateless(tracked)
    out = {name: (SPECS, state_specs(tx)) for name, tx in rows.items()}
    run = jax.jit(mapped(steps_of(rows), (SPECS, SPECS), out, tracked))
    check_equal(run(updates(0), updates(1)), stateless_on_one_device())


@pytest.mark.parametrize(
    "names, tracked, outside",
    [(None, True, False), (KINDS, True, True), (KINDS, False, False)],
    ids=["tracked", "state from outside", "untracked"],
)
def test_what_learns_equals_one_device(names, tracked, outside):
    rows = learning(tracked, names)
    specs = {name: state_specs(tx) for name, tx in rows.items()}
    out = (specs, dict.fromkeys(rows, leading(SPECS)))
    ins = (leading(SPECS), SPECS, *([specs] if outside else []))
    arguments = [sequence(), updates(1)]
    if outside:
        init = lambda p: {name: tx.init(p) for name, tx in rows.items()}
        arguments.append(jax.jit(init)(arguments[1]))
    run = jax.jit(mapped(scans_of(rows), ins, out, tracked))
    states, outs = learned_on_one_device()
    want = {n: states[n] for n in rows}, {n: outs[n] for n in rows}
    check_equal(run(*arguments), want)


# Norms against float64 ----------------------------------------------------------------


def label(updates):
    del updates
    return {"w": "a", "bb": "b", "cc": {"conv": "b", "scale": "a"}}


def magnitudes(updates, axis_name=None, specs=SPECS):
    """What every scope that sums measures, in every order."""
    split = {
        "tree": lambda ord: (scopes.tree(ord), axis_name),
        "leaf": lambda ord: (scopes.leaf(ord), axis_name),
        "group": lambda ord: (scopes.group(label, ord), axis_name),
        "unit": lambda ord: (scopes.unit(UNITS, ord), specs),
    }
    seen = {}
    for name, make in split.items():
        for ord in ORDS:
            scope, told = make(ord)
            seen[name, str(ord)] = as_tree(scope.split(updates, None, told)[0])
    seen["tree_norm", "None"] = norms.tree_norm(updates, axis_name=axis_name)
    return seen


def oracle(updates):
    w, bb, conv, scale = (
        updates["w"],
        updates["bb"],
        updates["cc"]["conv"],
        updates["cc"]["scale"],
    )
    seen = {}
    for ord in ORDS:
        of = lambda *xs, p=ord: norm(xs, 2 if p is None else p)
        leaf = {"w": of(w), "bb": of(bb), "cc": {"conv": of(conv), "scale": of(scale)}}
        unit = {
            "w": [[of(w[:, i]) for i in range(w.shape[1])]],
            "bb": [of(bb)],
            "cc": {
                "conv": [[[[of(conv[..., i]) for i in range(conv.shape[-1])]]]],
                "scale": [of(scale)],
            },
        }
        seen["tree", str(ord)] = of(w, bb, conv, scale)
        seen["leaf", str(ord)] = leaf
        seen["group", str(ord)] = {"a": of(w, scale), "b": of(bb, conv)}
        seen["unit", str(ord)] = jax.tree.map(
            np.float64, unit, is_leaf=lambda n: isinstance(n, list)
        )
    seen["tree_norm", "None"] = seen["tree", "None"]
    return seen


def cells_specs():
    whole = jax.tree.map(lambda _: P(), SPECS)
    of = {"tree": P(), "tree_norm": P(), "leaf": whole, "group": {"a": P(), "b": P()}}
    of["unit"] = {**whole, "w": P(None, "t")}
    return {key: of[key[0]] for key in jax.eval_shape(magnitudes, updates(0))}


@functools.cache
def measured(how):
    """The compiled function of updates, and where it wants them."""
    if how in (AxisType.Auto, AxisType.Explicit):
        with jax.set_mesh(mesh(how)):
            run = jax.jit(lambda u: magnitudes(u, specs=None))
            compiled = run.lower(placed(updates(0), how)).compile()
        return lambda u: compiled(placed(u, how))
    names = (None, SPECS) if how == "tracked" else (SPECS, SPECS)
    f = lambda u: magnitudes(u, *names)
    return jax.jit(mapped(f, (SPECS,), cells_specs(), how == "tracked"))


def scaled(factors):
    u = updates(3)
    u["w"] = (u["w"] * np.float64(factors["w"])).astype(np.float32)
    u["bb"] = (u["bb"] * np.float64(factors["bb"])).astype(np.float32)
    u["cc"]["conv"] = (u["cc"]["conv"] * np.float64(factors["cc"])).astype(np.float32)
    return u


HOW = ["tracked", "untracked", AxisType.Auto, AxisType.Explicit]
SCALES = {
    "one": dict(w=1, bb=1, cc=1),
    "huge": dict(w=1e25, bb=1e25, cc=1e25),
    "tiny": dict(w=1e-30, bb=1e-30, cc=1e-30),
    "by leaf": dict(w=1e25, bb=1e-30, cc=1),
    # Those along t of one device need a second pass, those of the other need none.
    "huge units": dict(w=[1e25] * 2 + [1] * 8, bb=1, cc=1),
    "tiny units": dict(w=[1] * 9 + [1e-30], bb=1, cc=1),
    "both": dict(w=[1] * 5 + [1e-30, 1e25, 1, 1e30, 1], bb=1, cc=[1, 1, 1e25, 1, 1, 1]),
    "zeros": dict(w=[0, 0, 0, 1, 1, 0, 1e25, 0, 0, 0], bb=0, cc=0),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("how", HOW, ids=str)
def test_norms_of_any_magnitude_are_those_of_float64(how, scale):
    u = scaled(SCALES[scale])
    check_magnitudes(measured(how)(u), oracle(u))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_what_is_not_finite_on_one_device_is_seen_by_all(how, value):
    for place in [("w", (0, 0)), ("w", (15, 9)), ("bb", (5,)), ("conv", (2, 1, 3, 0))]:
        u = updates(4)
        leaf = u["cc"]["conv"] if place[0] == "conv" else u[place[0]]
        leaf[place[1]] = value
        check_magnitudes(measured(how)(u), oracle(u))


def check_magnitudes(got, want):
    assert got.keys() == want.keys()
    for key in got:
        pairs = zip(jax.tree.leaves(got[key]), jax.tree.leaves(want[key]), strict=True)
        for g, w in pairs:
            np.testing.assert_allclose(
                np.asarray(g, np.float64), w, 1e-6, err_msg=str(key)
            )


def test_one_damaged_element_makes_its_whole_cell_nan():
    u = updates(4)
    u["w"][15, 9] = np.nan
    clips = {
        "global": optaxclip.clip_by_global_norm(1.0, ord=math.inf),
        "leaf": optaxclip.clip_by_leaf_norm(1.0),
        "peak": clip_by(scopes.peak(), 1.0),
        "unit": optaxclip.sharded(optaxclip.clip_by_unit_norm(1.0), SPECS),
    }
    run = mapped(
        lambda u: {name: tx.update(u, None)[0] for name, tx in clips.items()},
        (SPECS,),
        dict.fromkeys(clips, SPECS),
    )
    for name, out in jax.jit(run)(u).items():
        damaged = jax.tree.map(lambda x: np.isnan(np.asarray(x)), out)
        if name == "unit":
            assert damaged["w"][:, 9].all() and not damaged["w"][:, :9].any()
        else:
            assert damaged["w"].all()
        assert damaged["bb"].all() == (name == "global"), name


def test_a_limit_that_is_nan_on_one_device_is_recorded_by_all():
    u, params = updates(4), updates(5)
    u["w"][0, 9], params["w"][0, 9] = 100, np.nan
    tx = clip_by(scopes.unit(UNITS), bounds.recorded(bounds.relative(0.1)))
    step = lambda tx: lambda u, p: tx.update(u, tx.init(p), p)[1]
    want = jax.jit(step(tx))(u, params)
    run = mapped(step(optaxclip.sharded(tx, SPECS)), (SPECS, SPECS), P())
    check_equal(jax.jit(run)(u, params), want)
    limits = optaxclip.by_name(want.limit, u)
    assert np.isnan(limits["w"]) and np.isnan(want.scale)
    split = jax.jit(step(tx))(placed(u), placed(params))
    check_equal(split, want)


# What the devices tell each other -----------------------------------------------------


SUMS = {  # the clip, how many leaves, arrays in each sum, size of the largest
    "global": (optaxclip.clip_by_global_norm(1.0), 100, [1, 1, 1], 1),
    "leaf": (optaxclip.clip_by_leaf_norm(1.0), 100, [1, 1, 1], 100),
    "unit": (optaxclip.clip_by_unit_norm(1.0), 20, [4, 8], 8),
    "element": (optaxclip.clip(1.0), 20, [], 0),
}


@pytest.mark.parametrize(
    "name, tracked", [*[(name, True) for name in SUMS], ("unit", False)]
)
def test_one_sum_for_each_set_of_axes_however_many_leaves(name, tracked):
    tx, count, numbers, largest = SUMS[name]
    kinds = [P("d", "t"), P("t"), P("d"), P(), P(None, ("d", "t"))]
    specs = [kinds[i % len(kinds)] for i in range(count)]
    leaves = [np.full((8, 8), i, np.float32) for i in range(count)]
    if name == "unit" or not tracked:
        tx = optaxclip.sharded(tx, specs)
    f = mapped(lambda u: tx.update(u, None)[0], (specs,), specs, tracked)
    text = jax.jit(f).lower(leaves).compile(FAST).as_text()
    sums = all_reduced(text)
    assert sorted(map(len, sums)) == numbers
    assert max(map(max, sums), default=0) == largest
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)


# Under the transformations of JAX -----------------------------------------------------

STEPS = {
    "global": optaxclip.clip_by_global_norm(1.0),
    "unit": optaxclip.sharded(optaxclip.clip_by_unit_norm(0.5), SPECS),
    "peak": optaxclip.adaclip(),
}


def clipped(u):
    return {name: one_step(tx, u, u)[0] for name, tx in STEPS.items()}


OUT = dict.fromkeys(STEPS, SPECS)


def times(tree, scale):
    return jax.tree.map(lambda x: x * np.float32(scale), tree)


def stacked():
    # The norms of one example overflow, and of another vanish, in the first pass.
    several = [times(updates(6), scale) for scale in (1.0, 1e25, 1e-30)]
    return jax.tree.map(lambda *x: np.stack(x), *several)


@functools.cache
def stack_on_one_device():
    return jax.jit(jax.vmap(clipped))(stacked())


def first_on_one_device():
    return jax.tree.map(lambda x: x[0], stack_on_one_device())


def test_eager():
    tx, u = optaxclip.clip_by_global_norm(1.0), {"a": np.ones(4), "b": np.ones(5)}
    specs = {"a": P("d"), "b": P()}
    got = mapped(lambda u: tx.update(u, None)[0], (specs,), specs)(u)
    check_equal(got, jax.jit(tx.update)(u, None)[0])


def test_in_nested_jit_cond_and_remat():
    inner = jax.jit(jax.checkpoint(clipped))
    f = lambda u: lax.cond(True, inner, lambda u: {n: u for n in STEPS}, u)
    check_equal(jax.jit(mapped(f, (SPECS,), OUT))(updates(6)), first_on_one_device())


def test_vmap_inside():
    f = mapped(jax.vmap(clipped), (leading(SPECS),), leading(OUT))
    check_equal(jax.jit(f)(stacked()), stack_on_one_device())


@pytest.mark.parametrize("tracked", [True, False])
def test_vmap_outside(tracked):
    def f(u):
        rows = {name: optaxclip.sharded(tx, SPECS) for name, tx in STEPS.items()}
        return {name: one_step(tx, u, u)[0] for name, tx in rows.items()}

    f = mapped(f, (SPECS,), OUT, tracked)
    check_equal(jax.jit(jax.vmap(f))(stacked()), stack_on_one_device())


ALONE = {
    "global": optaxclip.recorded(optaxclip.zclip(max_norm=0.5)),
    "unit": optaxclip.recorded(optaxclip.clip_by_unit_norm(0.5)),
    "element": optaxclip.recorded(optaxclip.clip(0.5)),
    "jointly": clip_by(scopes.unit(), bounds.jointly(bounds.ema(1.5, warmup=1))),
}


def examples():
    """One for each device; some overflow, or vanish, in the first pass."""
    factors = np.float32([1, 1e25, 1, 1, 1e-30, 1, 2, 3])
    lay = lambda x: np.multiply.outer(factors, x).astype(np.float32)
    return jax.tree.map(lay, updates(6))


def two_steps_each(rows):
    def two_steps(tx, u):
        step = lambda state, size: tx.update(jax.tree.map(size.__mul__, u), state)[::-1]
        return lax.scan(step, tx.init(u), jnp.array([1.0, 2.0]))

    return jax.vmap(lambda u: {name: two_steps(tx, u) for name, tx in rows.items()})


@functools.cache
def two_steps_on_one_device():
    return jax.jit(two_steps_each(ALONE))(examples())


@pytest.mark.parametrize("tracked", [True, False])
def test_every_device_for_itself(tracked):
    alone = {name: optaxclip.sharded(tx, ()) for name, tx in ALONE.items()}
    run = mapped(two_steps_each(alone), (P("d"),), P("d"), tracked)
    check_equal(jax.jit(run)(examples()), two_steps_on_one_device())


def test_an_axis_that_is_not_mapped_is_followed_by_the_compiler():
    manual = jax.tree.map(
        lambda spec: P(*[name if name == "d" else None for name in spec]), SPECS
    )
    for kind in (AxisType.Auto, AxisType.Explicit):
        out = dict.fromkeys(STEPS, manual)
        options = dict(mesh=mesh(kind), axis_names={"d"})
        f = jax.jit(mapped(clipped, (manual,), out, **options))
        u = placed(updates(6), kind)
        check_equal(f(u), first_on_one_device())
        text = f.lower(u).compile().as_text()
        # JAX itself gathers where a mapped axis is next to an Explicit one.
        gathered = re.search(r"all-gather|all-to-all|collective-permute", text)
        assert not gathered or kind == AxisType.Explicit


def test_pmap_with_a_name_and_with_none():
    u = np.arange(1.0, 17.0, dtype=np.float32).reshape(8, 2)
    tx = optaxclip.clip_by_global_norm(1.0)
    step = lambda tx: lambda x: tx.update(x, None)[0]
    together = jax.pmap(step(optaxclip.sharded(tx, "i")), axis_name="i")(u)
    np.testing.assert_allclose(together, u / np.linalg.norm(u), 1e-6)
    # Averaged gradients are the same everywhere.
    alone = jax.pmap(step(optaxclip.sharded(tx, ())))(u)
    np.testing.assert_allclose(
        alone, u / np.linalg.norm(u, axis=1, keepdims=True), 1e-6
    )
    np.testing.assert_array_equal(jax.pmap(step(optaxclip.clip(2.0)))(u), u.clip(-2, 2))


def test_a_named_vmap_keeps_the_norms_of_examples():
    u = np.arange(1.0, 7.0, dtype=np.float32).reshape(3, 2)
    tx = optaxclip.clip_by_global_norm(1.0)
    step = lambda tx: lambda x: tx.update(x, None)[0]
    alone = jax.vmap(step(tx), axis_name="i")(u)
    np.testing.assert_allclose(
        alone, u / np.linalg.norm(u, axis=1, keepdims=True), 1e-6
    )
    together = jax.vmap(step(optaxclip.sharded(tx, "i")), axis_name="i")(u)
    np.testing.assert_allclose(together, u / np.linalg.norm(u), 1e-6)


DERIVED = {
    "leaf": optaxclip.clip_by_leaf_norm(0.5),
    "leaf 3": optaxclip.clip_by_leaf_norm(0.5, ord=3),
    "global": optaxclip.clip_by_global_norm(0.1, ord="rms"),
    "unit": optaxclip.clip_by_unit_norm(0.5, ord=math.inf),
}


def each_clip(specs=None):
    rows = {name: optaxclip.sharded(tx, specs) for name, tx in DERIVED.items()}
    return lambda u: {name: tx.update(u, None)[0] for name, tx in rows.items()}


def pushed_and_pulled(f, u, du, ct):
    """Derivatives along du, and the gradient of the sum of products with ct."""
    _, pull = jax.vjp(f, u)
    return jax.jvp(f, (u,), (du,))[1], pull(dict.fromkeys(DERIVED, ct))[0]


@functools.cache
def derivatives(where):
    out = dict.fromkeys(DERIVED, SPECS)
    f = each_clip(None if where == "jit" else SPECS)
    if where.startswith("outside"):
        f = mapped(f, (SPECS,), out, tracked=where == "outside")
    run = functools.partial(pushed_and_pulled, f)
    if where == "inside":
        run = mapped(run, (SPECS,) * 3, (out, SPECS))
    return jax.jit(run, compiler_options=FAST)


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-30])
@pytest.mark.parametrize("where", ["inside", "outside", "outside untracked"])
def test_derivatives_are_those_under_jit(where, scale):
    arguments = times(updates(7), scale), updates(8), updates(9)
    got = derivatives(where)(*arguments)
    want = derivatives("jit")(*arguments)
    for (path, g), w in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert np.isfinite(g).all(), path
        np.testing.assert_allclose(g, w, 1e-5, 1e-6 * np.abs(w).max(), str(path))


# Leaves of any kind -------------------------------------------------------------------

ODD = {
    "bf16": P("d", "t"),
    "fp16": P("t"),
    "complex": P("d"),
    "empty": P("d"),
    "scalar": P(),
    "numpy": P("d"),
    "count": P("d"),
    "key": P(),
    "none": None,
    "masked": optax.MaskedNode(),
}


def odd():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    return {
        "bf16": jnp.asarray(draw(8, 4), jnp.bfloat16),
        "fp16": jnp.asarray(draw(6), jnp.float16),
        "complex": jnp.asarray(draw(8) + 1j * draw(8), jnp.complex64),
        "empty": jnp.zeros((0, 4)),
        "scalar": jnp.float32(2),
        "numpy": draw(4).astype(np.float32),
        "count": jnp.arange(8),
        "key": jax.random.key(0),
        "none": None,
        "masked": optax.MaskedNode(),
    }


ANY_LEAF = {
    "leaf": optaxclip.clip_by_leaf_norm(0.5, ord=3),
    "global": optaxclip.clip_by_global_norm(1.0, ord=math.inf),
    "unit": optaxclip.adaptive_grad_clip(0.1),
    "group": optaxclip.clip_by_group_norm(1.0, "all"),
    "element": optaxclip.clip(0.5),
    "peak": optaxclip.recorded(optaxclip.adaclip()),
}


def clipped_leaves(u):
    rows = {name: optaxclip.sharded(tx, ODD) for name, tx in ANY_LEAF.items()}
    return {name: one_step(tx, u, u)[0] for name, tx in rows.items()}


@functools.cache
def clipped_leaves_on_one_device():
    # Under jit specs are not needed, and do no harm.
    return jax.jit(clipped_leaves)(odd())


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("tracked", [True, False])
def test_leaves_of_any_kind(tracked):
    out = dict.fromkeys(ANY_LEAF, ODD)
    want = clipped_leaves_on_one_device()
    got = jax.jit(mapped(clipped_leaves, (ODD,), out, tracked))(odd())
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert (g.shape, g.dtype) == (w.shape, w.dtype), path
        if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = map(jax.random.key_data, (g, w))
        wide = [np.asarray(x).astype(np.complex128) for x in (g, w)]
        rtol = 4 * float(jnp.finfo(g.dtype).eps) if g.dtype.kind in "fVc" else 0
        np.testing.assert_allclose(*wide, rtol, err_msg=str(path))


@pytest.mark.parametrize("tracked", [True, False])
def test_an_empty_tree(tracked):
    tx = optaxclip.clip_by_global_norm(1.0)
    f = mapped(lambda u: one_step(tx, u, u)[0], ({},), {}, tracked)
    assert jax.jit(f)({}) == {}


def test_params_of_another_structure_do_not_matter_to_what_needs_none():
    tx = optaxclip.clip_by_global_norm(1.0)
    f = lambda u: tx.update(u, None, {**u, "w": {"deeper": u["w"]}})[0]
    check_equal(
        jax.jit(mapped(f, (SPECS,), SPECS))(updates(6)), first_on_one_device()["global"]
    )


@pytest.mark.parametrize("tracked", [True, False])
def test_large_leaves(tracked):
    # Above 2**14 elements the first pass is another program than those that follow.
    specs = {"w": P("d", "t"), "b": P("t"), "v": P()}
    rng = np.random.default_rng(0)
    shapes = {"w": (512, 512), "b": (2**16,), "v": (2**15,)}
    u = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    rows = {
        "leaf": optaxclip.clip_by_leaf_norm(1e-3),
        "unit": optaxclip.clip_by_unit_norm(1e-3),
    }
    run = lambda rows: lambda u: {n: tx.update(u, None)[0] for n, tx in rows.items()}
    told = {name: optaxclip.sharded(tx, specs) for name, tx in rows.items()}
    f = jax.jit(mapped(run(told), (specs,), dict.fromkeys(rows, specs), tracked))
    want = jax.jit(run(rows))
    for scales in [(1, 1, 1), (1e25, 1, 1e-30)]:
        v = {n: x * np.float32(s) for (n, x), s in zip(u.items(), scales, strict=True)}
        check_equal(f(v), want(v))


# Refusals -----------------------------------------------------------------------------


def refused(f, match, in_specs=(SPECS,), out_specs=SPECS, tracked=True):
    with pytest.raises(ValueError, match=match):
        f = mapped(f, in_specs, out_specs, tracked)
        jax.eval_shape(f, *[updates(0) for _ in in_specs])


GLOBAL = optaxclip.clip_by_global_norm
UNIT = optaxclip.clip_by_unit_norm
NOT_TOLD = "axis_name must be given .* for bb. Use shard_map with check_vma=True; or "
SLICES = (
    "axis_name must tell which dimensions .* for {}, split over .*optaxclip.sharded"
)
MESSAGES = {
    "untracked": (False, lambda: GLOBAL(1.0), NOT_TOLD),
    "untracked leaves": (False, lambda: optaxclip.adaclip(), NOT_TOLD),
    "untracked units": (False, lambda: UNIT(1.0), NOT_TOLD),
    "untracked clippy": (False, lambda: optaxclip.clippy(0.1), "clippy: " + NOT_TOLD),
    "untracked Adam": (
        False,
        lambda: optaxclip.scale_by_stable_adam(),
        "scale_by_stable_adam: " + NOT_TOLD,
    ),
    "untracked count": (
        False,
        lambda: optaxclip.zero_nonfinite(),
        "zero_nonfinite: " + NOT_TOLD,
    ),
    "one name for all": (
        True,
        lambda: GLOBAL(1.0, axis_name=("d", "t")),
        "agree with the types .* got 'd', 't' for bb, which varies over 't'. Leave",
    ),
    "a wrong spec": (
        True,
        lambda: GLOBAL(1.0, axis_name={**SPECS, "bb": P("d")}),
        "agree with the types .* got 'd' for bb, which varies over 't'. Leave",
    ),
    "an unknown name": (
        True,
        lambda: GLOBAL(1.0, axis_name="x"),
        "axis_name must be a mesh axis, got 'x'; there is 'd', 't'. Correct it",
    ),
    "an unknown name in a spec, untracked": (
        False,
        lambda: GLOBAL(1.0, axis_name={**SPECS, "bb": P("x")}),
        "axis_name must be a mesh axis, got 'x'; there is 'd', 't'. Correct it",
    ),
    "specs of another structure": (
        False,
        lambda: GLOBAL(1.0, axis_name={"w": P("d", "t"), "bb": P("t")}),
        "axis_name has no value for cc/conv, got values for .*w. Add one",
    ),
    "specs of leaves that are not there": (
        True,
        lambda: GLOBAL(1.0, axis_name={**SPECS, "extra": P()}),
        "axis_name has a value for extra, which does not exist; .* Remove",
    ),
    "a spec that is too long": (
        True,
        lambda: GLOBAL(1.0, axis_name={**SPECS, "bb": P("t", None)}),
        r"no longer than the rank .* for shape \(3,\) at bb. Give the in_specs",
    ),
    "units without specs": (True, lambda: UNIT(1.0), SLICES.format("cc/conv")),
    "units with names": (
        False,
        lambda: optaxclip.sharded(UNIT(1.0), ("d", "t")),
        SLICES.format("cc/conv"),
    ),
    "units of params": (
        True,
        lambda: optaxclip.adaptive_grad_clip(0.1),
        SLICES.format("cc/conv"),
    ),
    "recorded elements, untracked": (
        False,
        lambda: optaxclip.recorded(optaxclip.clip(1.0)),
        "recorded: cells of elements .* got bb of shape .*.*Use shard_map with",
    ),
    "recorded units, untracked": (
        False,
        lambda: optaxclip.sharded(optaxclip.recorded(UNIT(1.0)), SPECS),
        "recorded: cells of .* units .* got bb of shape .*.*Use shard_map with",
    ),
    "units jointly, untracked": (
        False,
        lambda: optaxclip.sharded(UNIT(bounds.jointly(1.0)), SPECS),
        "jointly: cells of .* units .* got bb of shape .*.*Use shard_map with",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_cannot_be_right_is_refused(name):
    tracked, make, match = MESSAGES[name]
    tx = make()
    refused(lambda u: one_step(tx, u, u)[0], match, tracked=tracked)


def test_functions_of_one_array_are_refused():
    f = lambda u: {**u, "w": optaxclip.unitwise_norm(u["w"])}
    refused(f, SLICES.format(r"\."))
    refused(f, r"unitwise_norm: axis_name must be given .* for \.", tracked=False)
    told = lambda u: optaxclip.unitwise_norm(u, axis_name=P("d", "t"))
    w = updates(0)["w"]
    got = jax.jit(mapped(told, (SPECS["w"],), SPECS["w"]))(w)
    want = np.linalg.norm(w.astype(np.float64), axis=0)
    np.testing.assert_allclose(got, np.broadcast_to(want, w.shape), 1e-6)


@pytest.mark.parametrize("tx", [GLOBAL(1.0), optaxclip.skip_steps(optax.sgd(0.1))])
def test_a_norm_that_is_not_that_of_all_devices_is_refused(tx):
    def f(u):
        own = norms.tree_norm(u, axis_name=())
        return tx.update(u, tx.init(u), norm=own)[0]

    refused(
        f, "norm must be the same on all devices, got one that varies over 'd', 't'"
    )


@pytest.mark.parametrize("tracked", [True, False])
def test_norms_of_examples_are_refused(tracked):
    for clip in (
        optaxclip.per_example_global_norm_clip,
        optaxclip.per_example_layer_norm_clip,
    ):
        refused(
            lambda u, clip=clip: clip([u["w"]], 1.0),
            "grads must be whole, got one device's part of them. Call it under jit",
            tracked=tracked,
        )


def test_what_is_not_summed_yet_is_refused():
    match = "updates must be reduced, got partial sums over 'd' at w. Reduce them"
    clips = [GLOBAL(1.0), optaxclip.clippy(0.1), optaxclip.clip(1.0), UNIT(1.0)]

    # Before JAX 0.8 there are no types of partial sums inside shard_map.
    for tx in clips if hasattr(lax, "pcast") else ():

        def f(u, tx=tx):
            w = lax.pcast(u["w"], ("d",), to="unreduced")
            return tx.update({"w": w}, None, {"w": u["w"]})[0]

        refused(f, match)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        a = jax.device_put(np.ones((8, 4), np.float32), P(None, "d"))
        b = jax.device_put(np.ones((4, 6), np.float32), P("d"))
        for tx in clips:

            @jax.jit
            def g(a, b, tx=tx):
                w = jnp.dot(a, b, out_sharding=P(unreduced={"d"}))
                return tx.update({"w": w}, None, {"w": jnp.ones(w.shape)})[0]

            with pytest.raises(ValueError, match=match):
                g(a, b)


NOT_AVERAGED = [
    GLOBAL(1.0),
    optaxclip.adaptive_grad_clip(0.1),
    optaxclip.clippy(0.1),
    optaxclip.scale_by_stable_adam(),
    optaxclip.adaclip(),
    optaxclip.skip_steps(optax.sgd(0.1)),
]


def data_parallel_step(tx, average):
    """One update from gradients that every device takes of its own batch."""

    def step(params, x):
        own = jax.tree.map(lambda p: vary(p, ("d",)), params)
        grads = jax.grad(lambda p: jnp.sum((x @ p["w"]) ** 2))(own)
        return average(one_step(tx, average(grads), params)[0])

    return mapped(step, ({"w": P()}, P("d")), {"w": P()})


@pytest.mark.parametrize("tx", NOT_AVERAGED)
def test_gradients_that_are_not_averaged_are_refused(tx):
    params, x = {"w": np.ones(3, np.float32)}, np.ones((8, 3), np.float32)
    match = r"averaged .* varies over 'd' at w, .* first: lax.pmean\(grads, 'd'\)"
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(data_parallel_step(tx, lambda u: u), params, x)


def test_elements_are_clipped_whatever_is_known():
    params, x = {"w": np.ones(3, np.float32)}, np.ones((8, 3), np.float32)
    mean = lambda u: jax.tree.map(lambda g: lax.pmean(g, "d"), u)
    tx = optaxclip.clip(0.25)
    # Before they are averaged too.
    before = optax.chain(tx, optax.stateless(lambda u, _: mean(u)))
    own = lambda p: vary(p, ("d",))

    def step(params, x):
        varied = jax.tree.map(own, params)
        grads = jax.grad(lambda p: jnp.sum((x @ p["w"]) ** 2))(varied)
        return before.update(grads, before.init(params), params)[0]

    got = jax.jit(mapped(step, ({"w": P()}, P("d")), {"w": P()}))(params, x)
    np.testing.assert_array_equal(got["w"], np.full(3, 0.25))
    f = mapped(lambda u: one_step(tx, u, u)[0], (SPECS,), SPECS, tracked=False)
    want = jax.tree.map(lambda u: u.clip(-0.25, 0.25), updates(0))
    check_equal(jax.jit(f)(updates(0)), want, maxulp=0)


# Training -----------------------------------------------------------------------------


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"] + params["b"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


def training(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"in": draw(4, 8), "b": draw(8), "out": draw(8, 4)}
    return params, {"x": draw(6, 16, 4), "y": 5 * draw(6, 16, 4)}


def trained(loss):
    clip = optaxclip.recorded(optaxclip.clip_by_global_norm(0.5))
    tx = optax.chain(clip, optax.sgd(0.3, momentum=0.9))

    def run(params, batches):
        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss)(params, batch)
            found, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, found), state), state[0].norm

        (params, _), seen = lax.scan(step, (params, tx.init(params)), batches)
        return params, seen

    return run


def fully_sharded(params, batch):
    whole = jax.tree.map(lambda p: lax.all_gather(p, "d", tiled=True), params)
    return loss(whole, batch)


@pytest.mark.parametrize("split", [False, True], ids=["data parallel", "fully sharded"])
def test_training_on_many_devices_is_that_on_one(split):
    params, batches = training()
    want, norms_of_one = jax.jit(trained(loss))(params, batches)
    own = fully_sharded if split else loss
    spec = dict.fromkeys(params, P("d") if split else P())
    f = trained(lambda p, batch: lax.pmean(own(p, batch), "d"))
    f = mapped(f, (spec, P(None, "d")), (spec, P()))
    got, norms_of_many = jax.jit(f)(params, batches)
    assert (np.asarray(norms_of_one) > 0.5).all()
    np.testing.assert_allclose(norms_of_many, norms_of_one, 1e-5)
    for name in params:
        np.testing.assert_allclose(got[name], want[name], 1e-5, 1e-6)


# What optax 0.2.8 gets wrong ----------------------------------------------------------


def test_the_norm_is_that_of_all_devices():
    u = updates(0)["w"]
    local = [norm([part]) for rows in np.split(u, 4) for part in np.split(rows, 2, 1)]
    # By its own norm each part would be clipped to 1, and all of them to sqrt(8).
    assert min(local) > 1
    tx = optaxclip.clip_by_global_norm(1.0)
    f = mapped(lambda u: tx.update(u, None)[0], (P("d", "t"),), P("d", "t"))
    np.testing.assert_allclose(norm([jax.jit(f)(u)]), 1.0, 1e-6)


@pytest.mark.parametrize("how", ["tracked", "untracked", AxisType.Explicit], ids=str)
def test_adaptive_clips_are_those_of_one_device(how):
    rng = np.random.default_rng(0)
    u, params = (rng.normal(size=(64, 32)).astype(np.float32) for _ in range(2))
    size = lambda x: np.linalg.norm(x.astype(np.float64), axis=0)
    want = u * np.minimum(1, 0.01 * size(params) / size(u))
    spec = P("d", "t")
    tx = optaxclip.adaptive_grad_clip(0.01)
    step = lambda tx: lambda u, p: tx.update(u, tx.init(p), p)[0]
    if how == AxisType.Explicit:
        sharding = NamedSharding(mesh(how), spec)
        with jax.set_mesh(mesh(how)):
            got = jax.jit(step(tx))(*(jax.device_put(x, sharding) for x in (u, params)))
        assert got.sharding.is_equivalent_to(sharding, 2)
    else:
        told = optaxclip.sharded(tx, spec)
        f = mapped(step(told), (spec, spec), spec, how == "tracked")
        got = jax.jit(f)(u, params)
    np.testing.assert_allclose(got, want, 1e-6)
