"""Methods of the same purpose that are not scope x bound x shape.

`clippy` acts on whole arrays but measures every element against its parameter;
`acclip` bounds a momentum by what it learns from the gradient; `scale_by_stable_adam`
measures the gradient and scales the update of Adam.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _mesh, _trees, norms
from optaxclip._checks import check_decay, check_least_zero, check_that
from optaxclip._numerics import quotient
from optaxclip.bounds._rules import refuse_no_state

PyTree = Any
Number = jax.typing.ArrayLike


def clippy(
    ratio: Number = 0.5, *, absolute: Number = 1e-2, axis_name: _mesh.AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales every array so that no element moves its parameter too far.

    `scale = min(1, min_i (ratio |w_i| + absolute) / |u_i|)` per array. It keeps the
    direction of the array, where `clip(bounds.relative(ratio))` would turn it. Put it
    last, behind the learning rate: it bounds the step.

    With `absolute` near 0, a single weight at 0 stops its whole array.

    Args:
      ratio: largest share of its parameter that an element may move, >= 0.
      absolute: what it may move beside that, >= 0, in the units of the params.
      axis_name: over which mesh axes leaves are split; see `optaxclip.sharded`.

    Returns:
      A transformation without state. Its `update` needs params. An array with a NaN or
      inf becomes NaN, unless an argument is inf, which leaves all as it is.

    Raises:
      TypeError, ValueError: for arguments that are not numbers >= 0; by `update`, if
        params are missing or do not match.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clippy(0.5, absolute=0.0)
      >>> params, updates = jnp.array([4.0, 1.0]), jnp.array([4.0, -2.0])
      >>> print(tx.update(updates, tx.init(params), params)[0])
      [ 1.  -0.5]

    References:
      Tang et al., Improving training stability for multitask ranking models in
      recommender systems, 2023, https://arxiv.org/abs/2302.09178. The code of
      TensorFlow Recommenders has 0.1 and 1e-7 and is part of an Adagrad.
    """
    check_least_zero(ratio, "clippy: ratio")
    check_least_zero(absolute, "clippy: absolute")
    axis_name = _mesh.check_axis_name(axis_name, "clippy")

    def update(updates, state, params=None, **extra_args):
        del extra_args
        part = _trees.counted(_mesh.aligned(updates, params, "clippy"))
        own = part.values(_trees.align(params, updates, "clippy"))
        over = _mesh.layout(part, axis_name, "clippy")
        each, count = range(len(part.arrays)), len(part.arrays)
        pairs = list(zip(part.arrays, map(jnp.asarray, own), strict=True))
        shares = [_share_of_reach(u, w, ratio, absolute) for u, w in pairs]
        farthest = norms.measure(shares, over, each, count, math.inf)
        largest = norms.measure(part.arrays, over, each, count, math.inf)
        free = jnp.maximum(ratio, absolute) == jnp.inf
        new = [
            _slowed(*sizes, free)
            for sizes in zip(part.arrays, farthest, largest, strict=True)
        ]
        return part.replace(new), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


class AcclipState(NamedTuple):
    """State of `acclip`, in the structure of the updates, float32 or wider."""

    momentum: PyTree
    level: PyTree  # running power mean of the moduli


def acclip(
    alpha: Number = 1.0,
    *,
    momentum_decay: Number = 0.9,
    decay: Number = 0.99,
    eps: Number = 1e-5,
) -> optax.GradientTransformationExtraArgs:
    """Turns updates into a momentum whose elements are cut at their usual size.

    `m <- momentum_decay m + (1 - momentum_decay) u`,
    `level^alpha <- decay level^alpha + (1 - decay) |u|^alpha`, both from 0, and then
    `m min(1, level / (|m| + eps))`, element by element. Not put before an optimizer, as
    a clip is, but one itself: follow it by the learning rate.

    An element that is NaN or inf comes out NaN and leaves no trace in the state; an
    exact 0 enters the momentum but not the level.

    Args:
      alpha: power of the mean, > 0; the heavier the tails, the smaller.
      momentum_decay: share of the momentum that is kept at every update, in [0, 1).
      decay: share of the level that is kept at every update, in [0, 1).
      eps: added to the modulus of the momentum, in the units of the updates.

    Returns:
      A transformation with an `AcclipState`, two copies of the updates.

    Raises:
      TypeError, ValueError: for `alpha` <= 0, a decay outside [0, 1) and `eps` < 0.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.acclip(momentum_decay=0.5, decay=0.75, eps=0.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([4.0, -1.0]), state)
      >>> print(updates)
      [ 1.   -0.25]

    References:
      Zhang et al., Why are adaptive methods good for attention models?, 2020,
      https://arxiv.org/abs/1912.03194, with alpha = 1; its code has had 1 and 2.
    """
    check_that(
        alpha,
        "acclip: alpha",
        "> 0",
        lambda alpha: alpha > 0,
        "Pass the power of the mean, such as 1.",
    )
    check_decay(momentum_decay, "acclip: momentum_decay")
    check_decay(decay, "acclip: decay")
    check_least_zero(eps, "acclip: eps")

    def wide(params):
        part = _trees.counted(params)
        real = [_trees.widest(p.dtype) for p in part.arrays]
        pairs = list(zip(part.arrays, real))
        return AcclipState(
            momentum=part.cells(
                [p.astype(_trees.widened(p.dtype, r)) for p, r in pairs]
            ),
            level=part.cells([jnp.abs(p).astype(r) for p, r in pairs]),
        )

    def init(params):
        # Only shapes are wanted.
        described = jax.eval_shape(wide, params)
        return jax.tree.map(lambda like: _mesh.full(like, 0), described)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        refuse_no_state(state, "acclip: its level")
        part = _trees.counted(_mesh.aligned(updates, None, "acclip"))
        try:
            cells = zip(
                part.arrays, part.values(state.momentum), part.values(state.level)
            )
        except ValueError:
            where = _trees.first_difference(state.level, updates, "state", "update")
            raise ValueError(
                f"acclip: updates must have the leaves that init saw, {where}. Pass "
                "the state that tx.init made of these params."
            ) from None
        new = [_cut_momentum(*c, alpha, momentum_decay, decay, eps) for c in cells]
        out, momentum, level = zip(*new) if new else ((), (), ())
        return part.replace(out), AcclipState(
            momentum=part.placed(momentum, state.momentum),
            level=part.placed(level, state.level),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_stable_adam(
    b1: Number = 0.9,
    b2: Number = 0.99,
    eps: Number = 1e-8,
    *,
    axis_name: _mesh.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates by Adam, and every array down when its gradient surprises Adam.

    With v the debiased second moment, this update included, `optax.scale_by_adam` times
    `1 / max(1, RMS)`, where `RMS = sqrt(mean(u^2 / max(v, eps^2)))` per array.

    It is Adam, that of optax: an element that is NaN or inf stays in its moments, and
    one whose square leaves the range of its dtype is lost. Put `zero_nonfinite` and a
    clip in front.

    Args:
      b1: share of the first moment that is kept at every update.
      b2: share of the second moment that is kept at every update.
      eps: added to the root of the second moment.
      axis_name: over which mesh axes leaves are split; see `optaxclip.sharded`.

    Returns:
      A transformation with the state of `optax.scale_by_adam`.

    Raises:
      TypeError, ValueError: for `b1` or `b2` outside [0, 1) and `eps` < 0.

    Examples:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> stable, adam = optaxclip.scale_by_stable_adam(), optax.scale_by_adam(b2=0.99)
      >>> states = [tx.init(jnp.zeros(1)) for tx in (stable, adam)]
      >>> for value in (1.0, 1.0, 1.0, 100.0):
      ...     updates, states[0] = stable.update(jnp.array([value]), states[0])
      ...     plain, states[1] = adam.update(jnp.array([value]), states[1])
      >>> print(updates.round(3), plain.round(3))
      [0.298] [0.591]

    References:
      Wortsman et al., Stable and low-precision training for large-scale vision-language
      models, 2023, https://arxiv.org/abs/2304.13013, StableAdamW. Differs: the factor
      does not scale a decoupled weight decay, which follows separately in a chain.
    """
    check_decay(b1, "scale_by_stable_adam: b1")
    check_decay(b2, "scale_by_stable_adam: b2")
    check_least_zero(eps, "scale_by_stable_adam: eps")
    axis_name = _mesh.check_axis_name(axis_name, "scale_by_stable_adam")
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        updates = _mesh.aligned(updates, params, "scale_by_stable_adam")
        found: tuple[PyTree, Any] = adam.update(updates, state, params)
        scaled, state = found
        squares = optax.tree.bias_correction(state.nu, b2, state.count)
        part = _trees.counted(updates)
        surprise = []
        for u, v in zip(part.arrays, part.values(squares), strict=True):
            real = _trees.widest(u.dtype)
            usual = jnp.sqrt(jnp.abs(v).astype(real))
            usual = jnp.maximum(usual, jnp.asarray(eps).astype(real))
            usual = jnp.where(usual == 0, 1, usual)
            surprise.append(quotient(jnp.abs(u).astype(real), usual))
        over = _mesh.layout(part, axis_name, "scale_by_stable_adam")
        each, count = range(len(surprise)), len(surprise)
        sizes = norms.measure(surprise, over, each, count, "rms")
        calmed = [
            (s / jnp.maximum(size, 1).astype(s.dtype)).astype(u.dtype)
            for u, s, size in zip(part.arrays, part.values(scaled), sizes, strict=True)
        ]
        return part.placed(calmed, scaled), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _share_of_reach(
    u: jax.Array, w: jax.Array, ratio: Number, absolute: Number
) -> jax.Array:
    """How far every element moves its parameter, as a share of how far it may."""
    real = _trees.widest(u.dtype, w.dtype)
    ratio, absolute = (
        jnp.clip(jnp.asarray(x).astype(real), 0, jnp.finfo(real).max)
        for x in (ratio, absolute)
    )
    modulus = jnp.abs(u).astype(real)
    reach = ratio * jnp.abs(w).astype(real) + absolute
    share = quotient(modulus, jnp.where(reach == 0, 1, reach))
    return jnp.where((reach == 0) & (modulus > 0), jnp.inf, share)


def _slowed(
    u: jax.Array, farthest: jax.Array, largest: jax.Array, free: jax.Array
) -> jax.Array:
    factor = quotient(jnp.ones_like(farthest), jnp.maximum(farthest, 1))
    factor = jnp.where(jnp.isfinite(largest), factor, jnp.nan)
    dtype = _trees.widened(u.dtype, farthest.dtype)
    scaled = (u.astype(dtype) * factor.astype(dtype)).astype(u.dtype)
    return jnp.where(free | (factor == 1), u, scaled)


def _cut_momentum(u, momentum, level, alpha, momentum_decay, decay, eps):
    """What comes out for one array, its momentum and its level."""
    modulus = jnp.abs(u).astype(level.dtype)
    used = jnp.isfinite(modulus)
    # What is smaller is flushed to 0 in a kernel.
    known = used & (modulus >= jnp.finfo(modulus.dtype).tiny)
    moved = _mixed(
        momentum, jnp.where(used, u, 0).astype(momentum.dtype), momentum_decay
    )
    momentum = jnp.where(used, moved, momentum)
    grown = _power_mean(level, jnp.where(known, modulus, 1), alpha, decay)
    level = jnp.where(known, grown, level)
    size = jnp.abs(momentum)
    total = size + jnp.asarray(eps).astype(size.dtype)
    factor = jnp.minimum(quotient(level, jnp.where(total > 0, total, 1)), 1)
    out = momentum * factor.astype(momentum.dtype)
    return jnp.where(used, out, jnp.nan).astype(u.dtype), momentum, level


def _mixed(old: jax.Array, new: jax.Array, decay: Number) -> jax.Array:
    kept = jnp.clip(jnp.asarray(decay).astype(jnp.abs(old).dtype), 0, 1)
    kept = kept.astype(old.dtype)
    return kept * old + (1 - kept) * new


def _power_mean(old: jax.Array, new: jax.Array, alpha: Number, decay: Number):
    """`(decay old^alpha + (1 - decay) new^alpha)^(1 / alpha)` in any range; new > 0."""
    alpha = jnp.maximum(jnp.asarray(alpha).astype(old.dtype), jnp.finfo(old.dtype).eps)
    larger = jnp.maximum(old, new)
    share = quotient(old, larger)
    power = jnp.where(share > 0, jnp.where(share > 0, share, 1) ** alpha, 0)
    mixed = _mixed(power, quotient(new, larger) ** alpha, decay)
    return larger * mixed ** (1 / alpha)
