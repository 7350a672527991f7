"""The named methods whose bound learns from the history of training.

Each is one expression of scope, bound and shape, with the defaults of its reference.
The same bound may be put in any other scope: `clip_by_leaf_norm(bounds.percentile(10))`
is AutoClip array by array.

The table of input and output in `optaxclip.recipes` holds here too. Beyond it: an
update whose magnitude is NaN, inf or exactly 0 is not learned from, so that nothing
is poisoned or locked; a factor is `limit / norm`, where references divide by the norm
plus 1e-6 or so; and states are as `optaxclip.bounds` lists them.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from optaxclip import bounds, scopes, shapes
from optaxclip._checks import check_count
from optaxclip.clip import Clip, clip_by

Number = jax.typing.ArrayLike


def autoclip(percentile: Number = 10.0, *, window: int = 1000) -> Clip:
    """Scales all updates so that their norm is at most a percentile of all norms.

    `scale = min(1, P / |u|)` with the percentile P of the last norms, this one
    included. Recipe: tree x percentile x hard.

    Sees this update too and learns from what was measured. Release: it follows a
    lasting rise after `window * (1 - percentile / 100)` updates.

    Args:
      percentile: in [0, 100]: 10 clips nine updates in ten.
      window: number of norms that are remembered, >= 1; static.

    Returns:
      A clip with a `bounds.WindowState`.

    Raises:
      TypeError, ValueError: as `bounds.percentile` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.autoclip(50)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 5.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [3.]

    References:
      Seetharaman et al., AutoClip: adaptive gradient clipping for source separation
      networks, 2020, https://arxiv.org/abs/2007.14469, which keeps all of history. (Its
      TensorFlow version scales every variable by the global percentile.)
    """
    bound = bounds.percentile(percentile, window=window, who="autoclip")
    return clip_by(scopes.tree(), bound)


def percentile_clip(percentile: Number = 95.0, *, window: int = 128) -> Clip:
    """Scales all updates so that their norm is at most a percentile of earlier norms.

    `scale = min(1, P / |u|)` with the percentile P of the last norms, without this one,
    so that a spike cannot raise its own limit. Recipe: tree x percentile x hard.

    Sees the past and learns from what was measured. Release: as `autoclip`.

    Args:
      percentile: in [0, 100].
      window: number of norms that are remembered, >= 1; static.

    Returns:
      A clip with a `bounds.WindowState`.

    Raises:
      TypeError, ValueError: as `bounds.percentile` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.percentile_clip()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 5.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [1.]

    References:
      Golub, AdaptiveGradNormClip, 2018, https://github.com/mattgolub/recurrent-whisperer
    """
    bound = bounds.percentile(
        percentile, window=window, observe="raw", who="percentile_clip"
    )
    return clip_by(scopes.tree(), bound)


def quantile_clip(
    quantile: Number = 0.5,
    *,
    rate: Number = 0.2,
    initial: Number = 0.1,
    step: Literal["geometric", "arithmetic"] = "geometric",
) -> Clip:
    """Scales all updates so that their norm is at most a quantile that is tracked.

    `scale = min(1, c / |u|)`; then `c <- c exp(-rate ([|u| <= c] - quantile))`. One
    number of state. Recipe: tree x tracked_quantile x hard.

    Sees the past and learns from what was measured. Release: by the factor
    exp(rate * quantile) per update, a tenfold rise in 23.

    Args:
      quantile: share of updates that is to lie below the limit, in (0, 1].
      rate: how fast the limit moves, > 0.
      initial: first limit, > 0, in the units of the updates.
      step: "geometric", or "arithmetic", which adds `-rate ([|u| <= c] - quantile)`.

    Returns:
      A clip with a `bounds.TrackedState`.

    Raises:
      TypeError, ValueError: as `bounds.tracked_quantile` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.quantile_clip(initial=1.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (5.0, 5.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates.round(3))
      [1.]
      [1.105]

    References:
      Andrew et al., Differentially private learning with adaptive clipping, 2021,
      https://arxiv.org/abs/1905.03871, there per example and with noise.
    """
    bound = bounds.tracked_quantile(
        quantile, rate=rate, initial=initial, step=step, who="quantile_clip"
    )
    return clip_by(scopes.tree(), bound)


def zclip(
    z: Number = 2.5,
    *,
    decay: Number = 0.97,
    warmup: Number = 25,
    max_norm: bounds.BoundLike = 1.0,
    eps: Number = 1e-6,
    beyond: Literal["reciprocal", "limit", "mean"] = "reciprocal",
) -> Clip:
    """Scales all updates so that their norm is no outlier by its z-score.

    With running mean and deviation of the norms, n is an outlier if
    `n > mean + z (std + eps)`. It becomes `mean + z std * z (std + eps) / (n - mean)`,
    so the larger it is, the closer to the mean; and at most `max_norm` in any case.
    Recipe: tree x at_most(zscore, max_norm) x hard.

    Sees the past and learns from what was measured, an outlier as what it becomes.
    Release: after a lasting jump of the norms by more than about z^2 deviations *the
    limit never follows* with "reciprocal", nor after a smaller one with "mean": so the
    published rule is. With "limit" it does, and so do `autoclip` and `quantile_clip`.

    Args:
      z: number of deviations, > 0.
      decay: share of the averages that is kept at every update, in [0, 1).
      warmup: number of norms the averages start from; until then `max_norm` alone.
      max_norm: largest norm at any time: a number, a schedule or a bound; inf for none.
      eps: added to the deviation when an outlier is judged, in the units of the
        updates: norms far below it have no outliers.
      beyond: "reciprocal", as above; "limit": an outlier becomes `mean + z std`, called
        percentile by the authors; "mean": it becomes the mean.

    Returns:
      A clip with a `bounds.SpreadState` and the state of `max_norm`.

    Raises:
      TypeError, ValueError: as `bounds.zscore` does, and for a bad `max_norm`.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.zclip(2.0, warmup=2, max_norm=10.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 3.9, 6.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates.round(2))
      [1.]
      [3.]
      [3.9]
      [3.14]

    References:
      Kumar et al., ZClip: adaptive spike mitigation for LLM pre-training, 2025,
      https://arxiv.org/abs/2504.02507. Differs as `bounds.zscore` does.
    """
    most = bounds.of(max_norm, "zclip: max_norm")
    learned = bounds.zscore(
        z, decay=decay, warmup=warmup, eps=eps, beyond=beyond, who="zclip"
    )
    return clip_by(scopes.tree(), bounds.at_most(learned, most))


def mean_clip(ratio: Number, *, warmup: Number = 1) -> Clip:
    """Scales all updates so that their norm is at most a multiple of the mean norm.

    `scale = min(1, ratio * mean / |u|)` over all earlier norms. Recipe: tree x mean x
    hard.

    Sees the past and learns from what was measured. Release: it never forgets; after t
    updates a rise needs another t to move the mean half way.

    Args:
      ratio: multiple of the mean, >= 0; the paper advises half to ten times.
      warmup: number of norms before anything is clipped.

    Returns:
      A clip with a `bounds.MeanState`.

    Raises:
      TypeError, ValueError: as `bounds.mean` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.mean_clip(2.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 5.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [2.]

    References:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
      2013, https://arxiv.org/abs/1211.5063, take a fixed multiple of the mean of a run.
    """
    bound = bounds.mean(ratio, warmup=warmup, who="mean_clip")
    return clip_by(scopes.tree(), bound)


def median_clip(k: Number = 3.0, *, warmup: Number = 100) -> Clip:
    """Scales all updates so that their norm is at most median + k deviations of all.

    `scale = min(1, (median + k std) / |u|)` over all norms, this one included; the
    median is estimated by five numbers. Recipe: tree x plus(streaming_quantile,
    deviation) x hard.

    Sees this update too and learns from what was measured. Release: it never forgets,
    but a rise widens the deviation at once.

    Args:
      k: number of standard deviations, >= 0.
      warmup: number of norms, this one included, before anything is clipped.

    Returns:
      A clip with a `bounds.StreamingState` and a `bounds.SpreadState`.

    Raises:
      TypeError, ValueError: as `bounds.deviation` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.median_clip(1.0, warmup=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 9.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates.round(2))
      [1.]
      [2.]
      [6.36]

    References:
      The AutoClip of https://pypi.org/project/smartclip, by its documentation.
    """
    spread = bounds.deviation(k, warmup=warmup, observe="current", who="median_clip")
    return clip_by(scopes.tree(), bounds.plus(bounds.streaming_quantile(), spread))


def ema_clip(ratio: Number, *, decay: Number = 0.95) -> Clip:
    """Scales every array so that its norm is at most a multiple of its running mean.

    `scale = min(1, ratio * e / |u|)` per array, then
    `e <- decay e + (1 - decay) scale |u|`; e starts as the first norm. Recipe: leaf x
    ema x hard.

    Sees the past and learns from what it kept. Release: by at most the factor
    1 + (1 - decay)(ratio - 1) per update.

    Args:
      ratio: multiple of the running mean, > 1.
      decay: share of the mean that is kept at every update, in [0, 1).

    Returns:
      A clip with a `bounds.MeanState`.

    Raises:
      TypeError, ValueError: as `bounds.ema` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.ema_clip(2.0, decay=0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 5.0, 5.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [2.]
      [3.]

    References:
      OLMo, https://github.com/allenai/OLMo, `olmo/optim.py`, where the decay is the
      larger beta of the optimizer. Differs: there the mean starts as the second norm.
    """
    bound = bounds.ema(ratio, decay=decay, who="ema_clip")
    return clip_by(scopes.leaf(), bound)


def adagc(
    ratio: Number = 1.05,
    *,
    decay: Number = 0.98,
    warmup: Number = 100,
    max_norm: bounds.BoundLike = 1.0,
) -> Clip:
    """Scales every array so that its norm hardly exceeds its running mean.

    For `warmup` updates all arrays are scaled together to a common norm of at most
    `max_norm`, and e is the smallest norm of an array that comes out of that. Then
    `scale = min(1, ratio * e / |u|)` per array, and
    `e <- decay e + (1 - decay) scale |u|`. Recipe: leaf x phases(jointly, ema) x hard.

    Sees the past and learns from what it kept. Release: the limit doubles in 693
    updates at the earliest with the defaults. An array without gradients at first has
    its warm-up later.

    Args:
      ratio: multiple of the running mean, > 1.
      decay: share of the mean that is kept at every update, in [0, 1).
      warmup: number of updates of the first kind.
      max_norm: largest common norm in the warm-up: a number, a schedule or a bound.

    Returns:
      A clip with the state of `max_norm` and a `bounds.MeanState`.

    Raises:
      TypeError, ValueError: as `bounds.ema` does, and for a bad `max_norm`.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adagc(2.0, warmup=1, decay=0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (5.0, 5.0, 5.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [2.]
      [3.]

    References:
      Wang et al., AdaGC: improving training stability for large language model
      pretraining, 2025, https://arxiv.org/abs/2502.11034. Releases differ: ratio and
      decay are 1.05 and 0.98 in pytorch_optimizer, followed here, and 1.03 or 1.04 and
      0.98 or 0.99 in Paddle, whose minimum is of unclipped norms; the warm-up is of 99
      and 101 updates there.
    """
    together = bounds.jointly(max_norm, "adagc: max_norm")
    learned = bounds.ema(ratio, decay=decay, warmup=warmup, start="min", who="adagc")
    return clip_by(scopes.leaf(), bounds.phases(together, learned))


def norm_growth_clip(factor: Number = 1.01) -> Clip:
    """Scales every array so that its norm grows by at most a factor per update.

    `scale = min(1, factor * previous / |u|)` per array, with the norm that came out of
    the update before; the first is free. Recipe: leaf x growth x hard.

    Sees the past and learns from what it kept. Release: by `factor` per update.

    Args:
      factor: largest growth, > 1.

    Returns:
      A clip with a `bounds.GrowthState`.

    Raises:
      TypeError, ValueError: as `bounds.growth` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.norm_growth_clip(1.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 100.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [2.]
      [3.]

    References:
      The norm-growth limiter of Fira: Chen et al., 2024,
      https://arxiv.org/abs/2410.01623, APOLLO: Zhu et al., 2024,
      https://arxiv.org/abs/2412.05270 and Alice: Gong et al., 2025,
      https://arxiv.org/abs/2502.07752, there on what the optimizer makes of the
      gradient. As in Alice nothing is added to the norm before.
    """
    return clip_by(scopes.leaf(), bounds.growth(factor, who="norm_growth_clip"))


def adagn(
    mean_decay: Number = 0.7, *, rms_decay: Number = 0.9, eps: Number = 1e-8
) -> Clip:
    """Gives every array the norm a / sqrt(b): 1 while steady, smaller after a spike.

    `u -> u / |u| * a / (sqrt(b) + eps)` per array, with the debiased running averages a
    of the norm and b of its square. Recipe: leaf x mean_over_rms x normalize.

    The scale of the updates is lost: use it before an optimizer that needs none, like
    Adam, and after `adaclip` if both are used. Sees this update too and learns from
    what was measured.

    Args:
      mean_decay: share of a that is kept at every update, in [0, 1).
      rms_decay: share of b that is kept at every update, in [0, 1).
      eps: added to the root mean square, in the units of the updates.

    Returns:
      A clip with a `bounds.MeanOverRmsState`.

    Raises:
      TypeError, ValueError: as `bounds.mean_over_rms` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adagn()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (5.0, 5.0, 500.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates.round(3))
      [1.]
      [1.]
      [0.761]

    References:
      AdaGN of Stable-SPAM: Huang et al., Stable-SPAM: how to train in 4-bit more stably
      than 16-bit Adam, 2025, https://arxiv.org/abs/2502.17055
    """
    bound = bounds.mean_over_rms(mean_decay, rms_decay=rms_decay, eps=eps, who="adagn")
    return clip_by(scopes.leaf(), bound, shapes.normalize)


def adaclip(decay: Number = 0.999, *, rescale: bool = True) -> Clip:
    """Cuts the elements of every array beyond its running mean of largest elements.

    With M the largest modulus of the array and e its debiased running mean, this update
    included, elements beyond e are multiplied by e / M. Recipe: peak x ema x hard.

    Not monotone: at M = 100 and e = 1 an element of 1.1 becomes 0.011, while one of 1
    stays. `rescale=False` cuts them to e instead. Sees this update too and learns from
    what was measured. Release: half way in 693 updates with the default.

    Args:
      decay: share of the mean that is kept at every update, in [0, 1).
      rescale: whether elements beyond keep their proportions, as in the paper.

    Returns:
      A clip with a `bounds.MeanState`.

    Raises:
      TypeError, ValueError: as `bounds.ema` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adaclip(0.5)
      >>> state = tx.init(jnp.zeros(3))
      >>> for updates in (jnp.array([1.0, 0.5, 0.0]), jnp.array([7.0, 6.3, 1.0])):
      ...     updates, state = tx.update(updates, state)
      ...     print(updates)
      [1.  0.5 0. ]
      [5.  4.5 1. ]

    References:
      AdaClip of Stable-SPAM: Huang et al., 2025, https://arxiv.org/abs/2502.17055.
      Differs: the average has its own count, where that of the code is reset with the
      moments of its optimizer, which switches its clip off for a while.
    """
    bound = bounds.ema(
        1.0, decay=decay, start="debiased", observe="current", who="adaclip"
    )
    return clip_by(scopes.peak(rescale), bound)


def spam_clip(
    threshold: Number = 5000.0, *, decay: Number = 0.999, warmup: Number = 19
) -> Clip:
    """Cuts every element whose square is so many times its running mean square.

    `u -> sign(u) min(|u|, sqrt(threshold * v))`, then `v <- decay v + (1 - decay) u^2`
    with the u that was cut, as Adam keeps v. Recipe: element x at_least(schedule,
    second_moment) x hard.

    Sees the past and learns from what it kept. Release: by a factor of 2.4 per update
    with the defaults.

    Args:
      threshold: largest square over the mean square, > 1.
      decay: share of the mean square that is kept at every update, in [0, 1).
      warmup: number of updates, damaged ones included, before anything is cut; the
        twentieth is the first.

    Returns:
      A clip with a `bounds.ScheduleState` and a `bounds.SecondMomentState`, one copy of
      the updates.

    Raises:
      TypeError, ValueError: as `bounds.second_moment` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.spam_clip(4.0, decay=0.75, warmup=1)
      >>> state = tx.init(jnp.zeros(2))
      >>> for updates in (jnp.array([2.0, 2.0]), jnp.array([-8.0, 1.0])):
      ...     updates, state = tx.update(updates, state)
      ...     print(updates)
      [2. 2.]
      [-2.  1.]

    References:
      Huang et al., SPAM: spike-aware Adam with momentum reset for stable LLM training,
      2025, https://arxiv.org/abs/2501.06842. Differs: it has its own v, it is not reset
      (there every so many steps, with Adam's), and an element that was always 0 is free
      at first, where there it is cut to 0.
    """
    check_count(warmup, "spam_clip: warmup")
    learned = bounds.second_moment(threshold, decay=decay, who="spam_clip")
    free = bounds.schedule(
        lambda step: jnp.where(step.astype(float) < warmup, jnp.inf, 0.0)
    )
    return clip_by(scopes.element(), bounds.at_least(free, learned))


def adanorm(decay: Number = 0.95) -> Clip:
    """Raises the norm of every array to its running mean. Not a clip but its mirror.

    `u -> u max(1, e / |u|)` per array, with `e <- decay e + (1 - decay) |u|` from 0,
    this update included. Recipe: leaf x ema x floor. Learns from what was measured.

    Args:
      decay: share of the mean that is kept at every update, in [0, 1).

    Returns:
      A transformation with a `bounds.MeanState`.

    Raises:
      TypeError, ValueError: as `bounds.ema` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adanorm(0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (8.0, 1.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [8.]
      [2.5]

    References:
      Dubey, Singh, Chaudhuri, AdaNorm: adaptive gradient norm correction based
      optimizer for CNNs, 2022, https://arxiv.org/abs/2210.06364, which gives what comes
      out to the first moment of Adam only.
    """
    bound = bounds.ema(1.0, decay=decay, start="zero", observe="current", who="adanorm")
    return clip_by(scopes.leaf(), bound, shapes.floor)
