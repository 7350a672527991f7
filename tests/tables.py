"""The public factories and the trees they are tried on. A new factory is a new row."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from oracles import agc_ratio, norm, units

import optaxclip
from optaxclip import bounds, clip_by, scopes, shapes


class Case(NamedTuple):
    """A factory of one tunable number.

    make: the factory. cells: for updates and params (dicts of arrays), a list of the
    arrays whose magnitudes it bounds: (names of the leaves in the cell, magnitude).
    shape: name of the shape. twin: the factory of optax it replaces. argument: what
    messages call the number.
    """

    name: str
    make: Callable[[Any], optax.GradientTransformationExtraArgs]
    cells: Callable[[dict, dict], list[float]]
    shape: str = "hard"
    twin: Callable | None = None
    argument: str = "max_norm"
    function: str = ""
    elementwise: bool = False


def _elements(updates, params):
    return [abs(v) for u in updates.values() for v in np.asarray(u).ravel()]


def _leaves(updates, params, ord=2):
    return [norm([u], ord) for u in updates.values()]


def _tree(updates, params, ord=2):
    return [norm(list(updates.values()), ord)]


def _units(updates, params, ord=2):
    return [n for u in updates.values() for n in units(u, ord)]


def label(path):
    return "even" if len(path) % 2 == 0 else "odd"


def labels(updates):
    return jax.tree_util.tree_map_with_path(lambda path, _: label(path[0].key), updates)


def _groups(updates, params, ord=2):
    names = {label(name) for name in updates}
    return [
        norm([u for name, u in updates.items() if label(name) == n], ord) for n in names
    ]


def _agc(updates, params):
    return [
        ratio for name in updates for ratio in agc_ratio(updates[name], params[name])
    ]


def _row(name, make, cells, **kwargs):
    return Case(name, make, cells, **{"function": name.split(":")[0], **kwargs})


CASES = [
    _row(
        "clip",
        optaxclip.clip,
        _elements,
        twin=optax.clip,
        argument="max_delta",
        elementwise=True,
    ),
    _row(
        "clip_by_value",
        lambda c: optaxclip.clip_by_value(_negative(c), c),
        _elements,
        argument="max_value",
        elementwise=True,
    ),
    _row(
        "clip_by_block_rms",
        optaxclip.clip_by_block_rms,
        functools.partial(_leaves, ord="rms"),
        twin=optax.clip_by_block_rms,
        argument="threshold",
    ),
    _row(
        "clip_by_global_norm",
        optaxclip.clip_by_global_norm,
        _tree,
        twin=optax.clip_by_global_norm,
    ),
    _row(
        "adaptive_grad_clip",
        optaxclip.adaptive_grad_clip,
        _agc,
        twin=optax.adaptive_grad_clip,
        argument="clipping",
    ),
    _row(
        "normalize_by_global_norm",
        optaxclip.normalize_by_global_norm,
        _tree,
        shape="normalize",
        argument="scale",
    ),
    _row(
        "normalize_by_leaf_norm",
        optaxclip.normalize_by_leaf_norm,
        _leaves,
        shape="normalize",
        argument="scale",
    ),
    *[
        _row(
            f"clip_by_{scope}_norm:ord={ord}",
            functools.partial(make, ord=ord),
            functools.partial(cells, ord=2 if ord is None else ord),
            argument="max_norms" if scope == "group" else "max_norm",
        )
        for scope, make, cells in [
            ("leaf", optaxclip.clip_by_leaf_norm, _leaves),
            ("unit", optaxclip.clip_by_unit_norm, _units),
            (
                "group",
                functools.partial(optaxclip.clip_by_group_norm, labels=labels),
                _groups,
            ),
            ("global", optaxclip.clip_by_global_norm, _tree),
        ]
        for ord in {
            "leaf": (None, 1, math.inf, 3, "rms"),
            "unit": (None, math.inf),
            "group": (None, "rms"),
            "global": (1, math.inf, 3, "rms"),
        }[scope]
    ],
    *[
        _row(
            f"clip_by_global_norm:shape={name}",
            functools.partial(
                optaxclip.clip_by_global_norm, shape=getattr(shapes, name)
            ),
            _tree,
            shape=name,
        )
        for name in ("rational", "sqrt", "tanh", "drop", "reciprocal")
    ],
    *[
        _row(
            f"clip_by:element {name}",
            lambda c, name=name: clip_by(scopes.element(), c, getattr(shapes, name)),
            _elements,
            shape=name,
            argument="bound",
            function="clip_by",
            elementwise=True,
        )
        for name in ("tanh", "normalize", "drop")
    ],
    _row(
        "clip_by:recorded",
        lambda c: optaxclip.clip_by_leaf_norm(bounds.recorded(c)),
        _leaves,
        argument="bound",
        function="recorded",
    ),
    _row(
        "clip_by:at_most",
        lambda c: clip_by(scopes.tree(), bounds.at_most(c, math.inf)),
        _tree,
        argument="values",
        function="bounds.at_most",
    ),
]


def _negative(c):
    if callable(c):
        return lambda step: -c(step)
    return c if isinstance(c, bool | str) or c is None else -c


BY_NAME = {case.name: case for case in CASES}
HARD = [case for case in CASES if case.shape == "hard"]
BOUNDING = [case for case in CASES if case.shape not in ("drop",)]


def tree(dtype, magnitude=1.0, seed=0):
    """A flat dict of leaves of ranks 0 to 2, one of size 0, in one dtype."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        values = rng.normal(size=shape) * magnitude
        if jnp.issubdtype(dtype, jnp.complexfloating):
            values = values + 1j * rng.normal(size=shape) * magnitude
        return jnp.asarray(values, dtype)

    return {
        "scalar": leaf(),
        "vector": leaf(7),
        "kernel": leaf(5, 4),
        "row": leaf(1, 6),
        "empty": leaf(0, 3),
    }


def applied(tx, updates, params=None, jit=True, state="init"):
    """One update of a fresh state."""
    params = updates if params is None else params
    state = tx.init(params) if state == "init" else state
    update = jax.jit(tx.update) if jit else tx.update
    out = update(updates, state, params)[0]
    # jit sorts the keys of a dict; the oracles go by the order of the updates.
    return {name: out[name] for name in updates} if isinstance(updates, dict) else out


def eps(dtype):
    return float(jnp.finfo(dtype).eps)
