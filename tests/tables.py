"""The public factories and the trees they are tried on. A new factory is a new row."""

import functools
import inspect
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

# To compile sooner, where bits do not matter: XLA does all it does, LLVM does less.
FAST = {"xla_backend_optimization_level": 0}


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


def _trust(updates, params):
    return [
        0.0 if not u.size else norm([u]) / norm([p])
        for u, p in zip(updates.values(), params.values(), strict=True)
    ]


def _row(name, make, cells, **kwargs):
    function = name.split(":")[0]
    return Case(name, _once(make), cells, **{"function": function, **kwargs})


def _once(make):
    """Makes one transformation for each float, so that jit compiles it only once."""
    return lambda c: _made(make, c) if type(c) is float else make(c)


@functools.lru_cache(maxsize=8)  # more than the laws use again of one row
def _made(make, c):
    return make(c)


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
        "clip_by_trust_ratio",
        optaxclip.clip_by_trust_ratio,
        _trust,
        argument="ratio",
    ),
    _row(
        "normalize_by_trust_ratio",
        optaxclip.normalize_by_trust_ratio,
        _trust,
        shape="normalize",
        argument="ratio",
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
    *[
        _row(
            f"clip_by:peak {'rescale' if rescale else 'clamp'}",
            lambda c, rescale=rescale: clip_by(scopes.peak(rescale), c),
            functools.partial(_leaves, ord=math.inf),
            argument="bound",
            function="clip_by",
        )
        for rescale in (False, True)
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


class Learned(NamedTuple):
    """A factory of what learns, called for so short a memory that it soon binds.

    factory, kwargs: the call. tuned, values: the number that its user tunes, and two
    values of it. cells: what is one cell, which says what one damaged leaf may touch.
    static: the arguments that are no numbers. free: the number that means no limit.
    like: the row that has the same rule; what is slow is tried on that row only.
    exempt: the laws that do not hold, and why. Laws that may be named:

    poison: an update that is not finite leaves no trace.
    early: nor does it in the warm-up.
    zeros: nor does one of zeros.
    alone: nor, in one leaf, does either touch another leaf.
    rise: after a thousandfold rise of scale it lets updates through again.
    range: magnitudes from 1e-30 to 1e30 in float32.
    narrow: leaves narrower than float32.
    strict: it promotes neither ranks nor dtypes.
    derivative: it is finite, at 0 too.
    others: leaves that are no arrays of floating point pass through.
    leaves: its state has those of the updates.
    state: it needs one.
    trees: it takes trees of other leaves.
    """

    name: str
    factory: Callable
    kwargs: dict[str, Any]
    tuned: str
    values: tuple[float, float]
    cells: str
    static: tuple[str, ...] = ()
    free: float | None = None
    exempt: dict[str, str] | None = None
    like: str | None = None

    def make(self, **changes):
        return self.factory(**{self.tuned: self.values[0], **self.kwargs, **changes})


def _method(factory, cells, values, variant="", **kwargs):
    """A row of a named method, the first argument of which is tuned."""
    options = {name: kwargs.pop(name, None) for name in ("free", "exempt", "like")}
    return Learned(
        f"{factory.__name__}{':' if variant else ''}{variant}",
        factory,
        kwargs,
        next(iter(inspect.signature(factory).parameters)),
        values,
        cells,
        tuple(k for k in kwargs if k in ("window", "step", "beyond", "rescale")),
        **options,
    )


def _bound(name, cells, values, make, shape=shapes.hard, scope=None, **options):
    """A row of a bound in a scope, which is called as its cells unless it is given."""
    scope = (
        {
            "tree": scopes.tree,
            "group": lambda: scopes.group(labels),
            "leaf": scopes.leaf,
            "unit": scopes.unit,
            "element": scopes.element,
        }[cells]()
        if scope is None
        else scope
    )

    def factory(number):
        return clip_by(scope, make(number), shape)

    name = f"clip_by:{name} {cells}"
    return Learned(name, factory, {}, "number", values, cells, **options)


_NO_SCALE = {"rise": "what comes out does not depend on the scale of what goes in"}
_NEVER_RISES = {"rise": "published: a spike counts as the mean"}

LEARNED = [
    _method(optaxclip.autoclip, "tree", (20.0, 90.0), window=8),
    _method(optaxclip.percentile_clip, "tree", (60.0, 10.0), window=8, like="autoclip"),
    _method(optaxclip.quantile_clip, "tree", (0.5, 0.9), "geometric", initial=1.0),
    _method(
        optaxclip.quantile_clip,
        "tree",
        (0.5, 0.9),
        "arithmetic",
        rate=30.0,
        initial=1.0,
        step="arithmetic",
    ),
    *[
        _method(
            optaxclip.zclip,
            "tree",
            (2.0, 1.5),
            beyond,
            decay=0.9,
            warmup=4,
            max_norm=math.inf,
            beyond=beyond,
            free=math.inf,
            exempt={} if beyond == "limit" else _NEVER_RISES,
        )
        for beyond in ("reciprocal", "limit", "mean")
    ],
    _method(optaxclip.mean_clip, "tree", (1.0, 0.5), warmup=3, free=math.inf),
    _method(optaxclip.median_clip, "tree", (0.5, 0.0), warmup=4, free=math.inf),
    _method(optaxclip.ema_clip, "leaf", (1.5, 1.1), decay=0.8, free=math.inf),
    _method(optaxclip.adagc, "leaf", (1.5, 1.1), decay=0.8, warmup=4, max_norm=4.0),
    _method(optaxclip.norm_growth_clip, "leaf", (1.1, 1.05), free=math.inf),
    _method(optaxclip.adagn, "leaf", (0.7, 0.5), rms_decay=0.9, exempt=_NO_SCALE),
    _method(optaxclip.adaclip, "leaf", (0.9, 0.5), "rescale"),
    _method(optaxclip.adaclip, "leaf", (0.9, 0.5), "clamp", rescale=False),
    _method(
        optaxclip.spam_clip,
        "element",
        (4.0, 2.0),
        decay=0.9,
        warmup=3,
        free=math.inf,
        exempt={"early": "its warm-up counts updates, whatever they are"},
    ),
    _method(optaxclip.adanorm, "leaf", (0.9, 0.5)),
    _method(
        optaxclip.adopt_clip,
        "element",
        (0.25, 0.1),
        exempt={
            "poison": "it counts updates, whatever they are",
            "zeros": "it counts updates, whatever they are",
            "rise": "its limit is a schedule",
            "leaves": "its state is a count",
        },
    ),
    _method(
        optaxclip.acclip,
        "element",
        (1.0, 2.0),
        decay=0.9,
        exempt={"zeros": "a zero enters the momentum"},
    ),
    _method(
        optaxclip.clippy,
        "leaf",
        (0.5, 0.1),
        free=math.inf,
        exempt={"rise": "its limit is of the params", "state": "it has none"},
    ),
    _method(
        optaxclip.scale_by_stable_adam,
        "element",
        (0.9, 0.5),
        exempt={
            **_NO_SCALE,
            "poison": "it is Adam, whose moments keep a NaN",
            "zeros": "it is Adam, whose moments decay",
            "range": "it is Adam, which squares",
            "strict": "it is Adam of optax, which promotes",
            "derivative": "it is Adam, whose root has none at 0",
            "others": "it is Adam of optax, which takes arrays",
            "narrow": "it is Adam, whose moments are as narrow as the params",
            "state": "it is that of Adam, as is what is said about it",
        },
    ),
    _bound(
        "percentile",
        "unit",
        (20.0, 90.0),
        lambda n: bounds.percentile(n, window=8, warmup=3),
    ),
    _bound(
        "at_least",
        "leaf",
        (50.0, 20.0),
        lambda n: bounds.at_least(
            bounds.percentile(n, window=8, observe="raw"),
            bounds.ema(1.5, decay=0.8),
        ),
        like="clip_by:percentile unit",
    ),
    _bound(
        "median_mad",
        "group",
        (1.0, 0.5),
        lambda n: bounds.median_mad(n, window=8, warmup=4),
        free=math.inf,
    ),
    _bound(
        "median_mad current",
        "leaf",
        (1.0, 0.5),
        lambda n: bounds.median_mad(n, window=8, warmup=4, observe="current"),
        shapes.rational,
        free=math.inf,
        like="clip_by:median_mad group",
    ),
    _bound(
        "streaming_quantile raw",
        "unit",
        (0.5, 0.25),
        lambda n: bounds.streaming_quantile(n, warmup=3, observe="raw"),
        like="median_clip",
    ),
    _bound(
        "tracked_quantile",
        "element",
        (0.5, 0.8),
        lambda n: bounds.tracked_quantile(n, initial=0.5),
        like="quantile_clip:geometric",
    ),
    _bound(
        "tracked_quantile",
        "leaf",
        (0.5, 0.8),
        lambda n: bounds.tracked_quantile(n, initial=0.5),
        scope=scopes.peak(),
        like="quantile_clip:geometric",
    ),
    _bound(
        "mean",
        "leaf",
        (1.5, 1.0),
        lambda n: bounds.mean(n, warmup=2),
        free=math.inf,
        like="mean_clip",
    ),
    _bound(
        "mean current",
        "unit",
        (1.0, 0.5),
        lambda n: bounds.mean(n, warmup=3, observe="current"),
        shapes.sqrt,
        free=math.inf,
        like="mean_clip",
    ),
    _bound(
        "mean_std",
        "unit",
        (1.0, 0.5),
        lambda n: bounds.mean_std(n, warmup=4),
        free=math.inf,
        like="clip_by:mean_std current tree",
    ),
    _bound(
        "mean_std current",
        "tree",
        (0.5, 0.2),
        lambda n: bounds.mean_std(n, warmup=4, observe="current"),
        shapes.reciprocal,
        free=math.inf,
    ),
    _bound(
        "zscore",
        "element",
        (2.0, 1.5),
        lambda n: bounds.zscore(n, decay=0.9, warmup=4, beyond="limit"),
        free=math.inf,
        like="zclip:limit",
    ),
    _bound(
        "zscore drop",
        "leaf",
        (2.0, 1.0),
        lambda n: bounds.zscore(n, decay=0.9, warmup=4, beyond="limit"),
        shapes.drop,
        free=math.inf,
        like="zclip:limit",
    ),
    _bound(
        "zscore reciprocal",
        "unit",
        (1.0, 0.5),
        lambda n: bounds.zscore(n, decay=0.9, warmup=4),
        free=math.inf,
        exempt=_NEVER_RISES,
        like="zclip:reciprocal",
    ),
    _bound(
        "zscore mean",
        "group",
        (1.0, 0.5),
        lambda n: bounds.zscore(n, decay=0.9, warmup=4, beyond="mean"),
        free=math.inf,
        exempt=_NEVER_RISES,
        like="zclip:mean",
    ),
    _bound(
        "ema min raw",
        "tree",
        (1.0, 0.5),
        lambda n: bounds.ema(n, decay=0.8, warmup=3, start="min", observe="raw"),
        shapes.tanh,
        free=math.inf,
        like="ema_clip",
    ),
    _bound(
        "ema debiased",
        "unit",
        (1.5, 1.2),
        lambda n: bounds.ema(n, decay=0.8, start="debiased"),
        free=math.inf,
        like="adaclip:clamp",
    ),
    _bound(
        "ema by side",
        "element",
        (1.5, 1.2),
        lambda n: bounds.ema(n, decay=0.8, warmup=2),
        scope=scopes.side(),
        free=math.inf,
        like="ema_clip",
    ),
    _bound(
        "growth",
        "element",
        (1.1, 1.05),
        lambda n: bounds.growth(n),
        free=math.inf,
        like="norm_growth_clip",
    ),
    _bound(
        "mean_over_rms",
        "tree",
        (0.7, 0.5),
        lambda n: bounds.mean_over_rms(n),
        shapes.normalize,
        exempt=_NO_SCALE,
        like="adagn",
    ),
    _bound(
        "second_moment",
        "group",
        (2.0, 1.5),
        lambda n: bounds.second_moment(n, decay=0.8),
        free=math.inf,
        like="spam_clip",
    ),
    _bound(
        "relative percentile",
        "unit",
        (50.0, 20.0),
        lambda n: bounds.relative(bounds.percentile(n, window=8)),
        like="clip_by:percentile unit",
    ),
    _bound(
        "relative ema",
        "leaf",
        (1.5, 1.1),
        lambda n: bounds.relative(bounds.ema(n, decay=0.8), None),
        free=math.inf,
    ),
    _bound(
        "at_most",
        "leaf",
        (1.5, 1.1),
        lambda n: bounds.at_most(bounds.ema(n, decay=0.8), lambda step: 1e5),
        like="ema_clip",
    ),
    _bound(
        "plus",
        "unit",
        (1.0, 0.5),
        lambda n: bounds.plus(
            bounds.streaming_quantile(), bounds.deviation(n, warmup=4)
        ),
        free=math.inf,
        like="median_clip",
    ),
    _bound(
        "phases of jointly",
        "unit",
        (1.5, 1.1),
        lambda n: bounds.phases(
            bounds.jointly(bounds.percentile(50.0, window=8)),
            bounds.ema(n, decay=0.8, warmup=4),
        ),
        exempt={"alone": "the warm-up is of the common norm"},
        like="adagc",
    ),
    _bound(
        "jointly",
        "leaf",
        (2.0, 1.5),
        lambda n: bounds.jointly(bounds.zscore(n, decay=0.9, warmup=4, beyond="limit")),
        free=math.inf,
        exempt={
            "alone": "its limit is of the common norm",
            "leaves": "so is its state",
        },
        like="adagc",
    ),
    _bound(
        "parts",
        "leaf",
        (1.5, 1.1),
        lambda n: {
            "bb": bounds.ema(n, decay=0.8),
            "cc": bounds.percentile(50.0, window=8),
            "w": bounds.recorded(bounds.growth(1.1)),
        },
        exempt={"trees": "its parts are those of one tree"},
        like="ema_clip",
    ),
]


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


def as_tree(cells):
    """Cells in the tree of their places, or by label; None where none is measured."""
    places = cells.places
    if places.form == "one":
        return cells.arrays[0]
    measured = places.measured
    arrays = cells.arrays
    if places.form == "vector":
        (vector,) = arrays
        assert vector.shape == (len(measured),)
        arrays = [vector[i] for i in range(len(measured))]
    pairs = zip(arrays, measured, strict=True)
    found = iter([array if yes else None for array, yes in pairs])
    leaves = [optax.MaskedNode() if c is None else next(found) for c in places.counts]
    return places.treedef.unflatten(leaves)


def eps(dtype):
    return float(jnp.finfo(dtype).eps)
