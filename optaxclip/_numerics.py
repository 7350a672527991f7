"""Arithmetic whose derivatives stay finite over the whole range of the dtype."""

import jax
import jax.numpy as jnp
import optax


@jax.custom_jvp
def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a / b.

    The derivative `(da - (a / b) db) / b` never forms `b^-2`, which leaves float32 for
    b below 1e-19 and above 1e19.
    """
    return jnp.divide(a, b)


@quotient.defjvp
def _quotient_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    ratio = quotient(a, b)
    return ratio, quotient(da - ratio * db, b)


def hypot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns sqrt(a^2 + b^2) for a, b >= 0, right wherever it is representable.

    Very large and very small arguments are scaled by a power of two, exactly. There is
    no division, whose result XLA writes to memory before it is used twice. The
    derivative is finite everywhere, (0, 0) included.
    """
    digits = jnp.finfo(a.dtype).maxexp
    larger = jnp.maximum(a, b)
    large, small = larger > 2.0 ** (digits * 3 // 8), larger < 2.0 ** (-digits * 3 // 8)
    down, up = 2.0 ** (-digits * 5 // 8), 2.0 ** (digits * 5 // 8)
    scale = jnp.where(large, down, jnp.where(small, up, 1)).astype(a.dtype)
    back = jnp.where(large, up, jnp.where(small, down, 1)).astype(a.dtype)
    square = (a * scale) ** 2 + (b * scale) ** 2
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)) * back, 0)


def count_if(happened: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """The count, one more if something happened; it does not overflow."""
    return jnp.where(happened, optax.safe_increment(count), count)
