"""The named methods: each is one expression of scope, bound and shape.

What goes in and what comes out is the same for all of them:

| input | output |
|---|---|
| magnitude within its limit | the same bits |
| zeros | zeros, with finite derivatives |
| limit 0 | zeros |
| limit inf | the same bits, NaN and inf included |
| NaN or inf in a cell | the whole cell NaN, never a silent zero; other cells as ever |
| NaN or inf in an element or side cell | NaN stays, inf takes the limit |
| a Python limit that is negative, NaN, a bool, a string | refused at construction |
| a traced limit below 0; NaN | taken as 0; the updates become NaN |
| `None`, `MaskedNode`, integers, bools, float0, PRNG keys | pass through, not counted |

Their shared promises are those of `clip_by`. A Euclidean factor below 1e-38 (a norm
1e38 times its limit) is 0 in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _trees, bounds, norms, scopes, shapes
from optaxclip._checks import check_least_zero, check_number, negated
from optaxclip.clip import Clip, Shape, clip_by


def clip(max_delta: bounds.BoundLike) -> Clip:
    """Cuts every element to `[-max_delta, max_delta]`.

    `u -> sign(u) min(|u|, max_delta)`. Recipe: element x constant x hard.

    Turns the direction of the updates: use a norm to keep it. Inf becomes the limit,
    NaN stays. Complex elements keep their phase; without one, inf becomes NaN.

    Args:
      max_delta: largest modulus, in the units of the updates: a number, a schedule, a
        bound, or a pytree prefix of the updates.

    Returns:
      A transformation; without state for numbers.

    Raises:
      TypeError, ValueError: if `max_delta` is not a number >= 0, a schedule or a bound.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip(1.0)
      >>> print(tx.update(jnp.array([0.5, -3.0]), None)[0])
      [ 0.5 -1. ]

    References:
      Mikolov, Statistical language models based on neural networks, 2012. `optax.clip`,
      Keras' `clipvalue`, PyTorch's `clip_grad_value_`. Differs from optax: complex
      updates, dtypes are kept, and a negative limit is refused.
    """
    return clip_by(scopes.element(), bounds.of(max_delta, "clip: max_delta"))


def clip_by_value(min_value: bounds.BoundLike, max_value: bounds.BoundLike) -> Clip:
    """Cuts every element to `[min_value, max_value]`, a range that holds 0.

    `u -> min(max(u, min_value), max_value)`. Recipe: side x constant x hard.

    Args:
      min_value: lower end <= 0, in the units of the updates: a number or a schedule;
        a bound gives the distance of the lower end from 0.
      max_value: upper end >= 0: a number, a schedule or a bound.

    Returns:
      A transformation; without state for numbers.

    Raises:
      TypeError: if an end is not a number, a schedule or a bound; by `update`, for
        complex updates.
      ValueError: if the range does not hold 0.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_value(-1.0, 2.0)
      >>> print(tx.update(jnp.array([-3.0, 0.5, 3.0]), None)[0])
      [-1.   0.5  2. ]

    References:
      `tf.clip_by_value`, which also takes ranges without 0; those turn small updates
      round and are refused here.
    """
    if not isinstance(min_value, bounds.Bound):
        min_value = negated(min_value, "clip_by_value: min_value")
    ends = {
        "negative": bounds.of(min_value, "clip_by_value: min_value"),
        "positive": bounds.of(max_value, "clip_by_value: max_value"),
    }
    return clip_by(scopes.side(), ends)


def clip_by_block_rms(threshold: bounds.BoundLike) -> Clip:
    """Scales every array so that the root mean square of its elements is bounded.

    `scale = min(1, threshold / rms(u))` per array. Recipe: leaf (rms) x constant x
    hard.

    Args:
      threshold: largest RMS, in the units of the updates: a number, a schedule, a
        bound, or a pytree prefix of the updates.

    Returns:
      A transformation; without state for numbers.

    Raises:
      TypeError, ValueError: if `threshold` is not a number >= 0, a schedule or a bound.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_block_rms(1.0)
      >>> print(tx.update(jnp.array([1.0, 7.0]), None)[0])
      [0.2 1.4]

    References:
      Shazeer, Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, where it
      follows the scaling by the second moment. `optax.clip_by_block_rms`.
    """
    rule = bounds.of(threshold, "clip_by_block_rms: threshold")
    return clip_by(scopes.leaf("rms"), rule)


def clip_by_leaf_norm(
    max_norm: bounds.BoundLike, *, ord: float | str | None = None
) -> Clip:
    """Scales every array so that its norm is bounded.

    `scale = min(1, max_norm / |u|)` per array. Recipe: leaf x constant x hard.

    Args:
      max_norm: largest norm, in the units of the updates: a number, a schedule, a
        bound, or a pytree prefix of the updates, for instance a wider one for the
        output layer than for the hidden layers.
      ord: order of the norm: None or 2, 1, inf, any p > 0, "rms".

    Returns:
      A transformation; without state for numbers.

    Raises:
      TypeError, ValueError: if `max_norm` is not a number >= 0, a schedule or a bound,
        or `ord` is another; by `update`, if a leaf has no bound.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_leaf_norm({"hidden": 1.0, "output": 5.0})
      >>> updates = {"hidden": jnp.array([3.0, 4.0]), "output": jnp.array([3.0, 4.0])}
      >>> clipped, _ = tx.update(updates, None)
      >>> print(clipped["hidden"], clipped["output"])
      [0.6 0.8] [3. 4.]

    References:
      `tf.clip_by_norm`, Keras' `clipnorm`. Differs: an array within the bound is
      unchanged bit for bit.
    """
    rule = bounds.of(max_norm, "clip_by_leaf_norm: max_norm")
    ord = norms.check_ord(ord, "clip_by_leaf_norm")
    return clip_by(scopes.leaf(ord), rule)


def clip_by_unit_norm(
    max_norm: bounds.BoundLike, *, axis: Any = None, ord: float | str | None = None
) -> Clip:
    """Scales every unit, a slice that feeds one output, so that its norm is bounded.

    `scale = min(1, max_norm / |u|)` per unit. Recipe: unit x constant x hard.

    Args:
      max_norm: largest norm, in the units of the updates: a number, a schedule, a
        bound, or a pytree prefix of the updates.
      axis: the axes a unit spans; see `optaxclip.axes`, which has choices for Flax,
        Keras, Equinox and stacked layers.
      ord: order of the norm: None or 2, 1, inf, any p > 0, "rms".

    Returns:
      A transformation; without state for numbers.

    Raises:
      TypeError, ValueError: if `max_norm` is not a number >= 0, a schedule or a bound,
        or `ord` is another; by `update`, if axes are out of range.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_unit_norm(1.0)
      >>> print(tx.update(jnp.array([[3.0, 0.0], [4.0, 0.5]]), None)[0])
      [[0.6 0. ]
       [0.8 0.5]]

    References:
      `lasagne.updates.norm_constraint`, as a bound on the updates.
    """
    rule = bounds.of(max_norm, "clip_by_unit_norm: max_norm")
    ord = norms.check_ord(ord, "clip_by_unit_norm")
    return clip_by(scopes.unit(axis, ord), rule)


def clip_by_group_norm(
    max_norms: bounds.BoundLike, labels: Any, *, ord: float | str | None = None
) -> Clip:
    """Scales all leaves of one label together so that their common norm is bounded.

    `scale = min(1, max_norms[label] / |u_label|)` per label. Recipe: group x constant x
    hard.

    Args:
      max_norms: largest norms, in the units of the updates: a dict from label to
        number, schedule or bound; or one of these for every label.
      labels: pytree of labels, a prefix of the updates, or a callable that makes one of
        the updates, as for `optax.partition`.
      ord: order of the norm: None or 2, 1, inf, any p > 0, "rms".

    Returns:
      A transformation; without state for numbers.

    Raises:
      TypeError, ValueError: if a norm is not a number >= 0, a schedule or a bound, or
        `ord` is another; by `init` and `update`, if a leaf has no label or a label no
        norm.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> labels = {"cell": "recurrent", "head": "output"}
      >>> tx = optaxclip.clip_by_group_norm({"recurrent": 1.0, "output": 5.0}, labels)
      >>> updates = {"cell": [jnp.array([3.0]), jnp.array([4.0])], "head": jnp.ones(1)}
      >>> clipped, _ = tx.update(updates, tx.init(updates))
      >>> print(clipped["cell"][0], clipped["cell"][1], clipped["head"])
      [0.6] [0.8] [1.]

    References:
      PyTorch's `clip_grad_norm_` called once per parameter group.
    """
    rule = bounds.of(max_norms, "clip_by_group_norm: max_norms")
    ord = norms.check_ord(ord, "clip_by_group_norm")
    return clip_by(scopes.group(labels, ord), rule)


def clip_by_global_norm(
    max_norm: bounds.BoundLike,
    *,
    ord: float | str | None = None,
    shape: Shape | None = None,
    axis_name: Any = None,
) -> Clip:
    """Scales all updates by one factor so that their common norm is bounded.

    `scale = min(1, max_norm / |u|)`, `|u|` over every element of every leaf. Recipe:
    tree x constant x hard. Keeps the direction.

    Args:
      max_norm: largest norm, in the units of the updates: a number, a schedule or a
        bound.
      ord: order of the norm: None or 2, 1, inf, any p > 0, "rms".
      shape: what becomes of a larger norm; None is `shapes.hard`. Under
        `inject_hyperparams` name it in `static_args`, like every callable.
      axis_name: over which mesh axes leaves are split, where types do not tell; see
        `optaxclip.sharded`, which tells it to any other clip.

    Returns:
      A transformation; without state for a number. `update(..., norm=n)` uses a norm
      that is already known (of the order `ord`) and measures nothing; in a chain it
      reaches every clip by global norm.

    Raises:
      TypeError, ValueError: if `max_norm` is not a number >= 0, a schedule or a bound,
        or `ord` is another.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> updates = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0], jnp.bfloat16)}
      >>> tx = optaxclip.clip_by_global_norm(1.0)
      >>> clipped, _ = tx.update(updates, tx.init(updates))
      >>> print(clipped["w"], clipped["b"])
      [0.6 0. ] [0.800781]
      >>> print(tx.update(updates, None, norm=50.0)[0]["w"])
      [0.06 0.  ]

    References:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
      2013, https://arxiv.org/abs/1211.5063. `optax.clip_by_global_norm`, PyTorch's
      `clip_grad_norm_` (which divides by the norm plus 1e-6, and so shrinks a little
      more), `tf.clip_by_global_norm` (whose `use_norm` is `norm=` here). Differs from
      optax: the norm is summed in float32 or wider and neither overflows nor
      underflows, and inf does not turn its neighbours into zeros.
    """
    rule = bounds.of(max_norm, "clip_by_global_norm: max_norm")
    ord = norms.check_ord(ord, "clip_by_global_norm")
    shape = shapes.hard if shape is None else shape
    return clip_by(scopes.tree(ord), rule, shape, axis_name=axis_name)


def normalize_by_global_norm(scale: bounds.BoundLike = 1.0) -> Clip:
    """Scales all updates by one factor so that their common norm is `scale`.

    `u -> scale u / |u|`; zeros stay zeros. Recipe: tree x constant x normalize.

    Args:
      scale: the norm that comes out: a number, a schedule or a bound. inf leaves the
        updates as they are.

    Returns:
      A transformation; without state for a number. Takes `norm=` as
      `clip_by_global_norm` does.

    Raises:
      TypeError, ValueError: if `scale` is not a number >= 0, a schedule or a bound.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.normalize_by_global_norm()
      >>> print(tx.update(jnp.array([3e-20, 4e-20]), None)[0])
      [0.6 0.8]

    References:
      Cutkosky, Mehta, Momentum improves normalized SGD, 2020,
      https://arxiv.org/abs/2002.03305. `optax.normalize_by_update_norm`. Differs:
      nothing is added to the norm, so tiny updates are normalised too.
    """
    rule = bounds.of(scale, "normalize_by_global_norm: scale")
    return clip_by(scopes.tree(), rule, shapes.normalize)


def normalize_by_leaf_norm(scale: bounds.BoundLike = 1.0) -> Clip:
    """Scales every array so that its norm is `scale`.

    `u -> scale u / |u|` per array; zeros stay zeros. Recipe: leaf x constant x
    normalize.

    Args:
      scale: the norms that come out: a number, a schedule, a bound, or a pytree prefix
        of the updates. inf leaves an array as it is.

    Returns:
      A transformation; without state for numbers.

    Raises:
      TypeError, ValueError: if `scale` is not a number >= 0, a schedule or a bound.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.normalize_by_leaf_norm(5.0)
      >>> print(tx.update(jnp.array([0.3, 0.4]), None)[0])
      [3. 4.]

    References:
      Yu et al., Block-normalized gradient method, 2017,
      https://arxiv.org/abs/1707.04822
    """
    rule = bounds.of(scale, "normalize_by_leaf_norm: scale")
    return clip_by(scopes.leaf(), rule, shapes.normalize)


def adaptive_grad_clip(
    clipping: bounds.BoundLike, eps: jax.typing.ArrayLike = 1e-3, axis: Any = None
) -> Clip:
    """Scales every unit so that its norm is at most a share of its parameter's norm.

    `scale = min(1, clipping * max(|w|, eps) / |u|)` per unit. Recipe: unit x relative x
    hard.

    Args:
      clipping: largest ratio of update norm to parameter norm: a number, a schedule, a
        bound (of that ratio), or a pytree prefix of the updates.
      eps: smallest parameter norm assumed, so that zero-initialised units can move.
      axis: the axes a unit spans; see `optaxclip.axes`. None chooses by rank, as
        optax does. Static: under `inject_hyperparams` name it in `static_args`.

    Returns:
      A transformation; without state for numbers. Its `update` needs params.

    Raises:
      TypeError, ValueError: if `clipping` is not a number >= 0, a schedule or a bound;
        by `update`, if params are missing or do not match, or axes are out of range.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adaptive_grad_clip(0.1)
      >>> params = jnp.array([[3.0, 1.0], [4.0, 0.0]])
      >>> updates = jnp.array([[0.6, 0.0], [0.8, 0.05]])
      >>> print(tx.update(updates, tx.init(params), params)[0])
      [[0.3  0.  ]
       [0.4  0.05]]

    References:
      Brock et al., High-performance large-scale image recognition without
      normalization, 2021, https://arxiv.org/abs/2102.06171.
      `optax.adaptive_grad_clip`. Differs: `axis` may be given per leaf.
    """
    check_number(eps, "adaptive_grad_clip: eps")
    rule = bounds.relative(clipping, eps, "adaptive_grad_clip: clipping")
    return clip_by(scopes.unit(axis), rule)


def clip_by_trust_ratio(ratio: bounds.BoundLike = 1.0) -> Clip:
    """Scales every array so that its norm is at most a share of its parameter's norm.

    `scale = min(1, ratio * |w| / |u|)` per array; an array whose parameter is 0 is left
    as it is. Recipe: leaf x relative x hard.

    LAMBC is this after Adam, with 1; LARC is this before SGD, with
    `ratio = 0.02 / learning_rate`, or `lambda step: 0.02 / schedule(step)`.

    Args:
      ratio: largest ratio of update norm to parameter norm: a number, a schedule, a
        bound (of that ratio), or a pytree prefix of the updates.

    Returns:
      A transformation; without state for numbers. Its `update` needs params.

    Raises:
      TypeError, ValueError: if `ratio` is not a number >= 0, a schedule or a bound; by
        `update`, if params are missing or do not match.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_trust_ratio()
      >>> params = {"a": jnp.array([5.0]), "b": jnp.array([0.0])}
      >>> updates = {"a": jnp.array([9.0]), "b": jnp.array([9.0])}
      >>> clipped, _ = tx.update(updates, tx.init(params), params)
      >>> print(clipped["a"], clipped["b"])
      [5.] [9.]

    References:
      Fong et al., Improving layer-wise adaptive rate methods using trust ratio
      clipping, 2020, https://arxiv.org/abs/2011.13584; LARC of NVIDIA Apex, whose
      weight decay is not part of this.
    """
    rule = bounds.relative(ratio, None, "clip_by_trust_ratio: ratio")
    return clip_by(scopes.leaf(), rule)


def normalize_by_trust_ratio(ratio: bounds.BoundLike = 1.0) -> Clip:
    """Scales every array so that its norm is a share of its parameter's norm.

    `u -> u * ratio * |w| / |u|` per array, the layer-wise rate of LARS and LAMB; an
    array whose parameter is 0 is left as it is. Recipe: leaf x relative x normalize.

    LAMB is this after Adam, with 1; LARS is this before momentum, with 0.001.

    Args:
      ratio: ratio of update norm to parameter norm that comes out: a number, a
        schedule, a bound (of that ratio), or a pytree prefix of the updates.

    Returns:
      A transformation; without state for numbers. Its `update` needs params.

    Raises:
      TypeError, ValueError: if `ratio` is not a number >= 0, a schedule or a bound; by
        `update`, if params are missing or do not match.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.normalize_by_trust_ratio(0.5)
      >>> params = {"a": jnp.array([4.0]), "b": jnp.array([0.0])}
      >>> updates = {"a": jnp.array([0.1]), "b": jnp.array([9.0])}
      >>> scaled, _ = tx.update(updates, tx.init(params), params)
      >>> print(scaled["a"], scaled["b"])
      [2.] [9.]

    References:
      You, Gitman, Ginsburg, Large batch training of convolutional networks, 2017,
      https://arxiv.org/abs/1708.03888, whose denominator also has the weight decay; You
      et al., Large batch optimization for deep learning: training BERT in 76 minutes,
      2020, https://arxiv.org/abs/1904.00962. `optax.scale_by_trust_ratio`.
    """
    rule = bounds.relative(ratio, None, "normalize_by_trust_ratio: ratio")
    return clip_by(scopes.leaf(), rule, shapes.normalize)


def adopt_clip(exponent: jax.typing.ArrayLike = 0.25) -> Clip:
    """Cuts every element to a limit that grows with the number of updates.

    `u -> sign(u) min(|u|, t^exponent)` with t = 1 at the first update. Recipe: element
    x schedule x hard.

    Args:
      exponent: how fast the limit grows, >= 0.

    Returns:
      A transformation with a `bounds.ScheduleState`.

    Raises:
      TypeError, ValueError: for an exponent that is not a number >= 0.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adopt_clip(0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(4):
      ...     updates, state = tx.update(jnp.array([-9.0, 0.5]), state)
      >>> print(updates)
      [-2.   0.5]

    References:
      Taniguchi et al., ADOPT, 2024, https://arxiv.org/abs/2411.02853, on gradients over
      the root of their second moment. Implementations differ in where they start to
      count; as in the authors' the first update that is clipped has the limit 1.
    """
    check_least_zero(exponent, "adopt_clip: exponent")
    power = jnp.maximum(exponent, 0)
    rule = bounds.schedule(lambda step: (step.astype(float) + 1) ** power)
    return clip_by(scopes.element(), rule)


def unitwise_clip(
    g_norm: jax.typing.ArrayLike,
    max_norm: jax.typing.ArrayLike,
    grad: jax.typing.ArrayLike,
    div_eps: jax.typing.ArrayLike = 1e-6,
) -> jax.Array:
    """Scales an array whose norms are known, cell by cell.

    `where(g_norm <= max_norm, grad, grad * max_norm / max(g_norm, div_eps))`.

    Args:
      g_norm: norms, of the shape of `grad`, as `unitwise_norm` gives them.
      max_norm: largest norms, of the shape of `grad`.
      grad: the array.
      div_eps: smallest divisor.

    Returns:
      An array of the shape and dtype of `grad`; NaN where a norm is not finite, unless
      the largest norm is inf.

    Raises:
      ValueError: if the shapes differ.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> grad = jnp.array([3.0, 4.0])
      >>> print(optaxclip.unitwise_clip(jnp.full(2, 5.0), jnp.ones(2), grad))
      [0.6 0.8]

    References:
      optax.unitwise_clip. Differs: the dtype is kept and inf is not silent.
    """
    g_norm, max_norm, grad = (jnp.asarray(a) for a in (g_norm, max_norm, grad))
    if not g_norm.shape == max_norm.shape == grad.shape:
        raise ValueError(
            "unitwise_clip: g_norm, max_norm and grad must have one shape, got "
            f"{g_norm.shape}, {max_norm.shape} and {grad.shape}. Use unitwise_norm."
        )
    if not jnp.issubdtype(grad.dtype, jnp.inexact):
        grad = grad.astype(jnp.float32)
    real = _trees.widest(g_norm.dtype, grad.dtype)
    wide = _trees.widened(grad.dtype, real)
    g_norm = g_norm.astype(real)
    max_norm = jnp.maximum(max_norm.astype(real), 0)
    factor = max_norm / jnp.maximum(g_norm, jnp.asarray(div_eps, real))
    factor = jnp.where(jnp.isfinite(g_norm), factor, jnp.nan)
    within = (g_norm <= max_norm) | (max_norm == jnp.inf)
    return jnp.where(within, grad, (grad.astype(wide) * factor).astype(grad.dtype))
