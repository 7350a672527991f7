"""Bounds that are so many standard deviations above a mean."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._checks import (
    check_choice,
    check_count,
    check_decay,
    check_least_zero,
    check_that,
)
from optaxclip._numerics import hypot, quotient
from optaxclip.bounds._averages import running_rate
from optaxclip.bounds._learned import (
    Number,
    Observe,
    Statistic,
    check_observe,
    enough,
    learned,
    one_more,
    times,
)
from optaxclip.bounds._rules import Bound, cast

PyTree = Any


class SpreadState(NamedTuple):
    """State of `deviation` and `zscore`, of every cell."""

    mean: PyTree  # dtype of the magnitudes
    deviation: PyTree  # root of the population variance; dtype of the magnitudes
    count: PyTree  # magnitudes learned from; dtype=jnp.int32


def deviation(
    k: Number = 3.0,
    *,
    warmup: Number = 25,
    observe: Observe = "raw",
    who: str = "bounds.deviation",
) -> Bound:
    """Makes the bound that is a multiple of the standard deviation of all history.

    `limit = k * std`, of the sample (n - 1). Add it to a centre:
    `plus(streaming_quantile(0.5), deviation(3.0))`.

    Sees the past and learns from what was measured. Release: as `mean`.

    Args:
      k: multiple of the deviation.
      warmup: number of magnitudes a cell must have seen; inf until then.
      observe: "raw": the limit is of the past; "current": this update is seen too.
        What was measured is learned in either case.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `SpreadState`.

    Raises:
      TypeError, ValueError: for `k` < 0, `warmup` < 0 and another `observe`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import bounds
      >>> bound = bounds.deviation(3.0, warmup=2)
      >>> state = bound.init(jnp.array(0.0))
      >>> for norm in (1.0, 3.0):
      ...     _, learn = bound.limit(state, jnp.array(norm), None)
      ...     state = learn(jnp.array(norm))
      >>> print(bound.limit(state, jnp.array(9.0), None)[0].round(3))
      4.243
    """
    return _of_all_history(
        lambda state, m: times(k, _sample_deviation(state, m)),
        k,
        warmup,
        observe,
        who,
    )


def mean_std(
    k: Number = 3.0,
    *,
    warmup: Number = 25,
    observe: Observe = "raw",
    who: str = "bounds.mean_std",
) -> Bound:
    """Makes the bound `mean + k * std` of all history.

    `zscore` is its counterpart that forgets.

    Sees the past and learns from what was measured. Release: as `mean`; a spike widens
    the deviation for about as many updates as came before it.

    Args:
      k: number of standard deviations, of the sample (n - 1).
      warmup: number of magnitudes a cell must have seen; inf until then.
      observe: "raw": the limit is of the past; "current": this update is seen too.
        What was measured is learned in either case.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `SpreadState`.

    Raises:
      TypeError, ValueError: for `k` < 0, `warmup` < 0 and another `observe`.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> tx = optaxclip.clip_by_global_norm(bounds.mean_std(3.0, warmup=2))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 100.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [3.]
      [6.24...]
    """
    return _of_all_history(
        lambda state, m: state.mean + times(k, _sample_deviation(state, m)),
        k,
        warmup,
        observe,
        who,
    )


def zscore(
    z: Number = 2.5,
    *,
    decay: Number = 0.97,
    warmup: Number = 25,
    eps: Number = 1e-6,
    beyond: Literal["reciprocal", "limit", "mean"] = "reciprocal",
    who: str = "bounds.zscore",
) -> Bound:
    """Makes the bound that cuts what is more than z deviations above the mean.

    A magnitude m is a spike if `m > mean + z (std + eps)`. Its limit is

    | `beyond` | limit of a spike |
    |---|---|
    | "reciprocal" | `mean + z std * z (std + eps) / (m - mean)`: the larger, the closer to the mean |
    | "limit" | `mean + z (std + eps)` |
    | "mean" | `mean` |

    Over the first `warmup` magnitudes mean and deviation (of the population) are plain,
    then `mean <- decay mean + (1 - decay) x` and
    `var <- decay var + (1 - decay) (x - mean)^2` with the new mean.

    Sees the past. Learns from x: a spike counts as its limit, whatever the clip as a
    whole kept. Release: with "limit" and z > 1 / decay a lasting change of scale is
    followed: the deviation grows by sqrt(decay + (1 - decay) decay^2 z^2) per update, by
    7 % with the defaults. With a smaller z it shrinks instead; and with "mean" a spike
    counts as the mean, with "reciprocal" nearly so, and after a lasting jump, in the
    latter case by more than about z^2 deviations, *the limit never follows*: that of
    `tracked_quantile`, `percentile` and `ema` does.

    Args:
      z: number of deviations, > 0.
      decay: share of the averages that is kept at every update, in [0, 1).
      warmup: number of magnitudes a cell must have seen, at least 2; inf until then.
      eps: added to the deviation when a spike is judged, in the units of the
        magnitudes.
      beyond: the limit of a spike.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `SpreadState`.

    Raises:
      TypeError, ValueError: for `z` <= 0, `decay` outside [0, 1), `warmup` < 0, `eps` <
        0 and another `beyond`.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> tx = optaxclip.clip_by_global_norm(bounds.zscore(2.0, warmup=2))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 3.9, 6.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [3.]
      [3.9]
      [3.14...]

    References:
      Kumar et al., ZClip, 2025, https://arxiv.org/abs/2504.02507 and its code, which has
      the three kinds of limit. Differs: the factor is `limit / m`, not
      `limit / (m + 1e-6)`; "limit" has no `eps` there, so that a deviation of exactly 0
      would never grow; `clip_factor` and `skip_update_on_spike` are left out.
    """  # noqa: E501
    check_that(
        z,
        f"{who}: z",
        "> 0",
        lambda z: z > 0,
        "Pass the number of standard deviations above the mean that is a spike, such "
        "as 2.5.",
    )
    check_decay(decay, f"{who}: decay")
    check_count(warmup, f"{who}: warmup")
    check_least_zero(eps, f"{who}: eps")
    check_choice(beyond, f"{who}: beyond", ("reciprocal", "limit", "mean"))

    def add(state, m):
        plain = _spread(state, m, 1 / one_more(state.count, m), exact=True)
        running = _spread(state, m, running_rate(decay, m), exact=False)
        starting = ~enough(state.count, warmup, least=2)
        choose = lambda a, b: jnp.where(starting, a, b)
        return jax.tree.map(choose, plain, running)

    def limit(state, m):
        least = jnp.maximum(cast(eps, m), 0)
        room, raised = times(z, state.deviation), times(z, state.deviation + least)
        most = state.mean + raised
        excess = jnp.where(m > most, m - state.mean, 1)
        cut = {
            "reciprocal": state.mean + room * quotient(raised, excess),
            "limit": most,
            "mean": state.mean,
        }[beyond]
        ready = enough(state.count, warmup, least=2)
        return jnp.where(ready, jnp.where(m > most, cut, most), jnp.inf)

    statistic = Statistic(SpreadState, _fresh_spread, add, limit)
    return learned(statistic, "limited", who)


def _of_all_history(
    limit: Callable[[SpreadState, jax.Array], jax.Array],
    k: Number,
    warmup: Number,
    observe: Observe,
    who: str,
) -> Bound:
    """A bound of the mean and deviation of everything, of which 2 are needed."""
    check_least_zero(k, f"{who}: k")
    check_count(warmup, f"{who}: warmup")
    check_observe(observe, who)

    def add(state, m):
        return _spread(state, m, 1 / one_more(state.count, m), exact=True)

    def once(state, m):
        ready = enough(state.count, warmup, least=2)
        return jnp.where(ready, limit(state, m), jnp.inf)

    return learned(Statistic(SpreadState, _fresh_spread, add, once), observe, who)


def _fresh_spread(m: Any) -> SpreadState:
    zeros = jnp.zeros(m.shape, m.dtype)
    return SpreadState(zeros, zeros, jnp.zeros(m.shape, jnp.int32))


def _spread(state: SpreadState, m: jax.Array, rate: jax.Array, *, exact: bool):
    """Mean and deviation drawn towards m.

    With s the deviation and d = |m - mean|, the exact variance of the weighted values
    is `(1 - rate) s^2 + rate (1 - rate) d^2`; with the distance from the new mean only,
    the last term is `rate (1 - rate)^2 d^2`.
    """
    rest = jnp.maximum(1 - rate, jnp.finfo(m.dtype).tiny)
    weight = jnp.sqrt(rate * rest) if exact else jnp.sqrt(rate) * rest
    distance = jnp.abs(m - state.mean)
    return SpreadState(
        state.mean + rate * (m - state.mean),
        hypot(jnp.sqrt(rest) * state.deviation, weight * distance),
        jnp.asarray(optax.safe_increment(state.count)),
    )


def _sample_deviation(state: SpreadState, m: jax.Array) -> jax.Array:
    count = jnp.maximum(state.count, 2).astype(m.dtype)
    return state.deviation * jnp.sqrt(count / (count - 1))
