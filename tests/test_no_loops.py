"""What norms without a loop can do: no `while`, and all that a `while` forbade."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import all_reduced, mapped, mesh
from tables import CASES, FAST, tree

import optaxclip
from optaxclip import _compat, _sums, bounds, norms

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ORDS = (None, 1, 3, math.inf, "rms")
UPDATES = tree(jnp.float32)
LARGE = {"w": jnp.ones(_sums.SMALL_ON_CPU + 1), "b": jnp.ones(3)}
GRID = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def step(tx):
    return lambda u: tx.update(u, tx.init(u), u)[0]


def exported(f, *shapes, platforms):
    platforms = {"platforms": list(platforms)}
    return export.export(jax.jit(f), **platforms)(*shapes).mlir_module()


def compiled(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().as_text()


def placed(x, *spec):
    return jax.device_put(x, NamedSharding(GRID, P(*spec)))


def count_of(name, text):
    return len(re.findall(rf" {name}(?:-start)?\(", text))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_no_platform_gets_a_loop_and_a_tpu_no_float64(case):
    f = step(case.make(0.5))
    assert "while" not in exported(f, UPDATES, platforms=PLATFORMS)
    text = exported(f, UPDATES, platforms=["tpu"])
    assert "while" not in text
    assert "f64" not in text


@pytest.mark.parametrize("platform", PLATFORMS)
def test_large_leaves_get_no_loop_either(platform):
    shapes = {"w": jax.ShapeDtypeStruct((2**17,), jnp.float32), "b": UPDATES["vector"]}
    clips = (optaxclip.clip_by_global_norm(1.0), optaxclip.clip_by_unit_norm(1.0))
    f = lambda u: [step(tx)(u) for tx in clips]
    text = exported(f, shapes, platforms=[platform])
    assert "while" not in text
    assert ("f64" in text) == (platform != "tpu")


def test_checkify_finds_what_is_not_finite_through_vmap_of_a_clip():
    clip = jax.vmap(step(optaxclip.clip_by_global_norm(1.0)))
    run = jax.jit(checkify.checkify(clip, errors=checkify.float_checks))
    updates = {"a": jnp.ones((3, 4)), "b": jnp.zeros((3,))}
    for large in (updates, {**updates, "c": jnp.ones((3, _sums.SMALL_ON_CPU + 1))}):
        error, out = run(large)
        assert error.get() is None
        jax.tree.map(np.testing.assert_array_equal, out, clip(large))
        error, _ = run({**large, "b": jnp.array([0, jnp.nan, 0])})
        assert "nan generated" in error.get()


def test_shard_map_of_a_clip_can_be_mapped():
    specs = {"a": P("d"), "b": P()}
    clip = step(optaxclip.clip_by_global_norm(1.0))
    run = mapped(clip, (specs,), specs)
    updates = {"a": jnp.arange(24.0).reshape(3, 8), "b": jnp.ones((3, 2))}
    want = jax.vmap(clip)(updates)
    for f in (jax.vmap(run), jax.jit(jax.vmap(run))):
        got = f(updates)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 1e-6), got, want)


def rows_that_differentiate():
    rows = {f"global {o}": optaxclip.clip_by_global_norm(1e9, ord=o) for o in ORDS}
    rows["leaf"] = optaxclip.clip_by_leaf_norm(1e9)
    rows["group"] = optaxclip.clip_by_group_norm(
        {"even": 1e9, "odd": 1e9},
        lambda u: [["even", "odd"][i % 2] for i in range(len(u))],
    )
    rows["jointly"] = optaxclip.clip_by_leaf_norm(bounds.jointly(1e9))
    return rows


MANY = [(name, count) for name in rows_that_differentiate() for count in (3, 129)]


@pytest.mark.parametrize("name, count", [*MANY, ("global None", 400)])
def test_reverse_mode_through_many_arrays_of_an_idle_clip(name, count):
    tx = rows_that_differentiate()[name]

    def total(x, y):
        return sum(step(tx)([x * y] * count))

    f = jax.jit(jax.value_and_grad(total), compiler_options=FAST)
    value, slope = f(3.0, 2.0)
    np.testing.assert_allclose([value, slope], [6 * count, 2 * count], rtol=1e-6)


@pytest.mark.parametrize(
    "count, ords", [(3, ORDS), (129, ORDS), (400, [None])], ids=[3, 129, 400]
)
def test_reverse_mode_through_many_arrays_of_a_norm(count, ords):
    def every(x, y):
        return jnp.stack([norms.tree_norm([x * y] * count, o) for o in ords])

    roots = [1.0 if o in ("rms", math.inf) else count ** (1 / (o or 2)) for o in ords]
    f = jax.jit(jax.jacrev(every), compiler_options=FAST)
    np.testing.assert_allclose(f(3.0, 2.0), 2 * np.array(roots), rtol=1e-5)


@pytest.mark.parametrize("n", [3, 129])
def test_reverse_mode_of_a_clip_that_binds_is_that_of_the_direction(n):
    clip = step(optaxclip.clip_by_global_norm(1.0))
    f = jax.grad(lambda xs: clip(xs)[0])
    x = np.arange(1.0, n + 1)
    r = np.sqrt(np.sum(x * x))
    want = np.eye(n)[0] / r - x[0] * x / r**3
    got = jax.jit(f, compiler_options=FAST)(list(map(jnp.float32, x)))
    np.testing.assert_allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("make", ["clip_by_block_rms", "clip_by_global_norm"])
def test_a_shape_that_no_memory_holds_is_evaluated(make):
    shape = jax.ShapeDtypeStruct((65536, 32768), jnp.float32)
    found = jax.eval_shape(step(getattr(optaxclip, make)(1.0)), {"w": shape})
    assert (found["w"].shape, found["w"].dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize(
    "make",
    [
        optaxclip.clip_by_global_norm,
        optaxclip.clip_by_block_rms,
        optaxclip.clip_by_leaf_norm,
        optaxclip.clip_by_unit_norm,
        optaxclip.clip,
    ],
)
def test_a_leading_dimension_may_be_symbolic(make):
    (b,) = export.symbolic_shape("b")
    f = jax.jit(step(make(0.5)))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    for platforms in (["cpu"], PLATFORMS):
        symbolic = export.export(f, platforms=list(platforms))(
            {"w": shape(b, 3), "b": shape(b), "c": shape(4)}
        )
        assert "while" not in symbolic.mlir_module()
        for n in (2, 5, 6000):  # 1 row is a vector to units, which b rows are not
            rng = np.random.default_rng(n)
            updates = {"w": rng.normal(size=(n, 3)), "b": rng.normal(size=n)}
            updates = {**updates, "c": rng.normal(size=4)}
            updates = jax.tree.map(jnp.float32, updates)
            got, want = symbolic.call(updates), f(updates)
            jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 1e-6), got, want)


def test_a_grid_of_runs_that_is_split_over_devices_needs_no_collective():
    runs = {"w": jnp.ones((8, 5, 4)), "v": jnp.ones((8, _sums.SMALL_ON_CPU + 1))}
    runs = {**runs, "b": jnp.ones(8)}
    clip = step(optaxclip.clip_by_global_norm(1.0))
    f = lambda u: (jax.vmap(norms.tree_norm)(u), jax.vmap(clip)(u))
    text = compiled(f, {name: placed(x, "d") for name, x in runs.items()})
    assert "num_partitions=8" in text
    words = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    assert not re.findall(rf"\b(?:{words})\b", text)


def test_a_tree_that_is_split_over_devices_needs_one_all_reduce():
    updates = {"w": jnp.ones((_sums.SMALL_ON_CPU // 8, 8)), "v": jnp.ones(64)}
    split = {name: placed(x, "d") for name, x in updates.items()}
    split["b"] = placed(jnp.ones(3))
    text = compiled(step(optaxclip.clip_by_global_norm(1.0)), split)
    assert len(all_reduced(text)) == 1
    assert count_of("all-gather", text) == 0


@pytest.mark.parametrize("name", ["global", "leaf", "unit"])
def test_small_trees_have_no_conditional_and_large_ones_one(name):
    tx = getattr(optaxclip, f"clip_by_{name}_norm")(1.0)
    assert count_of("conditional", compiled(step(tx), UPDATES)) == 0
    assert count_of("conditional", compiled(step(tx), LARGE)) == 1


def test_a_program_is_partitioned_if_it_has_several_devices():
    ask = lambda x: jnp.where(_compat.may_be_partitioned(), x, -x)
    one, split = jnp.ones(8), placed(jnp.ones(8), "d")
    constant = lambda x: re.findall(
        r"dense<(true|false)>", jax.jit(ask).lower(x).as_text()
    )
    assert (constant(one), constant(split)) == (["false"], ["true"])
    f = jax.jit(ask)
    assert (f(one)[0], f(split)[0], f(placed(jnp.ones(8)))[0]) == (-1, 1, 1)


def test_in_shard_map_it_is_partitioned_if_an_axis_is_not_manual():
    ask = lambda x: jnp.where(_compat.may_be_partitioned(), x, -x)
    x = jax.device_put(jnp.ones(8), NamedSharding(mesh(), P("d")))
    manual = jax.jit(mapped(ask, P("d"), P("d")))
    partly = jax.jit(mapped(ask, P("d"), P("d"), axis_names={"d"}))
    assert (manual(x)[0], partly(x)[0]) == (-1, 1)
