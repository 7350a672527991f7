"""Bounds that are multiples of an average of what was seen, or of the last of it."""

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
    is_static_number,
)
from optaxclip._numerics import hypot, quotient
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


class MeanState(NamedTuple):
    """State of `mean` and `ema`, of every cell."""

    mean: PyTree  # dtype of the magnitudes
    count: PyTree  # magnitudes learned from; dtype=jnp.int32


class MeanOverRmsState(NamedTuple):
    """State of `mean_over_rms`, of every cell."""

    mean: PyTree  # debiased; dtype of the magnitudes
    rms: PyTree  # root of the debiased mean square; dtype of the magnitudes
    count: PyTree  # magnitudes learned from; dtype=jnp.int32


class GrowthState(NamedTuple):
    """State of `growth`, of every cell."""

    previous: PyTree  # last magnitude that was kept; 0 before the first


class SecondMomentState(NamedTuple):
    """State of `second_moment`, of every cell."""

    rms: PyTree  # root of the mean square; 0 before the first


def mean(
    ratio: Number = 1.0,
    *,
    warmup: Number = 1,
    observe: Observe = "raw",
    who: str = "bounds.mean",
) -> Bound:
    """Makes the bound that is a multiple of the mean of all history.

    `limit = ratio * mean`.

    Sees the past and learns from what was measured. Release: after t updates a lasting
    change of scale needs another t updates to move the mean half way; `ema` forgets.

    Args:
      ratio: multiple of the mean.
      warmup: number of magnitudes a cell must have seen; inf until then.
      observe: "raw": the limit is of the past; "current": this update is seen too.
        What was measured is learned in either case.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `MeanState`.

    Raises:
      TypeError, ValueError: for `ratio` < 0, `warmup` < 0 and another `observe`.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> tx = optaxclip.clip_by_global_norm(bounds.mean(2.0))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 100.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [2.]
      [4.]

    References:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
      2013, https://arxiv.org/abs/1211.5063, advise half to ten times the mean norm.
    """
    check_least_zero(ratio, f"{who}: ratio")
    check_count(warmup, f"{who}: warmup")
    check_observe(observe, who)
    statistic = Statistic(
        MeanState,
        _fresh_mean,
        lambda state, m: _drawn(state, m, 1 / one_more(state.count, m)),
        lambda state, m: _once(state.count, warmup, ratio, state.mean),
    )
    return learned(statistic, observe, who)


def ema(
    ratio: Number = 1.05,
    *,
    decay: Number = 0.98,
    warmup: Number = 1,
    start: Literal["mean", "min", "debiased", "zero"] = "mean",
    observe: Literal["kept", "raw", "current"] = "kept",
    who: str = "bounds.ema",
) -> Bound:
    """Makes the bound that is a multiple of an exponential moving average.

    `limit = ratio * e`, and then `e <- decay e + (1 - decay) m`.

    Sees the past and learns from what the clip kept. Release: then the limit grows at
    most by the factor 1 + (1 - decay)(ratio - 1) per update: with 1.05 and 0.98 it
    doubles in 693. Learning from what was measured, it follows within a few times
    1 / (1 - decay) updates.

    What is kept belongs with `shapes.hard`. A shape that shrinks what is within its
    limit pulls the average down with it, `rational` to a twentieth of the norms, and
    with `drop` and `reciprocal` it does not come back: learn what was measured there.

    Args:
      ratio: multiple of the average.
      decay: share of the average that is kept at every update, in [0, 1).
      warmup: number of magnitudes a cell must have seen; inf until then.
      start: "mean" or "min": the average starts as the mean or the smallest of the
        first `warmup` magnitudes; "debiased" or "zero": it starts at 0, and is divided
        by 1 - decay^t after t magnitudes, or is not.
      observe: "kept": the limit is of the past, and what the clip kept is learned;
        "raw": the same, but what was measured is learned; "current": this update is
        seen too.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `MeanState`.

    Raises:
      TypeError, ValueError: for `ratio` < 0, or <= 1 if what is kept is learned, which
        could only fall; for `decay` outside [0, 1), `warmup` < 0, other words, and
        "zero" with "kept", which would begin by cutting all to 1 - decay.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> tx = optaxclip.clip_by_global_norm(bounds.ema(2.0, decay=0.5))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 100.0, 100.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [2.]
      [3.]

    References:
      OLMo's clip at a ratio of the average (https://github.com/allenai/OLMo), and the
      sources of `adagc`, `adaclip` and `adanorm`.
    """
    check_choice(observe, f"{who}: observe", ("kept", "raw", "current"))
    if observe == "kept":
        _check_rises(ratio, f"{who}: ratio")
    else:
        check_least_zero(ratio, f"{who}: ratio")
    least = 1 if observe == "kept" else 0
    check_decay(decay, f"{who}: decay")
    check_count(warmup, f"{who}: warmup")
    starts = ("mean", "min", "debiased", *(() if observe == "kept" else ("zero",)))
    check_choice(start, f"{who}: start", starts)

    def add(state, m):
        rate = running_rate(decay, m)
        count = one_more(state.count, m)
        if start == "debiased":
            rate = _debiased_rate(decay, count)
        elif start == "mean":
            rate = jnp.where(enough(state.count, warmup), rate, 1 / count)
        drawn = _drawn(state, m, rate)
        if start != "min":
            return drawn
        smallest = jnp.where(state.count == 0, m, jnp.minimum(state.mean, m))
        ready = enough(state.count, warmup)
        return drawn._replace(mean=jnp.where(ready, drawn.mean, smallest))

    statistic = Statistic(
        MeanState,
        _fresh_mean,
        add,
        lambda state, m: _once(state.count, warmup, ratio, state.mean, least),
    )
    return learned(statistic, observe, who)


def growth(factor: Number = 1.01, *, who: str = "bounds.growth") -> Bound:
    """Makes the bound that lets a magnitude grow by a factor per update.

    `limit = factor * previous`, the last magnitude that was kept; the first is free.

    Sees the past and learns from what the clip kept. Release: by `factor` per update;
    with 1.01 a lasting tenfold rise takes 232.

    Args:
      factor: largest ratio of a magnitude to the one before, > 1.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `GrowthState`.

    Raises:
      TypeError, ValueError: for `factor` <= 1, which could only fall.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> tx = optaxclip.clip_by_global_norm(bounds.growth(1.5))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 0.0, 100.0, 100.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [2.]
      [0.]
      [3.]
      [4.5]

    References:
      Chen et al., Fira, 2024, https://arxiv.org/abs/2410.01623; Zhu et al., APOLLO,
      2024, https://arxiv.org/abs/2412.05270. Their code adds 1e-8 to `previous`.
    """
    _check_rises(factor, f"{who}: factor")
    statistic = Statistic(
        GrowthState,
        lambda m: GrowthState(jnp.zeros(m.shape, m.dtype)),
        lambda state, m: GrowthState(m),
        lambda state, m: _multiple(factor, state.previous, least=1),
    )
    return learned(statistic, "kept", who)


def mean_over_rms(
    mean_decay: Number = 0.7,
    *,
    rms_decay: Number = 0.9,
    eps: Number = 1e-8,
    who: str = "bounds.mean_over_rms",
) -> Bound:
    """Makes the bound that is near 1 while magnitudes are steady.

    `limit = a / (sqrt(b) + eps)` with the debiased running averages a of m and b of
    m^2, this update included. It has no unit: with `shapes.normalize` it removes the
    scale of the updates, so put it before what needs none, like Adam.

    At a spike it is near 1 too, and for some updates after one it is smaller, down to
    a fifth with the defaults, for the square remembers longer; in a rise it is larger,
    up to 1.3.

    Sees this update too, and learns from what was measured. Release: none is needed.

    Args:
      mean_decay: share of a that is kept at every update, in [0, 1).
      rms_decay: share of b that is kept at every update, in [0, 1).
      eps: added to the root mean square.
      who: the function of the caller, for messages.

    Returns:
      A bound with a `MeanOverRmsState`.

    Raises:
      TypeError, ValueError: for a decay outside [0, 1) and `eps` < 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import bounds
      >>> bound = bounds.mean_over_rms()
      >>> state = bound.init(jnp.array(0.0))
      >>> for norm in (1.0, 1.0, 100.0):
      ...     limits, learn = bound.limit(state, jnp.array(norm), None)
      ...     state = learn(limits)
      ...     print(f"{limits:.3f}")
      1.000
      1.000
      0.761

    References:
      AdaGN of Stable-SPAM: Huang et al., 2025, https://arxiv.org/abs/2502.17055
    """
    check_decay(mean_decay, f"{who}: mean_decay")
    check_decay(rms_decay, f"{who}: rms_decay")
    check_least_zero(eps, f"{who}: eps")

    def init(m):
        zeros = jnp.zeros(m.shape, m.dtype)
        return MeanOverRmsState(zeros, zeros, jnp.zeros(m.shape, jnp.int32))

    def add(state, m):
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = one_more(state.count, m)
        drawn = state.mean + _debiased_rate(mean_decay, steps) * (m - state.mean)
        rms = _rooted(state.rms, m, _debiased_rate(rms_decay, steps))
        return MeanOverRmsState(drawn, rms, count)

    def limit(state, m):
        ready = state.count > 0
        rms = jnp.where(ready, state.rms + jnp.maximum(cast(eps, m), 0), 1)
        return jnp.where(ready, quotient(state.mean, rms), jnp.inf)

    return learned(Statistic(MeanOverRmsState, init, add, limit), "current", who)


def second_moment(
    threshold: Number = 5000.0,
    *,
    decay: Number = 0.999,
    who: str = "bounds.second_moment",
) -> Bound:
    """Makes the bound that is a multiple of the running mean square.

    `limit = sqrt(threshold * v)`, and then `v <- decay v + (1 - decay) m^2`, from v = 0
    and without debiasing, as Adam keeps it. A cell that saw nothing yet has no limit.

    Made for the scope `element`, where its state is one copy of the updates. Sees the
    past and learns from what the clip kept. Release: by the factor
    sqrt(decay + (1 - decay) threshold) per update, 2.4 with the defaults.

    Args:
      threshold: largest square over the mean square, > 1.
      decay: share of the mean square that is kept at every update, in [0, 1).
      who: the function of the caller, for messages.

    Returns:
      A bound with a `SecondMomentState`.

    Raises:
      TypeError, ValueError: for `threshold` <= 1, with which the limit could only fall,
        and `decay` outside [0, 1).

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> tx = optaxclip.clip(bounds.second_moment(4.0, decay=0.75))
      >>> state = tx.init(jnp.zeros(2))
      >>> for value in (2.0, -8.0):
      ...     updates, state = tx.update(jnp.array([value, 0.0]), state)
      ...     print(updates)
      [2. 0.]
      [-2.  0.]

    References:
      SPAM: Huang et al., 2025, https://arxiv.org/abs/2501.06842
    """
    _check_rises(threshold, f"{who}: threshold")
    check_decay(decay, f"{who}: decay")

    def limit(state, m):
        return _multiple(jnp.sqrt(jnp.maximum(cast(threshold, m), 1)), state.rms)

    statistic = Statistic(
        SecondMomentState,
        lambda m: SecondMomentState(jnp.zeros(m.shape, m.dtype)),
        lambda state, m: SecondMomentState(
            _rooted(state.rms, m, running_rate(decay, m))
        ),
        limit,
    )
    return learned(statistic, "kept", who)


def _fresh_mean(m: Any) -> MeanState:
    return MeanState(jnp.zeros(m.shape, m.dtype), jnp.zeros(m.shape, jnp.int32))


def _drawn(state: MeanState, m: jax.Array, rate: jax.Array) -> MeanState:
    """The mean drawn towards m."""
    moved = state.mean + rate * (m - state.mean)
    return MeanState(moved, jnp.asarray(optax.safe_increment(state.count)))


def _rooted(rms: jax.Array, m: jax.Array, rate: jax.Array) -> jax.Array:
    """The root of the mean square drawn towards m^2, without squaring either."""
    rest = jnp.maximum(1 - rate, jnp.finfo(m.dtype).tiny)
    return hypot(jnp.sqrt(rest) * rms, jnp.sqrt(rate) * m)


def _once(
    count: jax.Array, warmup: Number, ratio: Number, value: jax.Array, least: float = 0
) -> jax.Array:
    """The multiple of a value that has seen enough; inf until then."""
    limit = _multiple(ratio, value, least)
    return jnp.where(enough(count, warmup), limit, jnp.inf)


def _multiple(ratio: Number, value: jax.Array, least: float = 0) -> jax.Array:
    """The multiple of a value; inf where it is 0, as it is before the first."""
    return jnp.where(value > 0, times(ratio, value, least), jnp.inf)


def running_rate(decay: Number, like: jax.Array) -> jax.Array:
    """The share 1 - decay of what is new, rounded once if decay is static."""
    if is_static_number(decay):
        return cast(1 - decay, like)
    return jnp.clip(1 - cast(decay, like), jnp.finfo(like.dtype).eps, 1)


def _debiased_rate(decay: Number, count: jax.Array) -> jax.Array:
    """The rate (1 - decay) / (1 - decay^t) that makes a running average unbiased."""
    rate = running_rate(decay, count)
    return rate / -jnp.expm1(count * jnp.log1p(-rate))


def _check_rises(value: Number, who: str) -> None:
    check_that(
        value,
        who,
        "> 1",
        lambda value: value > 1,
        "Pass a larger one: it learns what is kept, and could only fall.",
    )
