"""Under jit, with any sharding: the result of one device, and no array gathered."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import CASES, LEARNED

SPECS = {
    "kernel": P("d", "t"),
    "bias": P("t"),
    "conv": P(None, None, "d", None),
    "scale": P(),
}
SHAPES = {"kernel": (16, 8), "bias": (8,), "conv": (3, 3, 4, 6), "scale": (5,)}


def updates(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}


# How a scope measures is what sharding can break; the shapes see only scalars.
MEASURED = [case for case in CASES if ":shape" not in case.name]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
def test_equal_to_one_device(case, kind):
    tx = case.make(0.5)
    check(lambda u, p: tx.update(u, tx.init(u), p)[0], kind, cells(case.name))


ROWS = [
    "autoclip",
    "adagc",
    "adaclip:rescale",
    "spam_clip",
    "acclip",
    "clip_by:percentile unit",
]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ROWS)
def test_what_learns_is_equal_to_one_device(name, kind):
    (row,) = [row for row in LEARNED if row.name == name]
    tx = row.make()

    def run(updates, params):
        def step(state, size):
            u = jax.tree.map(lambda x: x * size, updates)
            return tx.update(u, state, params)[1], None

        sizes = jnp.array([1.0, 2.0, 0.5, 1.0, 1.5, 0.8])
        state, _ = jax.lax.scan(step, tx.init(params), sizes)
        return tx.update(jax.tree.map(lambda x: 3 * x, updates), state, params)[0]

    check(run, kind, cells(name))


def cells(name):
    """The most cells that a leaf has whose elements lie on several devices."""
    return 8 if "unit" in name or name == "adaptive_grad_clip" else 1


def all_reduced(text):
    """For every all-reduce of a compiled program, the sizes of what is reduced."""
    found = []
    for line in text.splitlines():
        if re.search(r" all-reduce(-start)?\(", line):
            result = line.split(" = ")[1].split(" all-reduce")[0]
            shapes = re.findall(r"\w+\[([\d,]*)\]", result)
            found.append([math.prod(map(int, re.findall(r"\d+", s))) for s in shapes])
    return found


def check(run, kind, most):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(kind, kind))
    local = [jax.tree.map(jnp.asarray, updates(seed)) for seed in (0, 1)]
    want = jax.jit(run)(*local)
    with jax.set_mesh(mesh):
        placed = [
            {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in t.items()}
            for t in local
        ]
        compiled = jax.jit(run).lower(*placed).compile()
        got = compiled(*placed)
    for name in SHAPES:
        assert got[name].sharding.is_equivalent_to(
            placed[0][name].sharding, got[name].ndim
        ), name
        np.testing.assert_array_max_ulp(
            np.asarray(got[name]), np.asarray(want[name]), maxulp=8
        )
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    assert max((n for sizes in all_reduced(text) for n in sizes), default=0) <= most
