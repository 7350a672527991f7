"""Bounds that are quantiles of the last magnitudes, which are kept in order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._checks import (
    check_count,
    check_least_zero,
    check_that,
    check_window,
)
from optaxclip.bounds._learned import (
    Number,
    Observe,
    Statistic,
    check_observe,
    enough,
    learned,
    times,
)
from optaxclip.bounds._rules import Bound, cast

PyTree = Any

# The standard deviation of a normal distribution over its median absolute deviation.
_NORMAL_MAD = 1.4826


class WindowState(NamedTuple):
    """State of `percentile` and `median_mad`, of every cell."""

    ring: PyTree  # the last magnitudes, by age; shape=(window, *cells)
    ordered: PyTree  # the same, ascending, inf where there is none yet
    count: PyTree  # magnitudes learned from; beyond the window modulo it; int32


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

    Sees this update too and learns from what was measured. Release: it follows a
    lasting rise after `window * (1 - percentile / 100)` updates, a lasting fall after
    `window * percentile / 100`.

    The window is kept in order, by one deletion and one insertion per update, not
    sorted. It takes 2 window + 1 numbers per cell; the scopes whose cells are elements
    refuse it.

    Args:
      percentile: in [0, 100].
      window: number of magnitudes that are remembered, >= 1. Static: under
        `inject_hyperparams` name it in `static_args`.
      warmup: number of magnitudes a cell must have seen, at most `window`; inf until
        then.
      observe: "current": this update is seen too; "raw": the limit is of the past. What
        was measured is learned in either case.
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
    window, warmup = _check_window(window, warmup, who)
    check_observe(observe, who)

    def limit(state, m):
        filled = jnp.minimum(state.count, window)
        rank = jnp.clip(cast(percentile, m), 0, 100) * last_rank(filled, m) / 100
        value = interpolated(state.ordered, filled, rank)
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

    Sees the past and learns from what was measured. Release: after `window / 2` updates
    of a lasting change of scale.

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
    check_least_zero(k, f"{who}: k")
    window, warmup = _check_window(window, warmup, who)
    check_observe(observe, who)

    def limit(state, m):
        filled = jnp.minimum(state.count, window)
        median = interpolated(state.ordered, filled, last_rank(filled, m) / 2)
        mad = _median_distance(state.ordered, filled, median)
        value = median + times(k, cast(_NORMAL_MAD, m) * mad)
        return jnp.where(enough(filled, warmup), value, jnp.inf)

    return learned(_windowed(window, limit), observe, who, window)


def _check_window(window: Any, warmup: Number, who: str) -> tuple[int, Number]:
    """Returns both, a traced warm-up at most the window."""
    size = check_window(window, f"{who}: window")
    check_count(warmup, f"{who}: warmup")
    if isinstance(warmup, jax.Array):
        return size, jnp.minimum(warmup, size)
    if warmup > size:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(
            f"{who}: warmup must be at most window={size}, got warmup={warmup!r}. "
            "Pass a smaller one: the limit would never be used."
        )
    return size, warmup


def _windowed(window: int, limit: Callable) -> Statistic:
    """The statistic of the last magnitudes."""

    def init(m):
        empty = jnp.full((window, *m.shape), jnp.inf, m.dtype)
        return WindowState(empty, empty, jnp.zeros(m.shape, jnp.int32))

    def add(state, m):
        here = column(jnp.arange(window), m.ndim) == (state.count % window)[None]
        oldest = jnp.sum(jnp.where(here, state.ring, 0), 0)
        after = state.count + 1
        return WindowState(
            jnp.where(here, m[None], state.ring),
            replaced(state.ordered, oldest, m),
            jnp.where(after == 2 * window, window, after),
        )

    return Statistic(WindowState, init, add, limit)


def _median_distance(
    ordered: jax.Array, filled: jax.Array, median: jax.Array
) -> jax.Array:
    """The median distance of the first values of an ascending array from a point.

    The h values nearest to the point are neighbours, so the h-th distance is the
    smallest over all runs of h neighbours of the larger distance at their two ends.
    """
    window = ordered.shape[0]
    starts = column(jnp.arange(window), filled.ndim)

    def distance(h):
        ends = jnp.minimum(starts + jnp.maximum(h - 1, 0)[None], window - 1)
        far = jnp.take_along_axis(ordered, jnp.broadcast_to(ends, ordered.shape), 0)
        widest = jnp.maximum(median[None] - ordered, far - median[None])
        fits = starts + h[None] <= filled[None]
        return jnp.min(jnp.where(fits, widest, jnp.inf), 0)

    value = (distance((filled + 1) // 2) + distance(filled // 2 + 1)) / 2
    return jnp.where(filled > 0, value, 0)


def replaced(ordered: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Deletes a value from an ascending array, and inserts another."""
    inf = jnp.asarray(jnp.inf, ordered.dtype)
    old, new = old[None], new[None]
    deleted = jnp.where(ordered < old, ordered, _shifted(ordered, -1, inf))
    before = _shifted(deleted, 1, -inf)
    return jnp.where(deleted <= new, deleted, jnp.maximum(before, new))


def _shifted(values: jax.Array, by: int, fill: jax.Array) -> jax.Array:
    return lax.pad(values, fill, [(by, -by, 0)] + [(0, 0, 0)] * (values.ndim - 1))


def last_rank(filled: jax.Array, like: jax.Array) -> jax.Array:
    """The rank, from 0, of the last of so many values."""
    return jnp.maximum(filled - 1, 0).astype(like.dtype)


def interpolated(ordered: jax.Array, filled: jax.Array, rank: jax.Array) -> jax.Array:
    """The value of a rank of an ascending array, between two of the first values."""
    last = jnp.maximum(filled - 1, 0)
    low = jnp.floor(rank)
    index = low.astype(jnp.int32)
    below = picked(ordered, index)
    above = picked(ordered, jnp.minimum(index + 1, last))
    some = filled > 0
    below, above = (jnp.where(some, value, 1) for value in (below, above))
    return jnp.where(some, below + (rank - low) * (above - below), jnp.inf)


def picked(values: jax.Array, index: jax.Array) -> jax.Array:
    """The value at an index of the first axis, for every cell its own."""
    return jnp.take_along_axis(values, index[None], 0, mode="clip")[0]


def column(values: jax.Array, ndim: int) -> jax.Array:
    """Values along a new first axis of an array of so many others."""
    return values.reshape(-1, *[1] * ndim)
