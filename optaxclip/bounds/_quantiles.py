"""Bounds that are quantiles of what was seen: in a window, or tracked by a few numbers.

| bound | state per cell | exact? | forgets? |
|---|---|---|---|
| `percentile` | 2 window + 1 numbers | yes | after `window` updates |
| `streaming_quantile` | 11 numbers | nearly | no |
| `tracked_quantile` | 1 number | on the average | within a few updates |
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optaxclip._checks import (
    check_choice,
    check_count,
    check_number,
    check_that,
    check_window,
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

PyTree = Any

# The standard deviation of a normal distribution over its median absolute deviation.
_NORMAL_MAD = 1.4826


class WindowState(NamedTuple):
    """State of `percentile` and `median_mad`, in the structure of the magnitudes."""

    ring: PyTree  # the last magnitudes, by age; shape=(window, *cells)
    ordered: PyTree  # the same, ascending, inf where there is none yet
    count: PyTree  # magnitudes learned from; beyond the window modulo it; int32


class StreamingState(NamedTuple):
    """State of `streaming_quantile`, in the structure of the magnitudes."""

    heights: PyTree  # the five markers, ascending; shape=(5, *cells)
    positions: PyTree  # their ranks, from 1; shape=(5, *cells), dtype=jnp.int32
    count: PyTree  # magnitudes learned from; dtype=jnp.int32


class TrackedState(NamedTuple):
    """State of `tracked_quantile`, in the structure of the magnitudes."""

    estimate: PyTree  # dtype of the magnitudes


def percentile(
    percentile: Number = 10.0,
    *,
    window: int = 1000,
    warmup: Number = 1,
    observe: Observe = "current",
    who: str = "bounds.percentile",
) -> Bound:
    """Makes the bound that is a percentile of the last magnitudes.

    Interpolates linearly, as `np.percentile` does. With 10, nine updates in ten are
    clipped, to the size of the smallest tenth.

    Sees and learns from: see `observe`. Release: after a lasting change of scale the
    limit follows once that share of the window is new: at once for a low percentile
    after a fall, `window * percentile / 100` updates later after a rise.

    The window is kept in order, by one deletion and one insertion per update, not
    sorted. It takes 2 window + 1 numbers per cell; the scopes whose cells are elements
    refuse it.

    Args:
      percentile: in [0, 100].
      window: number of magnitudes that are remembered, >= 1. Static: under
        `inject_hyperparams` name it in `static_args`.
      warmup: number of magnitudes a cell must have seen, at most `window`; inf until
        then.
      observe: "current": the limit sees this update too, and what was measured is
        learned; "raw": the limit is of the past, and what was measured is learned;
        "kept": the same, but what the clip kept is learned.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `WindowState`.

    Raises:
      TypeError, ValueError: for `percentile` outside [0, 100], a `window` that is
        traced or < 1, `warmup` < 0 or > `window`, and another `observe`.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> tx = optaxclip.clip_by_global_norm(bounds.percentile(50, window=3))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (4.0, 2.0, 100.0, 100.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [4.]
      [2.]
      [4.]
      [100.]

    References:
      Seetharaman et al., AutoClip, 2020, https://arxiv.org/abs/2007.14469, over all of
      history and with this update; Golub's AdaptiveGradNormClip, 2018, over a window of
      the past.
    """
    check_that(
        percentile,
        f"{who}: percentile",
        "in [0, 100]",
        lambda p: 0 <= p <= 100,
        "Pass the percentage of updates that lie below the limit.",
    )
    window = _check_window(window, warmup, who)
    check_observe(observe, who)

    def limit(state, m):
        filled = jnp.minimum(state.count, window)
        rank = jnp.clip(cast(percentile, m), 0, 100) * _last(filled, m) / 100
        value = _interpolated(state.ordered, filled, rank)
        return jnp.where(enough(filled, warmup), value, jnp.inf)

    return learned(_windowed(window, limit), observe, who, window)


def median_mad(
    k: Number = 3.0,
    *,
    window: int = 1000,
    warmup: Number = 25,
    observe: Observe = "raw",
    who: str = "bounds.median_mad",
) -> Bound:
    """Makes the bound `median + k * 1.4826 * MAD` of the last magnitudes.

    MAD is the median absolute deviation from the median; 1.4826 MAD is the standard
    deviation of a normal distribution. Half of the window may be spikes before the
    limit feels it.

    Sees and learns from: see `observe`. Release: `window / 2` updates after a lasting
    change of scale, then at once.

    Args:
      k: number of standard deviations.
      window: number of magnitudes that are remembered, >= 1; static.
      warmup: number of magnitudes a cell must have seen, at most `window`; inf until
        then.
      observe: as in `percentile`.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `WindowState`.

    Raises:
      TypeError, ValueError: for `k` < 0, a `window` that is traced or < 1, `warmup` < 0
        or > `window`, and another `observe`.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> bound = bounds.median_mad(1.0, window=5, warmup=5)
      >>> tx = optaxclip.clip_by_global_norm(bound)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 3.0, 4.0, 100.0, 9.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates)
      [4.4826]

    References:
      Hampel, The influence curve and its role in robust estimation, 1974.
    """
    check_number(k, f"{who}: k")
    window = _check_window(window, warmup, who)
    check_observe(observe, who)

    def limit(state, m):
        filled = jnp.minimum(state.count, window)
        median = _interpolated(state.ordered, filled, _last(filled, m) / 2)
        mad = _median_distance(state.ordered, filled, median)
        value = median + jnp.maximum(cast(k, m), 0) * cast(_NORMAL_MAD, m) * mad
        return jnp.where(enough(filled, warmup), value, jnp.inf)

    return learned(_windowed(window, limit), observe, who, window)


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

    Sees and learns from: see `observe`. Release: it never forgets; `percentile` does.

    Args:
      quantile: share of magnitudes below the limit, in [0, 1].
      warmup: number of magnitudes a cell must have seen; inf until then.
      observe: as in `percentile`.
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
            jnp.broadcast_to(_column(first, m.ndim), (5, *m.shape)),
            jnp.zeros(m.shape, jnp.int32),
        )

    def share(m):
        return jnp.clip(cast(quantile, m), 0, 1)

    def add(state, m):
        count = jnp.asarray(optax.safe_increment(state.count))
        first = _replaced(state.heights, jnp.full_like(m, jnp.inf), m)
        heights, positions = _moved(state, m, count, share(m))
        few = state.count < 5
        return StreamingState(
            jnp.where(few[None], first, heights),
            jnp.where(few[None], state.positions, positions),
            count,
        )

    def limit(state, m):
        filled = jnp.minimum(state.count, 5)
        few = _interpolated(state.heights, filled, share(m) * _last(filled, m))
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
      quantile: share of updates that is to lie below the limit, in [0, 1].
      rate: how fast it moves, > 0; dimensionless, or with arithmetic steps in the units
        of the magnitudes.
      initial: first limit, > 0, in the units of the magnitudes.
      step: "geometric" or "arithmetic".
      who: the function of the caller, for messages.

    Returns:
      A bound with a `TrackedState`, one number per cell.

    Raises:
      TypeError, ValueError: for `quantile` outside [0, 1], `rate` <= 0, `initial` <= 0
        and another `step`.

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
        "in [0, 1]",
        lambda q: 0 <= q <= 1,
        "Pass the share of updates that is to lie below the limit.",
    )
    for name, value in (("rate", rate), ("initial", initial)):
        check_that(
            value,
            f"{who}: {name}",
            "> 0",
            lambda v: v > 0,
            "Pass a larger one: with 0 the limit would never move.",
        )
    check_choice(step, f"{who}: step", ("geometric", "arithmetic"))

    def init(m):
        return TrackedState(jnp.broadcast_to(_positive(initial, m.dtype), m.shape))

    def add(state, m):
        below = (m <= state.estimate).astype(m.dtype)
        move = -cast(rate, m) * (below - jnp.clip(cast(quantile, m), 0, 1))
        if step == "geometric":
            return TrackedState(_positive(state.estimate * jnp.exp(move), m.dtype))
        return TrackedState(jnp.maximum(state.estimate + move, 0))

    statistic = Statistic(TrackedState, init, add, lambda state, m: state.estimate)
    return learned(statistic, "raw", who)


def _check_window(window: Any, warmup: Number, who: str) -> int:
    size = check_window(window, f"{who}: window")
    check_count(warmup, f"{who}: warmup")
    if isinstance(warmup, float | int) and warmup > size:
        raise ValueError(
            f"{who}: warmup must be at most window={size}, got warmup={warmup!r}. "
            "Pass a smaller one: the limit would never be used."
        )
    return size


def _windowed(window: int, limit: Any) -> Statistic:
    """The statistic of the last magnitudes."""

    def init(m):
        empty = jnp.full((window, *m.shape), jnp.inf, m.dtype)
        return WindowState(empty, empty, jnp.zeros(m.shape, jnp.int32))

    def add(state, m):
        here = _column(jnp.arange(window), m.ndim) == (state.count % window)[None]
        oldest = jnp.sum(jnp.where(here, state.ring, 0), 0)
        after = state.count + 1
        return WindowState(
            jnp.where(here, m[None], state.ring),
            _replaced(state.ordered, oldest, m),
            jnp.where(after == 2 * window, window, after),
        )

    return Statistic(WindowState, init, add, limit)


def _replaced(ordered: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Deletes a value from an ascending array, and inserts another."""
    inf = jnp.asarray(jnp.inf, ordered.dtype)
    old, new = old[None], new[None]
    deleted = jnp.where(ordered < old, ordered, _shifted(ordered, -1, inf))
    before = _shifted(deleted, 1, -inf)
    return jnp.where(deleted <= new, deleted, jnp.maximum(before, new))


def _shifted(values: jax.Array, by: int, fill: jax.Array) -> jax.Array:
    return lax.pad(values, fill, [(by, -by, 0)] + [(0, 0, 0)] * (values.ndim - 1))


def _last(filled: jax.Array, like: jax.Array) -> jax.Array:
    """The rank, from 0, of the last of so many values."""
    return jnp.maximum(filled - 1, 0).astype(like.dtype)


def _interpolated(ordered: jax.Array, filled: jax.Array, rank: jax.Array) -> jax.Array:
    """The value of a rank of an ascending array, between two of the first values."""
    last = jnp.maximum(filled - 1, 0)
    low = jnp.floor(rank)
    index = low.astype(jnp.int32)
    below = _picked(ordered, index)
    above = _picked(ordered, jnp.minimum(index + 1, last))
    some = filled > 0
    below, above = (jnp.where(some, value, 1) for value in (below, above))
    return jnp.where(some, below + (rank - low) * (above - below), jnp.inf)


def _median_distance(
    ordered: jax.Array, filled: jax.Array, median: jax.Array
) -> jax.Array:
    """The median distance of the first values of an ascending array from a point.

    The h values nearest to the point are neighbours, so the h-th distance is the
    smallest over all runs of h neighbours of the larger distance at their two ends.
    """
    window = ordered.shape[0]
    starts = _column(jnp.arange(window), filled.ndim)

    def distance(h):
        ends = jnp.minimum(starts + jnp.maximum(h - 1, 0)[None], window - 1)
        far = jnp.take_along_axis(ordered, jnp.broadcast_to(ends, ordered.shape), 0)
        widest = jnp.maximum(median[None] - ordered, far - median[None])
        fits = starts + h[None] <= filled[None]
        return jnp.min(jnp.where(fits, widest, jnp.inf), 0)

    value = (distance((filled + 1) // 2) + distance(filled // 2 + 1)) / 2
    return jnp.where(filled > 0, value, 0)


def _picked(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[None], 0, mode="clip")[0]


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
        n + ((m < h).astype(n.dtype) if i < 4 else 1)
        for i, (n, h) in enumerate(zip(state.positions, heights, strict=True))
    ]
    ranks[0] = state.positions[0]
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


def _column(values: jax.Array, ndim: int) -> jax.Array:
    return values.reshape(-1, *[1] * ndim)


def _positive(value: Number, dtype: Any) -> jax.Array:
    """A finite number above 0, from which a factor always leads away."""
    info = jnp.finfo(dtype)
    return jnp.clip(jnp.asarray(value).astype(dtype), info.tiny, info.max)
