"""What the clock says: every figure is a ratio of contestants that ran side by side.

On a machine that others use too, single times mean little; the median of the ratios of
the same rounds, with its quartiles, means more.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from benchmarks.gates import stateless
from benchmarks.measure import Figure, clock, ratio, side_by_side
from optaxclip import norms

PyTree = Any

_SIZE = 16 * 2**20
_UPDATES = 200
_LEARNED = [
    getattr(optaxclip.bounds, name)
    for name in (
        "percentile",
        "median_mad",
        "streaming_quantile",
        "tracked_quantile",
        "mean",
        "mean_std",
        "zscore",
        "ema",
        "growth",
        "mean_over_rms",
    )
]
_LIBRARIES = {"optaxclip": optaxclip, "optax": optax}


def compile_leaves() -> Iterator[Figure]:
    """Seconds to trace, lower and compile clip_by_global_norm of many leaves."""
    yield _compile(100, target=1.0, rounds=5)
    yield _compile(1000, target=0.95, rounds=3)


def compile_leaves_3000() -> Iterator[Figure]:
    """The same at 3,000 leaves, once: a minute or more."""
    yield _compile(3000, target=0.95, rounds=1)


def dispatch_rnn() -> Iterator[Figure]:
    """One call of clip_by_global_norm on the six leaves of a small RNN."""
    shapes = [(28, 128), (128, 128), (128,), (128,), (128, 10), (10,)]
    grads = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)]
    for what, bound in (("clipping", 1.0), ("idle", 1e6)):
        contestants = {}
        for name, library in _LIBRARIES.items():
            update = jax.jit(stateless(library.clip_by_global_norm(bound)))
            contestants[name] = functools.partial(clock, update, grads, calls=200)
        seconds = side_by_side(contestants, rounds=51)
        yield ratio(f"6 leaves, {what}", seconds, "optaxclip", "optax", 1.05)


def standalone_idle() -> Iterator[Figure]:
    """clip_by_global_norm in place, nothing to clip: one read."""
    seconds = _standalone(bound=1e6)
    yield ratio("1 x 16M, idle", seconds, "optaxclip", "optax", 1.1)
    yield ratio("1 x 16M, idle", seconds, "optaxclip", "one read", 1.1)


def standalone_clipping() -> Iterator[Figure]:
    """clip_by_global_norm in place, clipping: a read, and a read and write."""
    seconds = _standalone(bound=1.0)
    yield ratio("1 x 16M, clipping", seconds, "optaxclip", "optax", 1.1)


def chain_adam_update() -> Iterator[Figure]:
    """Clip by global norm, Adam and apply, of gradients that are given."""
    clips = {name: lib.clip_by_global_norm(1.0) for name, lib in _LIBRARIES.items()}
    txs = {name: optax.chain(clip, optax.adam(1e-3)) for name, clip in clips.items()}
    txs["adam alone"] = optax.adam(1e-3)
    grads = _normal()
    seconds = side_by_side(
        {name: _adam_steps(tx, grads) for name, tx in txs.items()}, rounds=25
    )
    yield ratio("1 x 16M", seconds, "optaxclip", "optax", 0.6)
    yield ratio("1 x 16M", seconds, "optaxclip", "adam alone", 1.25)


def safe_norm() -> Iterator[Figure]:
    """norms.tree_norm: as fast as the plain norm, and right at any scale."""
    x = _normal()
    measures = {"optaxclip": norms.tree_norm, "optax": optax.tree.norm}
    jitted = {name: jax.jit(norm) for name, norm in measures.items()}
    contestants = {
        name: functools.partial(clock, norm, x, calls=5)
        for name, norm in jitted.items()
    }
    seconds = side_by_side(contestants, rounds=15)
    yield ratio("1 x 16M, normal range", seconds, "optaxclip", "optax", 1.1)
    for scale in (1e30, 1e-30):
        scaled = x * np.float32(scale)
        exact = float(np.linalg.norm(np.asarray(scaled, np.float64)))
        errors = {n: abs(float(f(scaled)) / exact - 1) for n, f in jitted.items()}
        ours = errors.pop("optaxclip")
        yield Figure(f"1 x 16M, times {scale:g}", ours, "relative error", 1e-5, errors)


def window_percentile() -> Iterator[Figure]:
    """bounds.percentile on a full window, beside jnp.percentile on a ring."""
    for window, target in ((100, 1.0), (1000, 0.2), (10_000, 0.1)):
        norms_T = jnp.exp(jax.random.normal(jax.random.key(0), (_UPDATES,)))
        full = jnp.exp(jax.random.normal(jax.random.key(1), (window,)))
        ours = _followed(optaxclip.bounds.percentile(10.0, window=window))
        state = optaxclip.bounds.WindowState(full, jnp.sort(full), jnp.int32(window))
        theirs = _sorted_every_time(window)
        contestants: dict[str, Callable[[], float]] = {
            "kept in order": functools.partial(clock, ours, norms_T, state),
            "jnp.percentile": functools.partial(clock, theirs, norms_T, full),
        }
        seconds = side_by_side(contestants, rounds=11)
        what = f"window {window}"
        yield ratio(what, seconds, "kept in order", "jnp.percentile", target)
        per_update = np.median(seconds["kept in order"]) / _UPDATES * 1e6
        yield Figure(what, float(per_update), "us per update", None, {})


def learned_bounds() -> Iterator[Figure]:
    """What a learned bound adds per update, of one magnitude, window 1000."""
    norms_T = jnp.exp(jax.random.normal(jax.random.key(0), (_UPDATES,)))
    for rule in _LEARNED:
        bound = rule()
        run = _followed(bound)
        once = functools.partial(clock, run, norms_T, bound.init(norms_T[0]))
        seconds = side_by_side({"": once}, rounds=11)[""]
        per_update = float(np.median(seconds)) / _UPDATES * 1e6
        yield Figure(f"bounds.{rule.__name__}", per_update, "us per update", None, {})


def _followed(bound: optaxclip.bounds.Bound) -> Callable:
    """Returns a program that follows a bound along a sequence of norms."""

    def step(state, norm):
        limit, learn = bound.limit(state, norm, lambda who: norm)
        return learn(jnp.minimum(norm, limit)), limit

    return jax.jit(lambda norms_T, state: jax.lax.scan(step, state, norms_T)[1])


def _sorted_every_time(window: int) -> Callable:
    """Returns a program that takes the percentile of a ring at every step."""

    def step(carry, norm):
        ring, place = carry
        ring = jax.lax.dynamic_update_index_in_dim(ring, norm, place % window, 0)
        return (ring, place + 1), jnp.percentile(ring, 10.0)

    def run(norms_T, ring):
        return jax.lax.scan(step, (ring, jnp.int32(0)), norms_T)[1]

    return jax.jit(run)


def _compile(leaves: int, target: float, rounds: int) -> Figure:
    """Compiles in fresh processes, for the order in one process matters."""
    root = Path(__file__).resolve().parent.parent
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "benchmarks.compile_once"]

    def once(library: str) -> float:
        args = [*command, library, str(leaves)]
        done = subprocess.run(
            args, cwd=root, env=env, check=True, capture_output=True, text=True
        )
        return float(done.stdout)

    contestants = {name: functools.partial(once, name) for name in _LIBRARIES}
    seconds = side_by_side(contestants, rounds, warmup=0)
    return ratio(f"{leaves} leaves", seconds, "optaxclip", "optax", target)


def _standalone(bound: float) -> dict[str, list[float]]:
    """Times clips of a fresh copy, in place; its pages are touched before the clock."""
    x = _normal()
    copy = jax.jit(jnp.copy)
    functions = {
        name: jax.jit(stateless(lib.clip_by_global_norm(bound)), donate_argnums=0)
        for name, lib in _LIBRARIES.items()
    }
    functions["one read"] = jax.jit(lambda x: jnp.sum(x * x))

    def once(function):
        return clock(function, jax.block_until_ready(copy(x)))

    contestants = {n: functools.partial(once, f) for n, f in functions.items()}
    return side_by_side(contestants, rounds=25)


def _adam_steps(
    tx: optax.GradientTransformation, grads: jax.Array
) -> Callable[[], float]:
    """Returns a function that takes one more step in place and gives its seconds."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    held: list[PyTree] = [jnp.zeros_like(grads)]
    held.append(tx.init(held[0]))

    def once() -> float:
        def go():
            held[0], held[1] = step(held[0], held[1], grads)
            return held

        return clock(go)

    return once


def _normal() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (_SIZE,))


CASES = {
    case.__name__: case
    for case in (
        dispatch_rnn,
        standalone_idle,
        standalone_clipping,
        chain_adam_update,
        safe_norm,
        window_percentile,
        learned_bounds,
        compile_leaves,  # last, for it keeps every core busy
        compile_leaves_3000,
    )
}
SLOW = ("compile_leaves_3000",)
