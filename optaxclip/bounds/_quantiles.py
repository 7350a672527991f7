"""Bounds that are quantiles of what was seen, tracked by one or a few numbers."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._checks import (
    check_choice,
    check_count,
    check_that,
)
from optaxclip._numerics import quotient
from optaxclip.bounds._learned import (
    Number,
    Observe,
    Statistic,
    check_observe,
    enough,
    learned,
)
from optaxclip.bounds._rules import Bound, cast
from optaxclip.bounds._windows import column, interpolated, last_rank, replaced

PyTree = Any


class StreamingState(NamedTuple):
    """State of `streaming_quantile`, of every cell."""

    heights: PyTree  # the five markers, ascending; shape=(5, *cells)
    positions: PyTree  # their ranks, from 1; shape=(5, *cells), dtype=jnp.int32
    count: PyTree  # magnitudes learned from; dtype=jnp.int32


class TrackedState(NamedTuple):
    """State of `tracked_quantile`, of every cell."""

    estimate: PyTree  # dtype of the magnitudes


def streaming_quantile(
    quantile: Number = 0.5,
    *,
    warmup: Number = 1,
    observe: Observe = "current",
    who: str = "bounds.streaming_quantile",
) -> Bound:
    """Makes the bound that is a quantile of all history, estimated by five numbers.

    The P2 algorithm: five markers, at the smallest, the largest, the quantile and half
    way, are moved along a parabola as their ranks fall behind. Exact up to five.

    Sees this update too and learns from what was measured. Release: it never forgets;
    `percentile` does.

    Args:
      quantile: share of magnitudes below the limit, in [0, 1].
      warmup: number of magnitudes a cell must have seen; inf until then.
      observe: "current": this update is seen too; "raw": the limit is of the past. What
        was measured is learned in either case.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `StreamingState`, of 11 numbers per cell.

    Raises:
      TypeError, ValueError: for `quantile` outside [0, 1], `warmup` < 0 and another
        `observe`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import bounds
      >>> bound = bounds.streaming_quantile(0.5)
      >>> state = bound.init(jnp.array(0.0))
      >>> for norm in (0.02, 0.15, 0.74, 3.39, 0.83, 22.37, 10.15, 15.43):
      ...     limits, learn = bound.limit(state, jnp.array(norm), None)
      ...     state = learn(limits)
      >>> print(limits.round(2))
      2.18

    References:
      Jain, Chlamtac, The P2 algorithm for dynamic calculation of quantiles and
      histograms without storing observations, 1985,
      https://doi.org/10.1145/4372.4378
    """
    check_that(
        quantile,
        f"{who}: quantile",
        "in [0, 1]",
        lambda q: 0 <= q <= 1,
        "Pass the share of updates that lie below the limit.",
    )
    check_count(warmup, f"{who}: warmup")
    check_observe(observe, who)

    def init(m):
        first = jnp.arange(1, 6, dtype=jnp.int32)
        return StreamingState(
            jnp.full((5, *m.shape), jnp.inf, m.dtype),
            jnp.broadcast_to(column(first, m.ndim), (5, *m.shape)),
            jnp.zeros(m.shape, jnp.int32),
        )

    def share(m):
        return jnp.clip(cast(quantile, m), 0, 1)

    def add(state, m):
        count = jnp.asarray(optax.safe_increment(state.count))
        first = replaced(state.heights, jnp.full_like(m, jnp.inf), m)
        heights, positions = _moved(state, m, count, share(m))
        few = state.count < 5
        return StreamingState(
            jnp.where(few[None], first, heights),
            jnp.where(few[None], state.positions, positions),
            count,
        )

    def limit(state, m):
        filled = jnp.minimum(state.count, 5)
        few = interpolated(state.heights, filled, share(m) * last_rank(filled, m))
        value = jnp.where(state.count <= 5, few, state.heights[2])
        return jnp.where(enough(state.count, warmup), value, jnp.inf)

    return learned(Statistic(StreamingState, init, add, limit), observe, who)


def tracked_quantile(
    quantile: Number = 0.5,
    *,
    rate: Number = 0.2,
    initial: Number = 0.1,
    step: Literal["geometric", "arithmetic"] = "geometric",
    who: str = "bounds.tracked_quantile",
) -> Bound:
    """Makes the bound that rises when a magnitude is above it and falls when below.

    With b = 1 where m <= c and else 0, the limit c becomes
    `c exp(-rate (b - quantile))` or, with arithmetic steps,
    `max(c - rate (b - quantile), 0)`: it comes to rest where that share of updates lies
    below.

    Sees the past, and learns from what was measured. Release: by the factor
    exp(rate * quantile) per update, a tenfold rise in 23 with the defaults; down by
    exp(-rate (1 - quantile)).

    Args:
      quantile: share of updates that is to lie below the limit, in (0, 1].
      rate: how fast it moves, > 0; dimensionless, or with arithmetic steps in the units
        of the magnitudes.
      initial: first limit, > 0, in the units of the magnitudes.
      step: "geometric" or "arithmetic".
      who: the function of the caller, for messages.

    Returns:
      A bound with a `TrackedState`, one number per cell.

    Raises:
      TypeError, ValueError: for `quantile` outside (0, 1], with 0 of which the limit
        could only fall, `rate` or `initial` that is not > 0 and finite, and another
        `step`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import bounds
      >>> bound = bounds.tracked_quantile(0.5, initial=1.0)
      >>> state = bound.init(jnp.array(0.0))
      >>> for norm in (5.0, 5.0, 0.1):
      ...     limits, learn = bound.limit(state, jnp.array(norm), None)
      ...     state = learn(limits)
      ...     print(f"{limits:.3f}")
      1.000
      1.105
      1.221

    References:
      Andrew et al., Differentially private learning with adaptive clipping, 2021,
      https://arxiv.org/abs/1905.03871; no noise is added here and nothing is private.
      Differs: inf is not counted as above the limit, but like NaN not at all.
    """
    check_that(
        quantile,
        f"{who}: quantile",
        "in (0, 1]",
        lambda q: 0 < q <= 1,
        "Pass the share of updates that is to lie below the limit.",
    )
    for name, value in (("rate", rate), ("initial", initial)):
        check_that(
            value,
            f"{who}: {name}",
            "> 0 and finite",
            lambda v: 0 < v < float("inf"),
            "Pass one above 0, from where it can move.",
        )
    check_choice(step, f"{who}: step", ("geometric", "arithmetic"))

    def init(m):
        return TrackedState(jnp.broadcast_to(_positive(initial, m.dtype), m.shape))

    def add(state, m):
        below = (m <= state.estimate).astype(m.dtype)
        most = jnp.finfo(m.dtype).max
        pace = jnp.clip(cast(rate, m), 0, most)
        move = pace * (jnp.clip(cast(quantile, m), 0, 1) - below)
        if step == "geometric":
            return TrackedState(_positive(state.estimate * jnp.exp(move), m.dtype))
        return TrackedState(jnp.clip(state.estimate + move, 0, most))

    statistic = Statistic(TrackedState, init, add, lambda state, m: state.estimate)
    return learned(statistic, "raw", who)


def _moved(
    state: StreamingState, m: jax.Array, count: jax.Array, quantile: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The five markers of P2 after one more magnitude."""
    some = state.count >= 5
    # Until there are five the markers are not finite, and what comes of them is unused.
    heights = [jnp.where(some, h, i) for i, h in enumerate(state.heights)]
    heights[0] = jnp.minimum(heights[0], m)
    heights[4] = jnp.maximum(heights[4], m)
    ranks = [
        n + (m < h).astype(n.dtype)
        for n, h in zip(state.positions, heights, strict=True)
    ]
    ranks[0], ranks[4] = state.positions[0], jnp.maximum(count, 6)
    shares = {1: quantile / 2, 2: quantile, 3: (1 + quantile) / 2}
    total = (count - 1).astype(m.dtype)
    for i, share in shares.items():
        lag = 1 + total * share - ranks[i].astype(m.dtype)
        up = (lag >= 1) & (ranks[i + 1] - ranks[i] > 1)
        down = (lag <= -1) & (ranks[i - 1] - ranks[i] < -1)
        sign = up.astype(jnp.int32) - down.astype(jnp.int32)
        above = _slope(heights, ranks, i, i + 1, m.dtype)
        below = _slope(heights, ranks, i - 1, i, m.dtype)
        signed = sign.astype(m.dtype)
        left = (ranks[i] - ranks[i - 1] + sign).astype(m.dtype)
        right = (ranks[i + 1] - ranks[i] - sign).astype(m.dtype)
        width = (ranks[i + 1] - ranks[i - 1]).astype(m.dtype)
        bent = heights[i] + signed / width * (left * above + right * below)
        straight = heights[i] + signed * jnp.where(sign > 0, above, below)
        fits = (heights[i - 1] < bent) & (bent < heights[i + 1])
        moved = jnp.where(fits, bent, straight)
        heights[i] = jnp.where(sign == 0, heights[i], moved)
        ranks[i] = ranks[i] + sign
    return jnp.stack(heights), jnp.stack(ranks)


def _slope(heights, ranks, i, j, dtype) -> jax.Array:
    return quotient(heights[j] - heights[i], (ranks[j] - ranks[i]).astype(dtype))


def _positive(value: Number, dtype: Any) -> jax.Array:
    """A finite number above 0, from which a factor always leads away."""
    info = jnp.finfo(dtype)
    return jnp.clip(jnp.asarray(value).astype(dtype), info.tiny, info.max)
