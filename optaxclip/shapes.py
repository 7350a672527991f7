"""What becomes of a magnitude that meets its limit.

A shape is a pure function `(magnitude, limit) -> new magnitude` on arrays that
broadcast, both >= 0. It never sees a tree. All are continuous but `drop`, and all obey

* a magnitude of 0 stays 0, and NaN in either argument gives NaN;
* the new magnitude of inf is what larger and larger magnitudes tend to;
* an infinite limit never reaches a shape: `clip_by` leaves such a cell as it is.

| shape | new magnitude of m at limit c | at m = c | m to infinity |
|---|---|---|---|
| `hard` | min(m, c) | c | c |
| `rational` | m c / (m + c) | c / 2 | c |
| `sqrt` | m / sqrt(1 + (m / c)^2) | 0.707 c | c |
| `tanh` | c tanh(m / c) | 0.762 c | c |
| `normalize` | c | c | c |
| `drop` | m if m <= c else 0 | c | 0 |
| `floor` | max(m, c) | c | m |
| `reciprocal` | m if m <= c else c^2 / m | c | 0 |
"""

import jax
import jax.numpy as jnp

from optaxclip._numerics import quotient


def hard(magnitude: jax.Array, limit: jax.Array) -> jax.Array:
    """Cuts a magnitude at its limit: `min(m, c)`.

    Args:
      magnitude: m >= 0.
      limit: c >= 0, broadcasts to m.

    Returns:
      The new magnitude; m itself, bit for bit, where m <= c.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import shapes
      >>> print(shapes.hard(jnp.array([0.5, 1.0, 8.0]), 1.0))
      [0.5 1.  1. ]

    References:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
      2013, https://arxiv.org/abs/1211.5063
    """
    return jnp.minimum(magnitude, limit)


def rational(magnitude: jax.Array, limit: jax.Array) -> jax.Array:
    """Shrinks every magnitude smoothly towards its limit: `m c / (m + c)`.

    The factor is `c / (c + m)`: 1 for small m, 1/2 at the limit. Within a factor 2 of
    `hard` everywhere.

    Args:
      magnitude: m >= 0.
      limit: c >= 0, broadcasts to m.

    Returns:
      The new magnitude, below c.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import shapes
      >>> print(shapes.rational(jnp.array([0.0, 1.0, 3.0]), 1.0))
      [0.   0.5  0.75]

    References:
      Zhang, He, Sra, Jadbabaie, Why gradient clipping accelerates training, 2020,
      https://arxiv.org/abs/1905.11881
    """
    smaller, ratio = _ordered(magnitude, limit)
    return quotient(smaller, 1 + ratio)


def sqrt(magnitude: jax.Array, limit: jax.Array) -> jax.Array:
    """Shrinks every magnitude smoothly, as the sides of a right triangle.

    `m / sqrt(1 + (m / c)^2)`.

    Args:
      magnitude: m >= 0.
      limit: c >= 0, broadcasts to m.

    Returns:
      The new magnitude, at most c.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import shapes
      >>> print(shapes.sqrt(jnp.array([0.0, 0.75, 2.4]), 1.0).round(3))
      [0.    0.6   0.923]

    References:
      The shape of SPECTRA's soft spectral clipping: Jiang, Semenov, Stich, 2026,
      https://arxiv.org/abs/2603.14315
    """
    smaller, ratio = _ordered(magnitude, limit)
    return smaller / jnp.sqrt(1 + ratio * ratio)


def tanh(magnitude: jax.Array, limit: jax.Array) -> jax.Array:
    """Shrinks every magnitude smoothly, the small ones hardly.

    `c tanh(m / c)`.

    Args:
      magnitude: m >= 0.
      limit: c >= 0, broadcasts to m.

    Returns:
      The new magnitude, at most c; m itself where the difference is below one ulp.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import shapes
      >>> print(shapes.tanh(jnp.array([0.0, 1.0, 9.0]), 1.0).round(4))
      [0.     0.7616 1.    ]
    """
    positive = jnp.where(limit > 0, limit, jnp.ones_like(limit))
    tiny = jnp.finfo(jnp.result_type(magnitude)).eps ** 0.5
    # Beyond 30 limits tanh is 1 to the last bit, and the quotient may not exist.
    bent = limit * jnp.tanh(quotient(jnp.minimum(magnitude, 30 * positive), positive))
    return jnp.where(magnitude < limit * tiny, magnitude, bent)


def normalize(magnitude: jax.Array, limit: jax.Array) -> jax.Array:
    """Gives every magnitude but 0 the size of its limit: c.

    With the `element` scope this is sign descent, with `tree` normalised descent. Where
    m is c to the bit, the updates pass as they are and so does their derivative.

    Args:
      magnitude: m >= 0.
      limit: c >= 0, broadcasts to m.

    Returns:
      c where m > 0, else m.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import shapes
      >>> print(shapes.normalize(jnp.array([0.0, 0.1, 8.0]), 1.0))
      [0. 1. 1.]
    """
    return jnp.where(magnitude > 0, limit, magnitude + 0 * limit)


def drop(magnitude: jax.Array, limit: jax.Array) -> jax.Array:
    """Lets a magnitude through up to its limit and removes it beyond: `m [m <= c]`.

    This zeroes updates; it does not skip a step, for an optimizer downstream still
    decays its moments. A cell of several elements that is NaN or inf is not dropped but
    stays loud: NaN. So does a NaN element; an inf element is beyond any limit, and is.

    Args:
      magnitude: m >= 0.
      limit: c >= 0, broadcasts to m.

    Returns:
      m where m <= c, 0 where m > c.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import shapes
      >>> print(shapes.drop(jnp.array([0.5, 1.0, 8.0]), 1.0))
      [0.5 1.  0. ]
    """
    beyond = jnp.where(magnitude > limit, 0, jnp.nan).astype(magnitude.dtype)
    return jnp.where(magnitude <= limit, magnitude, beyond)


def floor(magnitude: jax.Array, limit: jax.Array) -> jax.Array:
    """Raises a small magnitude to its limit: `max(m, c)`. Not a clip but its mirror.

    Args:
      magnitude: m >= 0.
      limit: c >= 0, broadcasts to m.

    Returns:
      The new magnitude; 0 stays 0, for it has no direction to be raised in.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import shapes
      >>> print(shapes.floor(jnp.array([0.0, 0.1, 8.0]), 1.0))
      [0. 1. 8.]

    References:
      AdaNorm: Dubey, Singh, Chaudhuri, 2022, https://arxiv.org/abs/2210.06364
    """
    return jnp.where(
        magnitude > 0, jnp.maximum(magnitude, limit), magnitude + 0 * limit
    )


def reciprocal(
    magnitude: jax.Array, limit: jax.Array, centre: jax.typing.ArrayLike = 0.0
) -> jax.Array:
    """Shrinks a magnitude the more, the further it is beyond its limit.

    `a + (c - a)^2 / (m - a)` beyond c, with the centre a: it falls from c back to a.

    Args:
      magnitude: m >= 0.
      limit: c >= 0, broadcasts to m.
      centre: a in [0, c], what huge magnitudes become.

    Returns:
      m where m <= c, else the value above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import shapes
      >>> print(shapes.reciprocal(jnp.array([0.5, 1.0, 4.0]), 1.0))
      [0.5  1.   0.25]

    References:
      ZClip: Kumar et al., 2025, https://arxiv.org/abs/2504.02507, where a is the mean
      of the norms and c - a a multiple of their standard deviation.
    """
    room = limit - centre
    excess = jnp.where(magnitude > limit, magnitude - centre, jnp.ones_like(magnitude))
    fallen = centre + room * quotient(room, excess)
    fallen = jnp.where(magnitude > limit, fallen, jnp.nan).astype(magnitude.dtype)
    return jnp.where(magnitude <= limit, magnitude, fallen)


def _ordered(magnitude: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the smaller of both and its ratio to the larger, 0 if both are 0."""
    smaller = jnp.minimum(magnitude, limit)
    larger = jnp.maximum(magnitude, limit)
    return smaller, quotient(smaller, jnp.where(larger > 0, larger, 1))
