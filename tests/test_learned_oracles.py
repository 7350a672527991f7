"""Every method that learns is, step by step, the loop that its paper describes.

Three hundred updates: lognormal norms whose scale drifts, with spikes of a hundred
times, exact zeros, NaN and inf; windows and warm-ups are short, so that every phase is
reached. What is compared is what comes out.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import learned_oracles as oracle
import numpy as np
import optax
import pytest
from jax import lax
from learned_oracles import inf
from oracles import norm

import optaxclip
from optaxclip import bounds, clip_by, scopes

STEPS = 300
RTOL = {"float32": 2e-5, "float64": 1e-9}
DAMAGED = [2, 120, 121, 210]  # in every cell
ZERO = [5, 122, 250]


class Method(NamedTuple):
    """A transformation and its oracle.

    given: the name of its inputs. want: for all updates and params (dicts of arrays),
    what comes out.
    """

    given: str
    tx: optax.GradientTransformationExtraArgs
    want: Callable[[dict, dict], dict]


METHODS: dict[str, Method] = {}


# What goes in.


def stream(seed, *shape, damaged=True, late=0, turn=None):
    """All updates of one cell, of shape (STEPS, *shape).

    late: how many zeros come first. turn: the step at which the direction is reversed;
    None: it is another at every step.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(STEPS)
    sizes = rng.lognormal(0.0, 0.5, STEPS) * np.exp(3 * np.sin(t / 48 + seed))
    sizes[rng.random(STEPS) < 0.05] *= 100
    sizes[rng.random(STEPS) < 0.04] = 0
    sizes[ZERO] = 0
    sizes[:late] = 0
    directions = rng.normal(size=(STEPS, *shape)).reshape(STEPS, -1)
    if turn is not None:
        directions = np.where(t < turn, 1, -1)[:, None] * directions[:1]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    updates = directions * sizes[:, None]
    hit = (rng.random(STEPS) < 0.05) & (t >= late)
    hit[DAMAGED] = True
    where = rng.integers(updates.shape[1], size=STEPS)
    what = rng.choice([np.nan, inf, -inf], size=STEPS)
    if damaged:
        updates[t[hit], where[hit]] = what[hit]
    return updates.reshape(STEPS, *shape)


def side_by_side(*cells):
    return np.stack(cells, axis=-1)


def split(cell):
    return {"a": cell[:, :3], "b": cell[:, 3:].reshape(STEPS, 2, -1)}


INPUTS = {
    "one cell": lambda: split(stream(1, 7)),
    "pair": lambda: {"a": stream(3, 4), "late": stream(4, 2, 2, late=40)},
    "several": lambda: {"scalar": stream(2), **INPUTS["pair"]()},
    "columns": lambda: {
        "kernel": side_by_side(
            *[stream(i, 4) for i in range(5, 9)], stream(9, 4, late=40)
        )
    },
    "elements": lambda: {
        "a": side_by_side(stream(10), stream(11), stream(12, late=40)),
        "b": stream(13),
    },
    "momenta": lambda: {
        "a": side_by_side(*[stream(i, turn=60 * (i - 13)) for i in range(14, 18)])
    },
    "sound": lambda: {
        "a": stream(18, 4, damaged=False, turn=150),
        "b": stream(19, damaged=False, turn=100),
    },
}


@functools.cache
def inputs(name, dtype):
    """Updates and params of all steps, rounded to what a device is given.

    The params have zeros of their own.
    """
    updates, params = INPUTS[name](), {}
    for i, (key, u) in enumerate(updates.items()):
        some = np.random.default_rng(i).random(u.shape) > 0.05
        params[key] = stream(20 + i, *u.shape[1:], damaged=False) * some
    rounded = lambda x: x.astype(dtype).astype(np.float64)
    return jax.tree.map(rounded, updates), jax.tree.map(rounded, params)


# What comes out.


@functools.cache
def outputs(given, family, dtype):
    """For every method of a family on these inputs, compiled together once:

    its updates of all steps, and for each step whether its state stayed as it was.
    """
    txs = {
        name: method.tx
        for name, method in METHODS.items()
        if method.given == given and family_of(name) == family
    }

    def step(states, now):
        out, after = {}, {}
        for name, tx in txs.items():
            new, after[name] = tx.update(now[0], states[name], now[1])
            pairs = zip(
                jax.tree.leaves(states[name]), jax.tree.leaves(after[name]), strict=True
            )
            same = [jnp.all(a == b) for a, b in pairs] or [jnp.array(True)]
            out[name] = new, jnp.all(jnp.stack(same))
        return after, out

    # Half of the time would go to making machine code fast that runs once.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def whole(updates, params):
        first = jax.tree.map(lambda x: x[0], updates)
        states = {name: tx.init(first) for name, tx in txs.items()}
        return lax.scan(step, states, (updates, params))[1]

    with jax.enable_x64(dtype == "float64"):
        arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs(given, dtype))
        return jax.tree.map(np.asarray, whole(*arrays))


def family_of(name):
    return name.split(":")[0]


def norms_of(*cell):
    """The norms at every step of a cell, which is of several arrays."""
    return [norm([part[t] for part in cell]) for t in range(STEPS)]


def scaled(array, factors):
    """An array of all steps times the factor of every step."""
    with np.errstate(invalid="ignore"):
        return array * np.reshape(factors, [STEPS] + [1] * (array.ndim - 1))


def whole(factors):
    """The oracle of a scope that is one cell; `factors` is a function of its norms."""

    def want(updates, params):
        found = factors(norms_of(*updates.values()))
        return {name: scaled(u, found) for name, u in updates.items()}

    return want


def leaves(factors):
    """The oracle of one cell per array."""

    def want(updates, params):
        return {name: scaled(u, factors(norms_of(u))) for name, u in updates.items()}

    return want


def columns(factors):
    """The oracle of one cell per column of a kernel."""

    def want(updates, params):
        kernel = updates["kernel"]
        cells = [kernel[:, :, i] for i in range(kernel.shape[2])]
        new = [scaled(cell, factors(norms_of(cell))) for cell in cells]
        return {"kernel": side_by_side(*new)}

    return want


def arrays(rule):
    """The oracle of a rule for the elements of an array, and its params."""

    def want(updates, params):
        flat = lambda x: x.reshape(STEPS, -1)
        return {
            name: np.reshape(rule(flat(u), flat(params[name])), u.shape)
            for name, u in updates.items()
        }

    return want


def of_history(limit, observe="raw", warmup=1, shape="hard"):
    """Factors by a limit that is a function of history; `limit()` for every cell."""
    return lambda norms: oracle.factors(norms, limit(), observe, warmup, shape)


# Every learned bound, in a scope with a cell per column.


def bound(name, made, factors):
    METHODS[name] = Method("columns", clip_by(scopes.unit(), made), columns(factors))


for p, observe in ((10.0, "current"), (50.0, "raw"), (95.0, "raw")):
    bound(
        f"bounds.percentile:{p:g} {observe}",
        bounds.percentile(p, window=50, observe=observe),
        of_history(functools.partial(oracle.percentile, p, 50), observe),
    )
for observe in ("raw", "current"):
    bound(
        f"bounds.median_mad:{observe}",
        bounds.median_mad(window=50, warmup=20, observe=observe),
        of_history(lambda: oracle.median_mad(3.0, 50), observe, 20),
    )
    bound(
        f"bounds.mean:{observe}",
        bounds.mean(1.5, warmup=10, observe=observe),
        of_history(lambda: oracle.mean(1.5), observe, 10),
    )
for observe in ("current", "raw"):
    bound(
        f"bounds.streaming_quantile:{observe}",
        bounds.streaming_quantile(0.75, observe=observe),
        of_history(lambda: oracle.streaming_quantile(0.75), observe),
    )
    bound(
        f"bounds.deviation:{observe}",
        bounds.deviation(warmup=10, observe=observe),
        of_history(lambda: oracle.deviation(3.0), observe, 10),
    )
bound(
    "bounds.mean_std",
    bounds.mean_std(warmup=10),
    of_history(lambda: oracle.mean_std(3.0), "raw", 10),
)
for start in ("mean", "min", "debiased", "zero"):
    for observe in ("current", "raw", "kept")[: 2 if start == "zero" else 3]:
        bound(
            f"bounds.ema:{start} {observe}",
            bounds.ema(1.5, decay=0.9, warmup=10, start=start, observe=observe),
            of_history(functools.partial(oracle.ema, 1.5, 0.9, start, 10), observe, 10),
        )
for step, rate in (("geometric", 0.2), ("arithmetic", 0.25)):
    bound(
        f"bounds.tracked_quantile:{step}",
        bounds.tracked_quantile(0.75, rate=rate, initial=0.5, step=step),
        of_history(
            functools.partial(oracle.tracked_quantile, 0.75, rate, 0.5, step), "raw", 0
        ),
    )
for beyond in ("reciprocal", "limit", "mean"):
    bound(
        f"bounds.zscore:{beyond}",
        bounds.zscore(2.0, decay=0.9, warmup=20, eps=1e-3, beyond=beyond),
        functools.partial(
            oracle.zscore, z=2.0, decay=0.9, warmup=20, eps=1e-3, beyond=beyond
        ),
    )
bound(
    "bounds.growth",
    bounds.growth(1.5),
    of_history(lambda: oracle.growth(1.5), "kept"),
)
bound(
    "bounds.second_moment",
    bounds.second_moment(4.0, decay=0.9),
    of_history(lambda: oracle.second_moment(4.0, 0.9), "kept"),
)
bound(
    "bounds.mean_over_rms",
    bounds.mean_over_rms(eps=1e-3),
    of_history(lambda: oracle.mean_over_rms(0.7, 0.9, 1e-3), "current"),
)
bound(
    "bounds.phases",
    bounds.phases(2.0, bounds.ema(1.5, decay=0.9, warmup=20)),
    lambda norms: oracle.phases(norms, 2.0, oracle.ema(1.5, 0.9, "mean", 20), 20),
)
bound(
    "bounds.plus",
    bounds.plus(bounds.mean(warmup=10), bounds.deviation(warmup=10)),
    of_history(lambda: oracle.mean_std(3.0), "raw", 10),
)


# The same with a cell per array.


for name, made, factors in (
    (
        "leaf:percentile",
        bounds.percentile(10.0, window=50),
        of_history(lambda: oracle.percentile(10.0, 50), "current"),
    ),
    (
        "leaf:median_mad",
        bounds.median_mad(window=50, warmup=20),
        of_history(lambda: oracle.median_mad(3.0, 50), "raw", 20),
    ),
    (
        "leaf:streaming_quantile",
        bounds.streaming_quantile(),
        of_history(lambda: oracle.streaming_quantile(0.5), "current"),
    ),
    (
        "leaf:zscore",
        bounds.zscore(),
        functools.partial(
            oracle.zscore, z=2.5, decay=0.97, warmup=25, eps=1e-6, beyond="reciprocal"
        ),
    ),
):
    METHODS[name] = Method("pair", clip_by(scopes.leaf(), made), leaves(factors))


# Bounds of other scopes and of params.


def together(limit, observe, warmup=1):
    """The oracle of arrays that are scaled by one factor."""

    def want(updates, params):
        cells = [norms_of(u) for u in updates.values()]
        found = oracle.jointly(cells, limit(), observe, warmup)
        return {name: scaled(u, found) for name, u in updates.items()}

    return want


def shares(limit, observe, floor, warmup=1):
    """Factors by the norms of a cell and of its param, in which it is measured."""
    return lambda u, w: oracle.relative(
        norms_of(u), norms_of(w), limit(), observe, floor, warmup
    )


def leaves_of_params(factors):
    """The oracle of one cell per array; `factors` sees the array and its param."""
    return lambda updates, params: {
        name: scaled(u, factors(u, params[name])) for name, u in updates.items()
    }


def columns_of_params(factors):
    """The oracle of one cell per column."""

    def want(updates, params):
        u, w = updates["kernel"], params["kernel"]
        cells = [(u[:, :, i], w[:, :, i]) for i in range(u.shape[2])]
        return {"kernel": side_by_side(*[scaled(u, factors(u, w)) for u, w in cells])}

    return want


METHODS |= {
    "jointly:number": Method(
        "several",
        clip_by(scopes.leaf(), bounds.jointly(2.0)),
        together(lambda: lambda history: 2.0, "raw", 0),
    ),
    "jointly:raw": Method(
        "several",
        clip_by(scopes.leaf(), bounds.jointly(bounds.percentile(50, window=50))),
        together(lambda: oracle.percentile(50, 50), "current"),
    ),
    "jointly:kept": Method(
        "several",
        clip_by(scopes.leaf(), bounds.jointly(bounds.ema(1.5, decay=0.9))),
        together(lambda: oracle.ema(1.5, 0.9, "mean"), "kept"),
    ),
    "relative:raw": Method(
        "pair",
        clip_by(
            scopes.leaf(),
            bounds.relative(bounds.percentile(75, window=50, observe="raw"), None),
        ),
        leaves_of_params(shares(lambda: oracle.percentile(75, 50), "raw", None)),
    ),
    "relative:kept": Method(
        "pair",
        clip_by(
            scopes.leaf(),
            bounds.relative(bounds.ema(1.5, decay=0.9, warmup=10), 0.1),
        ),
        leaves_of_params(
            shares(lambda: oracle.ema(1.5, 0.9, "mean", 10), "kept", 0.1, 10)
        ),
    ),
    "adaptive_grad_clip": Method(
        "columns",
        optaxclip.adaptive_grad_clip(bounds.ema(1.5, decay=0.9, warmup=10), 0.1),
        columns_of_params(
            shares(lambda: oracle.ema(1.5, 0.9, "mean", 10), "kept", 0.1, 10)
        ),
    ),
}


# The named methods, with their defaults where these are reached in 300 steps.


def single(name, tx, factors):
    METHODS[name] = Method("one cell", tx, whole(factors))


single(
    "autoclip",
    optaxclip.autoclip(window=50),
    of_history(lambda: oracle.percentile(10.0, 50), "current"),
)
single(
    "autoclip:all",
    optaxclip.autoclip(50),
    of_history(lambda: oracle.percentile(50.0, 1000), "current"),
)
single(
    "percentile_clip",
    optaxclip.percentile_clip(),
    of_history(lambda: oracle.percentile(95.0, 128), "raw"),
)
single(
    "quantile_clip:geometric",
    optaxclip.quantile_clip(),
    of_history(lambda: oracle.tracked_quantile(0.5, 0.2, 0.1, "geometric"), "raw", 0),
)
single(
    "quantile_clip:arithmetic",
    optaxclip.quantile_clip(0.75, rate=0.125, initial=1.0, step="arithmetic"),
    of_history(
        lambda: oracle.tracked_quantile(0.75, 0.125, 1.0, "arithmetic"), "raw", 0
    ),
)
for beyond, max_norm in (
    ("reciprocal", 5.0),
    ("reciprocal", inf),
    ("limit", 5.0),
    ("mean", 5.0),
):
    single(
        f"zclip:{beyond} {max_norm}",
        optaxclip.zclip(max_norm=max_norm, beyond=beyond),
        functools.partial(
            oracle.zscore,
            z=2.5,
            decay=0.97,
            warmup=25,
            eps=1e-6,
            beyond=beyond,
            max_norm=max_norm,
        ),
    )
single(
    "mean_clip",
    optaxclip.mean_clip(0.5, warmup=5),
    of_history(lambda: oracle.mean(0.5), "raw", 5),
)
single(
    "median_clip",
    optaxclip.median_clip(),
    lambda norms: oracle.median_clip(norms, 3.0, 100),
)
single(
    "median_clip:early",
    optaxclip.median_clip(0.25, warmup=1),
    lambda norms: oracle.median_clip(norms, 0.25, 1),
)


def adagc(ratio, decay, warmup, max_norm):
    def want(updates, params):
        cells = [norms_of(u) for u in updates.values()]
        found = oracle.adagc(cells, ratio, decay, warmup, max_norm)
        pairs = zip(updates.items(), found, strict=True)
        return {name: scaled(u, factors) for (name, u), factors in pairs}

    return want


def trust_ratio(ratio, shape):
    return leaves_of_params(
        lambda u, w: oracle.trust_ratio(norms_of(u), norms_of(w), ratio, shape)
    )


def array_by_array(name, tx, want):
    METHODS[name] = Method("pair", tx, want)


array_by_array(
    "ema_clip",
    optaxclip.ema_clip(1.5),
    leaves(of_history(lambda: oracle.ema(1.5, 0.95, "mean"), "kept")),
)
array_by_array(
    "norm_growth_clip",
    optaxclip.norm_growth_clip(),
    leaves(of_history(lambda: oracle.growth(1.01), "kept")),
)
array_by_array(
    "adagn",
    optaxclip.adagn(),
    leaves(
        of_history(
            lambda: oracle.mean_over_rms(0.7, 0.9, 1e-8), "current", 1, "normalize"
        )
    ),
)
array_by_array(
    "adanorm",
    optaxclip.adanorm(),
    leaves(of_history(lambda: oracle.ema(1.0, 0.95, "zero"), "current", 1, "floor")),
)
for rescale, decay in ((True, 0.999), (True, 0.9), (False, 0.9)):
    array_by_array(
        f"adaclip:rescale={rescale} {decay}",
        optaxclip.adaclip(decay, rescale=rescale),
        arrays(lambda u, w, d=decay, r=rescale: oracle.adaclip(u, d, r)),
    )
array_by_array(
    "clippy", optaxclip.clippy(), arrays(lambda u, w: oracle.clippy(u, w, 0.5, 1e-2))
)
array_by_array(
    "clip_by_trust_ratio", optaxclip.clip_by_trust_ratio(), trust_ratio(1.0, "hard")
)
array_by_array(
    "normalize_by_trust_ratio",
    optaxclip.normalize_by_trust_ratio(0.5),
    trust_ratio(0.5, "normalize"),
)

METHODS |= {
    "adagc": Method("several", optaxclip.adagc(), adagc(1.05, 0.98, 100, 1.0)),
    "adagc:early": Method(
        "several",
        optaxclip.adagc(1.5, decay=0.9, warmup=15, max_norm=8.0),
        adagc(1.5, 0.9, 15, 8.0),
    ),
    "spam_clip": Method(
        "elements",
        optaxclip.spam_clip(),
        arrays(lambda u, w: oracle.spam_clip(u, 5000.0, 0.999, 19)),
    ),
    "spam_clip:often": Method(
        "elements",
        optaxclip.spam_clip(4.0, decay=0.75, warmup=3),
        arrays(lambda u, w: oracle.spam_clip(u, 4.0, 0.75, 3)),
    ),
    "clippy:relative": Method(
        "elements",
        optaxclip.clippy(0.1, absolute=0.0),
        arrays(lambda u, w: oracle.clippy(u, w, 0.1, 0.0)),
    ),
    "adopt_clip": Method(
        "elements",
        optaxclip.adopt_clip(),
        arrays(lambda u, w: oracle.adopt_clip(u, 0.25)),
    ),
    "acclip": Method(
        "momenta",
        optaxclip.acclip(),
        arrays(lambda u, w: oracle.acclip(u, 1.0, 0.9, 0.99, 1e-5)),
    ),
    "acclip:alpha=2": Method(
        "momenta",
        optaxclip.acclip(2.0),
        arrays(lambda u, w: oracle.acclip(u, 2.0, 0.9, 0.99, 1e-5)),
    ),
    "scale_by_stable_adam": Method(
        "sound",
        optaxclip.scale_by_stable_adam(),
        arrays(lambda u, w: oracle.stable_adam(u, 0.9, 0.99, 1e-8)),
    ),
}


# What holds.

# These have no history, or a count of all updates.
NO_HISTORY = {
    "jointly:number",
    "clippy",
    "clippy:relative",
    "clip_by_trust_ratio",
    "normalize_by_trust_ratio",
    "adopt_clip",
    "spam_clip",
    "spam_clip:often",
    "scale_by_stable_adam",
}

both_precisions = pytest.mark.parametrize("dtype", RTOL)
every = pytest.mark.parametrize("name", METHODS)
every_learned = pytest.mark.parametrize(
    "name", [n for n in METHODS if n not in NO_HISTORY]
)


@both_precisions
@every
def test_a_method_is_the_loop_of_its_paper(name, dtype):
    given, _, want = METHODS[name]
    updates, params = inputs(given, dtype)
    wanted = want(updates, params)
    got, _ = outputs(given, family_of(name), dtype)[name]
    assert set(got) == set(wanted)
    for key, new in wanted.items():
        assert got[key].dtype == dtype
        np.testing.assert_allclose(
            got[key].astype(np.float64), new, RTOL[dtype], 0, err_msg=key
        )


@both_precisions
@every_learned
def test_damage_and_zeros_leave_no_trace_in_what_was_learned(name, dtype):
    """To the bit, where all cells are damaged, or all are 0; elsewhere it learns."""
    given, _, _ = METHODS[name]
    _, still = outputs(given, family_of(name), dtype)[name]
    assert still[DAMAGED].all()
    # A zero does enter a momentum.
    assert family_of(name) == "acclip" or still[ZERO].all()
    assert still.mean() < 0.2


@pytest.mark.usefixtures("strict")
# `optax.scale_by_adam` itself promotes its count.
@pytest.mark.parametrize("name", [n for n in METHODS if n != "scale_by_stable_adam"])
def test_nothing_is_promoted_silently(name):
    """And the state keeps its structure, shapes and dtypes."""
    given, tx, _ = METHODS[name]
    updates, params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], jnp.float32),
        inputs(given, "float32"),
    )
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, updates, state, params)
    assert state == after


# The worked example of Jain and Chlamtac, 1985: what is observed, and from the sixth on
# the height of the middle marker, which ends at 4.44.
OBSERVED = [
    *(0.02, 0.15, 0.74, 3.39, 0.83, 22.37, 10.15, 15.43, 38.62, 15.92),
    *(34.60, 10.28, 1.47, 0.40, 0.05, 11.39, 0.27, 0.42, 0.09, 11.37),
]
MEDIANS = [
    *(0.74, 0.74, 2.18, 4.75, 4.75),
    *(9.27, 9.27, 9.27, 9.27, 6.30, 6.30, 6.30, 6.30, 4.44, 4.44),
]
MARKERS = [0.02, 0.49, 4.44, 17.20, 38.62]


def test_the_oracle_of_p2_gives_the_published_medians():
    markers, medians = oracle.P2(0.5), []
    for x in OBSERVED:
        markers.add(x)
        medians.append(round(float(markers.value()), 2))
    assert medians[5:] == MEDIANS
    np.testing.assert_allclose(markers.q, MARKERS, 0, 0.0051)
    assert markers.n == [1, 6, 10, 16, 20]


def seen_by(bound, magnitudes):
    """The limits of all steps, and the last state."""

    def step(state, m):
        limit, learn = bound.limit(state, m, None)
        return learn(m), limit

    first = bound.init(jnp.array(0.0))
    return jax.jit(lambda seen: lax.scan(step, first, seen)[::-1])(
        jnp.array(magnitudes, jnp.float32)
    )


def test_streaming_quantile_gives_the_published_medians():
    medians, state = seen_by(bounds.streaming_quantile(0.5), OBSERVED)
    np.testing.assert_allclose(medians[5:], MEDIANS, 0, 0.0051)
    np.testing.assert_allclose(state.heights, MARKERS, 0, 0.0051)
    np.testing.assert_array_equal(state.positions, [1, 6, 10, 16, 20])


def test_up_to_five_observations_a_streaming_quantile_is_exact():
    for quantile in (0.25, 0.6):
        limits, _ = seen_by(bounds.streaming_quantile(quantile), OBSERVED[:5])
        want = [np.percentile(OBSERVED[: i + 1], 100 * quantile) for i in range(5)]
        np.testing.assert_allclose(limits, want, 1e-6)


def test_a_percentile_that_is_a_value_seen_does_not_feel_the_next():
    """The rank 0.6 * 25 is 15 in any precision, however far the spikes above it."""
    seen = [1.0] * 16 + [1e6] * 10
    limits, _ = seen_by(bounds.percentile(60.0, window=26), seen)
    np.testing.assert_allclose(limits[-1], np.percentile(seen, 60.0), RTOL["float32"])
