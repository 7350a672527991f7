"""skip_steps: a skipped update is one that never was."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import norm as norm_of

import optaxclip
from benchmarks import gates, measure
from optaxclip import bounds, recorded, skip_steps

INF, NAN = math.inf, math.nan
PARAMS = {"b": jnp.array([1.0, -2.0]), "w": jnp.array([[2.0, 1.0], [0.5, -1.0]])}


def gradient(size, seed=0):
    """A gradient of this norm, or with one element that is not finite."""
    rng = np.random.default_rng(seed)
    found = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in PARAMS.items()}
    if math.isfinite(size):
        length = norm_of(list(found.values()))
        return {n: g * np.float32(size / length) for n, g in found.items()}
    found["w"][0, 1] = size
    return found


def gradients(sizes):
    return [gradient(size, seed) for seed, size in enumerate(sizes)]


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=0)
def trained(tx, state, grads):
    """Params, state and the state after each update, of a scan over gradients."""

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), state

    (params, state), states = jax.lax.scan(step, (PARAMS, state), grads)
    return params, state, states


def skipping(tx, sizes):
    """Whether each of these gradients is skipped."""
    _, _, states = trained(tx, tx.init(PARAMS), stacked(gradients(sizes)))
    return (np.diff(np.asarray(states.skipped), prepend=0) > 0).tolist()


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (f.shape, f.dtype) == (w.shape, w.dtype)
        if jnp.issubdtype(f.dtype, jax.dtypes.prng_key):
            f, w = jax.random.key_data(f), jax.random.key_data(w)
        assert np.asarray(f).tobytes() == np.asarray(w).tobytes()


def close(found, wanted):
    """The same numbers, but for what XLA rounds in another order."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (f.shape, f.dtype) == (w.shape, w.dtype)
        if jnp.issubdtype(f.dtype, jnp.inexact):
            np.testing.assert_allclose(f, w, rtol=1e-5)
        else:
            same(f, w)


# The rule, against plain Python.


class Number:
    def __init__(self, values):
        self.values, self.step = values, 0

    def limit(self, params):
        self.step += 1
        return self.values[min(self.step, len(self.values)) - 1]

    def learn(self, size):
        pass


class Relative(Number):
    def limit(self, params):
        return self.values[0] * norm_of(list(params.values()))


class Percentile(Number):
    """The median of the last four finite norms before."""

    def __init__(self):
        self.seen = []

    def limit(self, params):
        return float(np.percentile(self.seen[-4:], 50)) if self.seen else INF

    def learn(self, size):
        if math.isfinite(size) and size > 0:
            self.seen.append(size)


def by_hand(rule, sizes, warmup, rate=0.1, momentum=0.5):
    """Params, the trace of momentum and the counts, in float64."""
    params = {n: np.asarray(p, np.float64) for n, p in PARAMS.items()}
    trace = jax.tree.map(np.zeros_like, params)
    skipped, in_a_row, finite, counts = 0, 0, 0, []
    for grad in gradients(sizes):
        grad = {n: np.asarray(g, np.float64) for n, g in grad.items()}
        size = norm_of(list(grad.values()))
        limit = rule.limit(params)
        apply = math.isfinite(size) and (finite < warmup or size <= limit * (1 + 1e-7))
        finite += math.isfinite(size) and finite < warmup
        rule.learn(size)
        if apply:
            trace = {n: momentum * t + grad[n] for n, t in trace.items()}
            params = {n: p - rate * trace[n] for n, p in params.items()}
        skipped, in_a_row = skipped + (not apply), 0 if apply else in_a_row + 1
        counts.append((skipped, in_a_row))
    return params, trace, counts


SIZES = [1.0, NAN, 2.0, INF, -INF, 9.0, 3.0, 0.0, 2.0, 8.0, NAN, 1.5, 30.0, 40.0, 50.0]
MEDIAN = functools.partial(bounds.percentile, 50, window=4, observe="raw")
RULES = {
    "inf": (INF, lambda: Number([INF])),
    "number": (2.0, lambda: Number([2.0])),
    "schedule": (
        lambda step: jnp.array([5.0, 1.0, 10.0])[jnp.minimum(step, 2)],
        lambda: Number([5.0, 1.0, 10.0]),
    ),
    "relative": (bounds.relative(1.0), lambda: Relative([1.0])),
    "percentile": (recorded(MEDIAN()), Percentile),
}


@pytest.mark.parametrize(
    "name, warmup", [*((name, 0) for name in RULES), ("number", 3), ("percentile", 3)]
)
def test_the_rule(name, warmup):
    bound, rule = RULES[name]
    tx = skip_steps(optax.sgd(0.1, momentum=0.5), bound, warmup=warmup)
    params, state, states = trained(tx, tx.init(PARAMS), stacked(gradients(SIZES)))
    wanted, trace, counts = by_hand(rule(), SIZES, warmup)
    found = np.stack([states.skipped, states.in_a_row], axis=1)
    assert found.tolist() == [list(pair) for pair in counts]
    assert states.steps.tolist() == list(range(1, len(SIZES) + 1))
    for n in PARAMS:
        np.testing.assert_allclose(params[n], wanted[n], rtol=1e-5)
        np.testing.assert_allclose(state.inner[0].trace[n], trace[n], rtol=1e-5)


# What is skipped leaves no trace, whatever is inside.

INNER = {
    "clip that learns": lambda: optax.chain(
        recorded(optaxclip.mean_clip(1.0)), optax.sgd(0.1, momentum=0.9)
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 5)
    ),
    "keys": lambda: optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.1), "b": optax.set_to_zero()}, {"b": "a", "w": "b"}
    ),
    "state is the update": lambda: optax.trace(0.5),
}


@pytest.mark.parametrize("name", INNER)
def test_the_state_is_that_of_the_applied_updates_only(name):
    inner = INNER[name]()
    sizes = [NAN, 1.0, 2.0, INF, 3.0, 50.0, -INF, 1.0, NAN]
    applied = [1.0, 2.0, 3.0, 1.0]
    grads = gradients(sizes)
    tx = skip_steps(inner, 10.0)
    params, state, states = trained(tx, tx.init(PARAMS), stacked(grads))
    within = stacked([g for g, s in zip(grads, sizes) if s in applied])
    wanted, wanted_state, _ = trained(inner, inner.init(PARAMS), within)
    assert int(state.skipped) == 5 and int(state.in_a_row) == 1
    close((params, state.inner), (wanted, wanted_state))
    first = jax.tree.map(lambda x: x[0], states.inner)
    same(first, jax.jit(inner.init)(PARAMS))


def test_eager_is_what_jit_is():
    tx = skip_steps(optax.adam(0.1), 10.0)
    eager, jitted = tx.init(PARAMS), tx.init(PARAMS)
    for grad in gradients([1.0, 2.0, NAN, 60.0, 1.5]):
        updates, eager = tx.update(grad, eager, PARAMS)
        wanted, jitted = jax.jit(tx.update)(grad, jitted, PARAMS)
        close((updates, eager), (wanted, jitted))
    assert int(eager.skipped) == 2


# Where optax.apply_if_finite fails: it gives up, and it sees only what a clip leaves.


def test_it_never_applies_a_nan_however_many_there_are():
    sizes = [1.0, *[NAN] * 9, 1.0]
    tx = skip_steps(optax.adam(0.1))
    params, state, states = trained(tx, tx.init(PARAMS), stacked(gradients(sizes)))
    assert states.in_a_row.tolist() == [*range(10), 0]
    assert all(np.isfinite(p).all() for p in jax.tree.leaves((params, state)))
    gave_up = optax.apply_if_finite(optax.adam(0.1), 5)
    params, _, _ = trained(gave_up, gave_up.init(PARAMS), stacked(gradients(sizes)))
    assert not np.isfinite(params["w"]).all()


def test_around_a_clip_it_sees_what_the_clip_would_hide():
    bad = gradient(INF)
    hidden = optax.chain(optax.clip(1.0), optax.apply_if_finite(optax.sgd(0.1), 5))
    updates, state = hidden.update(bad, hidden.init(PARAMS))
    assert float(updates["w"][0, 1]) == np.float32(-0.1)
    assert int(state[1].total_notfinite) == 0
    for clip in (optax.clip(1.0), optaxclip.clip(1.0), optax.clip_by_global_norm(1.0)):
        tx = skip_steps(optax.chain(clip, optax.sgd(0.1)))
        updates, state = tx.update(bad, tx.init(PARAMS))
        same(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        assert int(state.skipped) == 1


def test_behind_a_clip_by_norm_of_this_library_it_sees_what_is_damaged_too():
    tx = optax.chain(
        optaxclip.clip_by_global_norm(1.0), skip_steps(optax.sgd(1.0)), optax.scale(2.0)
    )
    for bad in (gradient(INF), gradient(NAN)):
        updates, state = jax.jit(tx.update)(bad, tx.init(PARAMS))
        same(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        assert int(optax.tree.get(state, "skipped")) == 1
    updates, state = tx.update(gradient(1e25), tx.init(PARAMS))
    assert int(optax.tree.get(state, "skipped")) == 0
    np.testing.assert_allclose(norm_of(jax.tree.leaves(updates)), 2, rtol=1e-6)


# The edges of the bound, and of the counts.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_exactly_at_the_bound_is_within(dtype):
    tx = skip_steps(optax.identity(), 5.0)
    update = jax.jit(lambda u: tx.update(u, tx.init(u)))
    at, beyond = jnp.array([3.0, 4.0], dtype), jnp.array([3.0, 4.125], dtype)
    same(update(at)[0], at)
    same(update(beyond)[0], jnp.zeros(2, dtype))


def test_a_traced_bound():
    def skipped(bound, size):
        tx = skip_steps(optax.sgd(1.0), bound)
        return tx.update(gradient(1.0), tx.init(PARAMS), norm=size)[1].skipped

    limits = jnp.array([INF, 1.0, 0.0, -1.0, NAN])
    run = jax.jit(jax.vmap(skipped, (0, None)))
    assert run(limits, 1.0).tolist() == [0, 0, 1, 1, 1]
    assert run(limits, 0.0).tolist() == [0, 0, 0, 0, 1]
    assert run(limits, INF).tolist() == [1, 1, 1, 1, 1]


def test_counts_saturate():
    tx = skip_steps(optax.sgd(1.0))
    full = jnp.int32(2**31 - 2)
    state = tx.init(PARAMS)._replace(skipped=full, in_a_row=full, steps=full)
    for _ in range(2):
        _, state = tx.update(gradient(NAN), state)
    assert {int(c) for c in state[:3]} == {2**31 - 1}


def test_a_warmup_counts_what_is_finite_and_the_bound_learns_meanwhile():
    bound = bounds.percentile(100, window=9, observe="raw")
    sizes = [8.0, NAN, 50.0, 60.0, 55.0, 61.0]
    assert skipping(skip_steps(optax.sgd(0.1), bound), sizes) == [
        *[False, True, True, True, False, True]
    ]
    tx = skip_steps(optax.sgd(0.1), bound, warmup=3)
    assert skipping(tx, sizes) == [False, True, False, False, False, True]
    late = skip_steps(optax.sgd(0.1), 1.0, warmup=2)
    assert skipping(late, [NAN, NAN, 5.0, INF, 5.0, 5.0, 0.5]) == [
        *[True, True, False, True, False, True, False]
    ]


# What the bound learns: the promises of the docstring about a lasting rise.

RELEASED = {
    "percentile": (bounds.percentile(90, window=8, observe="raw"), True),
    "median_mad": (bounds.median_mad(3.0, window=8, warmup=4), True),
    "tracked_quantile": (bounds.tracked_quantile(0.9, initial=2.0), True),
    "mean": (bounds.mean(2.0), True),
    "ema raw": (bounds.ema(2.0, decay=0.9, observe="raw"), True),
    "zscore limit": (bounds.zscore(2.5, warmup=8, beyond="limit"), True),
    "ema": (bounds.ema(2.0, decay=0.9), False),
    "growth": (bounds.growth(2.0), False),
    "second_moment": (bounds.second_moment(100.0, decay=0.9), False),
    "zscore": (bounds.zscore(2.5, warmup=8), False),
}


@pytest.mark.parametrize("name", RELEASED)
def test_what_follows_a_lasting_rise_and_what_skips_for_ever(name):
    bound, released = RELEASED[name]
    tx = skip_steps(optax.identity(), bound)
    wobble = np.random.default_rng(0).uniform(0.8, 1.2, 240).astype(np.float32)
    sizes = jnp.asarray(np.where(np.arange(240) < 40, 1.0, 1000.0) * wobble)[:, None]
    step = lambda state, u: (tx.update(u, state)[1],) * 2
    _, states = jax.jit(lambda s: jax.lax.scan(step, s, sizes))(tx.init(sizes[0]))
    assert states.skipped[39] < 12
    skipped_late = int(states.skipped[-1] - states.skipped[-61])
    assert skipped_late < 30 if released else skipped_late == 60


def test_what_was_skipped_is_a_record_of_something_clipped():
    tx = optax.chain(
        skip_steps(
            optax.chain(optaxclip.clip_by_global_norm(recorded(1.0)), optax.sgd(0.1)),
            recorded(5.0),
        )
    )
    state = tx.init(PARAMS)
    for grad in gradients([2.0, 6.0, NAN, 3.0, 7.0]):
        _, state = jax.jit(tx.update)(grad, state)
    outer, inner = optaxclip.records(state)
    np.testing.assert_allclose([outer.norm, outer.limit, outer.scale], [7, 5, 0], 1e-6)
    counts = outer.steps, outer.clipped_steps, outer.nonfinite_steps
    assert tuple(map(int, counts)) == (5, 2, 1)
    np.testing.assert_allclose(inner.norm, 3.0, rtol=1e-6)
    assert tuple(map(int, (inner.steps, inner.nonfinite_steps))) == (2, 0)


# Extra arguments.


def listener(heard):
    def update(updates, state, params=None, **extra):
        heard.append((updates, extra))
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def test_extra_arguments_and_a_known_norm_reach_what_is_inside():
    heard = []
    tx = skip_steps(optax.chain(listener(heard), optax.scale(2.0)), 10.0)
    grad = gradient(1.0)
    updates, _ = tx.update(grad, tx.init(PARAMS), value=3.0, norm=9.0)
    same(updates, jax.tree.map(lambda g: 2 * g, grad))
    assert heard[-1][1] == {"value": 3.0, "norm": 9.0}
    for norm in (10.5, NAN, INF):
        updates, state = tx.update(grad, tx.init(PARAMS), value=3.0, norm=norm)
        same(updates, jax.tree.map(jnp.zeros_like, grad))
        assert int(state.skipped) == 1
        fed, extra = heard[-1]
        same(fed, updates)
        assert extra == {"value": 3.0, "norm": 0.0}
    tx.update(grad, tx.init(PARAMS))
    assert "norm" not in heard[-1][1]
    plain = skip_steps(optax.GradientTransformation(*optax.scale(2.0)))
    plain.update(grad, plain.init(PARAMS), value=3.0)


def test_a_known_norm_is_not_measured():
    tx = skip_steps(
        optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(1.0)), 9.0
    )
    state = tx.init(PARAMS)

    def text(**extra):
        run = lambda g: tx.update(g, state, **extra)[0]
        return jax.jit(run).lower(PARAMS).as_text()

    assert "stablehlo.reduce" in text()
    assert "stablehlo.reduce" not in text(norm=3.0)
    updates, _ = tx.update(gradient(1.0), state, norm=4.0)
    np.testing.assert_allclose(norm_of(jax.tree.leaves(updates)), 0.25, rtol=1e-6)


# Leaves of all kinds, in the updates and in the state.


def odd():
    return {
        "w": jnp.array([3.0, 4.0], jnp.bfloat16),
        "c": jnp.array([1.0 + 1.0j]),
        "weak": jnp.asarray(2.0),
        "empty": jnp.zeros((0, 2)),
        "none": None,
        "masked": optax.MaskedNode(),
        "integer": jnp.arange(3),
        "flag": jnp.array([True]),
        "key": jax.random.key(0),
        "float0": np.zeros(2, jax.dtypes.float0),
    }


def remember():
    """Its state is the last update."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: p, params), lambda u, s, p=None: (u, u)
    )


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_leaves_of_all_kinds(jit):
    tx, tree = skip_steps(remember(), 20.0), odd()
    if jit:
        tree.pop("float0")
    other = tree | {"integer": jnp.arange(3) + 5, "key": jax.random.key(1)}
    bad = other | {"w": tree["w"].at[0].set(NAN)}
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(tree)
    updates, after = update(other, state, tree)
    same((updates, after.inner), (other, other))
    updates, skipped = update(bad, after, tree)
    same(skipped.inner, other)
    zeros = {n: jnp.zeros_like(x) for n, x in tree.items() if n not in KEPT}
    same(updates, other | zeros)
    assert updates["weak"].weak_type and skipped.inner["weak"].weak_type
    assert int(skipped.skipped) == 1


KEPT = ("none", "masked", "key", "float0")


@pytest.mark.parametrize("empty", [{}, None, [None], {"a": jnp.arange(3)}])
def test_updates_without_leaves_are_applied(empty):
    tx = skip_steps(optax.identity(), 0.0)
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(empty, tx.init(empty))
        same(updates, empty)
        assert int(state.skipped) == 0


def test_python_and_numpy_numbers_are_leaves():
    tx = skip_steps(optax.scale(2.0), 6.0)
    tree = {"a": 3.0, "b": np.array([4.0], np.float32)}
    updates, state = tx.update(tree, tx.init(tree))
    assert float(updates["a"]) == 6.0 and int(state.skipped) == 0


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    "bound", [2.0, bounds.zscore(), recorded(bounds.percentile(90, window=3))]
)
def test_the_state_is_a_fixed_point_from_init_on(bound):
    tx = skip_steps(optax.chain(optax.trace(0.9), optax.scale(-0.1)), bound, warmup=1)
    tree = {"b": jnp.ones(3, jnp.bfloat16), "w": jnp.ones((2, 2))}
    structs = jax.tree.map(lambda u: jax.ShapeDtypeStruct(u.shape, u.dtype), tree)
    described = lambda t: jax.tree.map(jax.typeof, t)
    state = tx.init(tree)
    assert described(jax.eval_shape(tx.init, structs)) == described(state)
    traces = []

    @jax.jit
    def update(*args):
        traces.append(None)
        return tx.update(*args)

    for scale in (1.0, NAN, 2.0):
        fed = jax.tree.map(lambda u, s=scale: (s * u).astype(u.dtype), tree)
        updates, after = update(fed, state, tree)
        assert described(updates) == described(tree)
        assert described(after) == described(state)
        state = after
    assert len(traces) == 1


def test_a_state_that_changes_dtype_does_what_it_does_alone():
    """Adam of optax: moments begin in the dtype of the params."""
    params, grads = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32)
    inner = optax.adam(0.1)
    tx = skip_steps(inner)
    _, wanted = inner.update(grads, inner.init(params), params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    close(state.inner, wanted)
    _, state = jax.jit(tx.update)(NAN * grads, tx.init(params), params)
    same(state.inner, jax.tree.map(jnp.zeros_like, wanted))


@pytest.mark.parametrize(
    "bound", [1.0, recorded(bounds.percentile(90, window=3, observe="raw"))]
)
def test_params_and_state_are_donated_twice(bound):
    tx = skip_steps(optax.adam(0.1), bound)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    fresh = lambda: (jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS))
    donated, plain = jax.jit(step, donate_argnums=(0, 1)), jax.jit(step)
    first = fresh()
    good, bad = gradient(0.5), gradient(NAN)
    second = donated(*donated(*first, good), bad)
    same(second, plain(*plain(*fresh(), good), bad))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first[0], first[1][-1])))


# Frameworks and transformations.


def test_masked_and_partition_judge_their_own_part():
    grad = gradient(3.0) | {"b": jnp.array([NAN, 1.0])}
    skip = lambda: skip_steps(optax.sgd(1.0))
    tx = optax.masked(skip(), {"b": False, "w": True})
    updates, _ = jax.jit(tx.update)(grad, tx.init(PARAMS), PARAMS)
    same(updates, {"b": grad["b"], "w": -grad["w"]})
    tx = optax.partition({"a": skip(), "c": skip()}, {"b": "a", "w": "c"})
    updates, state = jax.jit(tx.update)(grad, tx.init(PARAMS), PARAMS)
    same(updates, {"b": jnp.zeros(2), "w": -grad["w"]})
    inner = [s.inner_state for s in state.inner_states.values()]
    assert [int(s.skipped) for s in inner] == [1, 0]


def test_a_damaged_micro_batch_is_left_out_of_the_mean_or_spoils_it():
    sizes = [1.0, NAN, 2.0]
    inner = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    tx = skip_steps(inner)
    params, state, _ = trained(tx, tx.init(PARAMS), stacked(gradients(sizes)))
    good = gradients(sizes)
    for n, p in PARAMS.items():
        wanted = p - (good[0][n] + good[2][n]) / 2
        np.testing.assert_allclose(params[n], wanted, rtol=1e-5)
    assert int(state.inner.gradient_step) == 1
    tx = optax.MultiSteps(skip_steps(optax.sgd(1.0)), 3).gradient_transformation()
    params, state, _ = trained(tx, tx.init(PARAMS), stacked(good))
    same(params, PARAMS)
    assert int(optax.tree.get(state, "skipped")) == 1


def test_inject_hyperparams_traces_the_bound_and_the_warmup():
    tx = optax.inject_hyperparams(skip_steps)(
        inner=optax.sgd(1.0), bound=lambda step: 2.0 - step, warmup=1
    )
    state = tx.init(PARAMS)
    for skipped in (0, 0, 1):
        _, state = jax.jit(tx.update)(gradient(0.5), state, PARAMS)
        assert int(optax.tree.get(state, "skipped")) == skipped
    assert set(state.hyperparams) == {"bound", "warmup"}


def test_flax_train_state_and_nnx_optimizer():
    tx = optax.chain(skip_steps(optax.adam(0.1), 10.0))
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @jax.jit
    def flax_step(state, grads):
        return state.apply_gradients(grads=grads)

    @nnx.jit
    def nnx_step(model, optimizer, size):
        grads = jax.tree.map(lambda p: size * jnp.ones_like(p), nnx.state(model))
        optimizer.update(model, grads)

    before = model.kernel[...]
    for size in (NAN, 20.0):
        state = flax_step(state, gradient(size))
        nnx_step(model, optimizer, size)
    same(state.params, PARAMS)
    same(model.kernel[...], before)
    for found in (state.opt_state, optimizer.opt_state):
        assert int(optax.tree.get(found, "in_a_row")[...]) == 2
    nnx_step(model, optimizer, 1.0)
    np.testing.assert_allclose(model.kernel[...], before - 0.1, rtol=1e-5)


def test_every_lane_of_a_vmap_decides_for_itself():
    tx = skip_steps(optax.trace(0.5), bounds.zscore(2.0, warmup=2))
    lanes = [[1.0, 2.0, 9.0], [1.0, NAN, 2.0], [NAN, 1.0, 1.5]]
    run = lambda grads: trained(tx, tx.init(PARAMS), grads)[:2]
    batch = stacked([stacked(gradients(sizes)) for sizes in lanes])
    found = jax.jit(jax.vmap(run))(batch)
    assert found[1].skipped.tolist() == [1, 1, 1]
    for lane, sizes in enumerate(lanes):
        wanted = run(stacked(gradients(sizes)))
        close(jax.tree.map(lambda x, lane=lane: x[lane], found), wanted)


# Derivatives.


def steep():
    """Its derivative at zero is infinite in everything, as that of Adam in part."""

    def update(updates, state, params):
        after = state + updates
        size = jnp.sqrt(jnp.sum(updates**2)) * jnp.sqrt(jnp.sum(after**2))
        return updates * jnp.sqrt(jnp.sum(params**2)) / size, after

    return optax.GradientTransformation(jnp.zeros_like, update)


def skipped_if_long(updates, inner_state, params, *norm):
    """The updates and the inner state, as functions of all that they depend on."""
    tx = skip_steps(steep(), 10.0)
    state = tx.init(params)._replace(inner=inner_state)
    known = {"norm": norm[0]} if norm else {}
    updates, state = tx.update(updates, state, params, **known)
    return updates, state.inner


def pulled_back(function, *args):
    back = jax.vjp(function, *args)[1]
    return back((jnp.ones(2), jnp.ones(2)))


@pytest.mark.parametrize("bad, jit", [(NAN, False), (NAN, True), (50.0, True)])
def test_derivatives_are_those_of_inner_or_zero(bad, jit):
    function = jax.jit(skipped_if_long) if jit else skipped_if_long
    zero, good, other = jnp.zeros(2), jnp.array([1.0, 2.0]), jnp.array([0.5, 1.0])
    close(
        pulled_back(function, good, zero, other),
        pulled_back(steep().update, good, zero, other),
    )
    damaged = jnp.array([1.0, bad])
    wanted = (zero, jnp.ones(2), zero)
    same(pulled_back(function, damaged, zero, zero), wanted)
    norm = jnp.float32(bad)
    same(pulled_back(function, damaged, zero, zero, norm), (*wanted, jnp.float32(0)))
    _, tangents = jax.jvp(lambda u: function(u, zero, zero), (damaged,), (good,))
    same(tangents, (zero, zero))


def test_derivatives_through_a_training_run_with_skipped_steps_are_finite():
    tx = skip_steps(optax.adam(0.1), 10.0)

    def final(params):
        state = tx.init(params)
        for scale, shift in [(1, NAN), (1, NAN), (1, 0), (80, 0), (1, INF), (1, 0)]:
            updates, state = tx.update(scale * params + shift, state, params)
            params = params + updates
        return jnp.sum(params**2)

    slope = jax.jit(jax.grad(final))(jnp.array([1.0, -2.0]))
    assert np.isfinite(slope).all() and np.all(slope != 0)


# What is refused.


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: skip_steps(3.0), TypeError, "inner must be an optax.Gradient.*got in"),
        (lambda: skip_steps(optax.adam), TypeError, "inner must be an optax.Gradient"),
        (lambda: skip_steps(optax.sgd(1.0), -1.0), ValueError, "bound must be >= 0, g"),
        (lambda: skip_steps(optax.sgd(1.0), NAN), ValueError, "bound must not be NaN"),
        (lambda: skip_steps(optax.sgd(1.0), True), TypeError, "bound must be a real "),
        (lambda: skip_steps(optax.sgd(1.0), "1"), TypeError, "bound must be a real nu"),
        (lambda: skip_steps(optax.sgd(1.0), None), TypeError, "bound must be a real n"),
        (
            lambda: skip_steps(optax.sgd(1.0), optaxclip.autoclip()),
            TypeError,
            "bound must be a number, a schedule or a bound",
        ),
        *[
            (
                lambda bad=bad: skip_steps(optax.sgd(1.0), warmup=bad),
                error,
                "warmup must be ",
            )
            for bad, error in [
                (-1, ValueError),
                (0.5, ValueError),
                (NAN, ValueError),
                (True, TypeError),
                ("1", TypeError),
                (None, TypeError),
            ]
        ],
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=f"^skip_steps: {message}"):
        make()


@pytest.mark.parametrize("state", [None, optax.EmptyState(), (1, 2)])
def test_a_state_of_something_else(state):
    tx = skip_steps(optax.sgd(1.0))
    with pytest.raises(ValueError, match="skip_steps: state must be a SkipStepsState"):
        tx.update(PARAMS, state)


def test_params_that_are_missing_and_norms_that_are_none():
    tx = skip_steps(optax.sgd(1.0), bounds.relative(0.1))
    with pytest.raises(ValueError, match=r"^bounds.relative: needs params, got None"):
        tx.update(PARAMS, tx.init(PARAMS))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="norm must be >= 0"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, norm=-1.0)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_an_inner_whose_state_changes_structure(jit):
    inner = optax.GradientTransformation(
        lambda p: {"a": jnp.zeros(())}, lambda u, s, p=None: (u, {**s, "b": s["a"]})
    )
    tx = skip_steps(inner)
    update = jax.jit(tx.update) if jit else tx.update
    message = "^skip_steps: inner must keep the structure .* got no old state at b"
    with pytest.raises(ValueError, match=message):
        update(PARAMS, tx.init(PARAMS))


def test_the_caller_can_stop_in_jitted_code():
    tx = skip_steps(optax.sgd(1.0))

    def step(grads, state):
        updates, state = tx.update(grads, state)
        checkify.check(state.in_a_row < 2, "too many damaged updates in a row")
        return updates, state

    run, state = jax.jit(checkify.checkify(step)), tx.init(PARAMS)
    for want in (None, "too many damaged updates"):
        error, (_, state) = run(gradient(NAN), state)
        assert (error.get() is None) if want is None else want in error.get()


# What it costs, and several devices.


def test_in_front_of_adam_it_adds_one_read_and_no_temporary():
    params = gates.SIZES["2 x 4096^2"]

    def cost(tx, **extra):
        def step(params, state, updates):
            updates, state = tx.update(updates, state, params, **extra)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        size = gates.nbytes(params)
        with jax.default_device(jax.devices("cpu")[0]):
            return measure.cost(step, params, state, params, size=size, donate=(0, 1))

    found = cost(skip_steps(optax.adam(1e-3), recorded(1.0)))
    assert found.passes == pytest.approx(11, abs=0.05)
    assert found.temp <= 0.01
    assert found.aliased == pytest.approx(3, abs=0.01)
    clipped = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-3))
    known = cost(skip_steps(clipped), norm=2.0)
    assert known.passes == pytest.approx(10, abs=0.05)
    assert known.temp <= 0.01


SPECS = {"kernel": P("d", "t"), "bias": P("t"), "scale": P()}
SHAPES = {"kernel": (8, 4), "bias": (4,), "scale": (3,)}
MOMENTUM = skip_steps(optax.sgd(0.1, momentum=0.9), 100.0)


def sharded(seed):
    rng = np.random.default_rng(seed)
    draw = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    return jax.tree.map(jnp.asarray, draw)


def descended(params, grads, tx, norm=None):
    state = tx.init(params)
    for grad in grads:
        extra = {} if norm is None else {"norm": norm(grad)}
        updates, state = tx.update(grad, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, (state.skipped, state.in_a_row)


def damaged():
    """Gradients: the second is NaN in one element of the kernel, the last too long."""
    grads = [sharded(seed) for seed in range(1, 5)]
    grads[1]["kernel"] = grads[1]["kernel"].at[3, 1].set(NAN)
    grads[3] = jax.tree.map(lambda g: 1e3 * g, grads[3])
    return grads


def check_devices(found, counts):
    wanted, _ = descended(sharded(0), damaged(), MOMENTUM)
    for n in SHAPES:
        shards = found[n].addressable_shards
        assert len(shards) == 8
        for shard in shards:
            want = np.asarray(wanted[n])[shard.index]
            np.testing.assert_allclose(shard.data, want, rtol=1e-5, atol=1e-6)
    for count in counts:
        assert [int(shard.data) for shard in count.addressable_shards] == [
            *[int(count)] * 8
        ]
    assert [int(c) for c in counts] == [2, 1]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_under_jit_all_devices_skip(kind):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(kind, kind))

    def place(tree):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        return {n: put(x, SPECS[n]) for n, x in tree.items()}

    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(descended, tx=MOMENTUM))
        found, counts = run(place(sharded(0)), [place(g) for g in damaged()])
    for n in SHAPES:
        want = NamedSharding(mesh, SPECS[n])
        assert found[n].sharding.is_equivalent_to(want, found[n].ndim)
    check_devices(found, counts)


def measured_by_hand(grads):
    """The norm inside shard_map, where each leaf is a part."""
    over = {"kernel": ("d", "t"), "bias": ("t",), "scale": ()}
    squares = [jax.lax.psum(jnp.sum(g * g), over[n]) for n, g in grads.items()]
    return jnp.sqrt(sum(squares))


@pytest.mark.parametrize(
    "norm", [None, measured_by_hand], ids=["automatic", "known norm"]
)
def test_in_shard_map_a_nan_on_one_device_of_eight_is_skipped_by_all(norm):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    run = jax.shard_map(
        functools.partial(descended, tx=MOMENTUM, norm=norm),
        mesh=mesh,
        in_specs=(SPECS, [SPECS] * 4),
        out_specs=(SPECS, (P(), P())),
        check_vma=True,
    )
    check_devices(*jax.jit(run)(sharded(0), damaged()))


def test_params_may_hold_what_is_no_array():
    tx = skip_steps(optax.sgd(0.5))
    params = {"w": jnp.ones(3), "activation": jax.nn.relu}
    grads = {"w": jnp.ones(3), "activation": None}
    updates, _ = tx.update(grads, tx.init(grads), params)
    assert updates["activation"] is None
    np.testing.assert_array_equal(updates["w"], np.full(3, -0.5))
