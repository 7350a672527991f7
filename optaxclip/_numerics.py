"""Arithmetic whose derivatives stay finite over the whole range of the dtype."""

import jax
import jax.numpy as jnp


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
    """Returns sqrt(a^2 + b^2) for a, b >= 0 without forming a square of either.

    The derivative is finite everywhere, (0, 0) included.
    """
    larger = jnp.maximum(a, b)
    ratio = quotient(jnp.minimum(a, b), jnp.where(larger > 0, larger, 1))
    return larger * jnp.sqrt(1 + ratio * ratio)
