"""Trees split over a mesh, and rows of all factories, for the laws about sharding."""

import functools
import math
import re

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import GetAttrKey, SequenceKey
from tables import CASES, LEARNED

import optaxclip

# Along d and t some leaves are split over both axes, some over one, some over none.
SPECS = {
    "w": P("d", "t"),
    "bb": P("t"),
    "cc": {"conv": P(None, None, "d", None), "scale": P()},
}
SHAPES = {
    "w": (16, 10),
    "bb": (6,),
    "cc": {"conv": (3, 3, 4, 6), "scale": (5,)},
}
UNITS = {  # the axes that a unit of each leaf spans
    "w": (0,),
    "bb": (0,),
    "cc": {"conv": (0, 1, 2), "scale": (0,)},
}
ORDS = (None, 1, math.inf, 3, "rms")


def is_shape(node):
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


def updates(seed, *leading):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=(*leading, *shape)).astype(np.float32)
    return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


@functools.cache
def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("d", "t"), axis_types=(kind, kind))


def mapped(f, in_specs, out_specs, tracked=True, **kwargs):
    """`shard_map` over the mesh, for arguments and results of these specs."""
    kwargs = {"mesh": mesh(), "check_vma": tracked, **kwargs}
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, **kwargs)


def placed(tree, kind=AxisType.Auto, specs=SPECS):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh(kind), spec))
    return jax.tree.map(put, tree, specs)


def leading(specs):
    return jax.tree.map(lambda spec: P(None, *spec), specs)


def check_equal(got, want, maxulp=8):
    """Every leaf the same to a few ulp, and the same on all devices that have it."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    flat = jax.tree_util.tree_leaves_with_path(got)
    worst = {}
    for (path, g), w in zip(flat, jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype), path
        for other in g.addressable_shards:
            (first, *_) = [s for s in g.addressable_shards if s.index == other.index]
            np.testing.assert_array_equal(other.data, first.data, str(path))
        g, w = np.asarray(g), np.asarray(w)
        if not np.issubdtype(g.dtype, np.floating):
            np.testing.assert_array_equal(g, w, str(path))
            continue
        np.testing.assert_array_equal(np.isfinite(g), np.isfinite(w), str(path))
        same = (g == w) | (np.isnan(g) & np.isnan(w))
        g, w = np.where(same, 1, g), np.where(same, 1, w)
        far = np.abs(g - w) / np.spacing(np.abs(w))
        worst[jax.tree_util.keystr(path)] = np.max(far, initial=0)
    assert {name: ulp for name, ulp in worst.items() if not ulp <= maxulp} == {}


def all_reduced(text):
    """For every all-reduce of a compiled program, the sizes of what is reduced."""
    found = []
    for line in text.splitlines():
        if re.search(r" all-reduce(-start)?\(", line):
            result = line.split(" = ")[1].split(" all-reduce")[0]
            shapes = re.findall(r"\w+\[([\d,]*)\]", result)
            found.append([math.prod(map(int, re.findall(r"\d+", s))) for s in shapes])
    return found


def one_step(tx, updates, params):
    return tx.update(updates, tx.init(params), params)


def is_unitwise(name):
    return name == "adaptive_grad_clip" or "unit" in name


def is_elementwise(tx):
    return isinstance(tx, optaxclip.Clip) and tx.scope.elementwise


def told(name, tx, tracked):
    """The same clip, which is told what its leaves' types do not tell."""
    if not isinstance(tx, optaxclip.Clip):
        return tx
    needed = is_unitwise(name) if tracked else not is_elementwise(tx)
    return optaxclip.sharded(tx, SPECS) if needed else tx


def stateless(tracked=None):
    """All rows that learn nothing; to be run inside shard_map if tracked is a bool."""
    rows = {c.name: c.make(0.5) for c in CASES if ":shape" not in c.name}
    if tracked is not None:
        rows = {name: told(name, tx, tracked) for name, tx in rows.items()}
    axis_name = None if tracked in (None, True) else SPECS
    rows["zero_nonfinite"] = optaxclip.zero_nonfinite(axis_name=axis_name)
    return rows


# Of the rows of one rule those whose cells or limits are put together otherwise.
OTHERWISE = (
    "percentile_clip",
    "clip_by:ema by side element",
    "clip_by:phases of jointly unit",
    "clip_by:parts leaf",
)
# One of each kind of state.
KINDS = (
    "autoclip",
    "zclip:reciprocal",
    "adagc",
    "adaclip:rescale",
    "spam_clip",
    "acclip",
    "clippy",
    "scale_by_stable_adam",
    "clip_by:percentile unit",
    "clip_by:median_mad group",
)


def learning(tracked=None, names=None):
    """The same for what learns."""
    rows = {}
    for row in LEARNED:
        known = not row.like or row.name in OTHERWISE
        if row.name not in names if names else not known:
            continue
        special = row.factory in (optaxclip.clippy, optaxclip.scale_by_stable_adam)
        tx = row.make(axis_name=SPECS) if special and tracked is False else row.make()
        rows[row.name] = tx if tracked is None else told(row.name, tx, tracked)
    return rows


def state_specs(tx):
    """How a state is split: as its leaf, along the dimensions that it has in common.

    States of elements have the paths of the params, those of units the number of the
    leaf; those of whole leaves are vectors or scalars, which every device has.
    """
    params = jax.tree_util.tree_leaves_with_path(updates(0))
    split = dict(jax.tree_util.tree_leaves_with_path(SPECS))

    def of_leaf(x, param, spec):
        extra = x.ndim - param.ndim
        pairs = zip(spec, x.shape[extra:], param.shape)
        own = [name if n == whole else None for name, n, whole in pairs]
        return P(*[None] * extra, *own)

    def spec(path, x):
        field, last = path[-2:] if len(path) > 1 else (None, None)
        if isinstance(field, GetAttrKey) and isinstance(last, SequenceKey):
            p, param = params[last.idx]
            return of_leaf(x, param, split[p])
        for p, param in params:
            if path[len(path) - len(p) :] == p and x.ndim >= param.ndim:
                return of_leaf(x, param, split[p])
        return P()

    return jax.tree_util.tree_map_with_path(spec, jax.eval_shape(tx.init, updates(0)))


def steps_of(rows):
    return lambda u, p: {name: one_step(tx, u, p) for name, tx in rows.items()}


@functools.cache
def stateless_on_one_device():
    return jax.jit(steps_of(stateless()))(updates(0), updates(1))


def sequence():
    """Updates of changing size, one of them damaged on one device."""
    sizes = np.float32([1, 2, 0.5, 1, 8, 1.5, 0.7])
    grow = lambda x: x * sizes.reshape(-1, *[1] * (x.ndim - 1))
    steps = jax.tree.map(grow, updates(2, len(sizes)))
    steps["w"][4, -1, 0] = np.nan
    return steps


def scans_of(rows):
    """Scans each over the updates, from its own init or from a state that is given."""

    def run(sequence, params, states=None):
        def step(states, u):
            new = {n: tx.update(u, states[n], params) for n, tx in rows.items()}
            return {n: new[n][1] for n in rows}, {n: new[n][0] for n in rows}

        if states is None:
            states = {name: tx.init(params) for name, tx in rows.items()}
        return lax.scan(step, states, sequence)

    return run


@functools.cache
def learned_on_one_device():
    return jax.jit(scans_of(learning()))(sequence(), updates(1))
