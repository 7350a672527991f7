"""Around a clip: what to do about updates that are not finite."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental import checkify

from optaxclip import _mesh, _trees


class ZeroNonfiniteState(NamedTuple):
    """State of `zero_nonfinite`."""

    zeroed: jax.Array  # elements replaced in the last update; shape=(), int32
    total: jax.Array  # elements replaced so far, at most 2^31 - 1; shape=(), int32


def zero_nonfinite(
    *, axis_name: _mesh.AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces every NaN and inf element by 0, and counts them.

    `u -> u if isfinite(u) else 0`. Put it before a clip to go on with the finite part
    of a damaged gradient: the norm is then that of what is left.

    A complex element is replaced if either part is not finite. Leaves that are not
    floating point pass through.

    Args:
      axis_name: over which mesh axes leaves are split; see `optaxclip.sharded`. The
        counts are those of all devices.

    Returns:
      A transformation with a `ZeroNonfiniteState`.

    Raises:
      TypeError: for an `axis_name` that is none.
      ValueError: by `update`, if it is not known how a leaf is split.

    Examples:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> clip = optaxclip.clip_by_global_norm(1.0)
      >>> tx = optax.chain(optaxclip.zero_nonfinite(), clip)
      >>> updates = jnp.array([3.0, jnp.nan, 4.0, jnp.inf])
      >>> clipped, state = tx.update(updates, tx.init(updates))
      >>> print(clipped.round(3), state[0].zeroed)
      [0.6 0.  0.8 0. ] 2
    """
    axis_name = _mesh.check_axis_name(axis_name, "zero_nonfinite")

    def init(params):
        del params
        return ZeroNonfiniteState(
            zeroed=jnp.zeros((), jnp.int32), total=jnp.zeros((), jnp.int32)
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        part = _trees.counted(_mesh.aligned(updates, None, "zero_nonfinite"))
        layout = _mesh.layout(part, axis_name, "zero_nonfinite")
        finite = [jnp.isfinite(u) for u in part.arrays]
        counts = [jnp.sum(~f, dtype=jnp.int32) for f in finite]
        whole = [range(len(counts))]
        (zeroed,) = _mesh.joined(counts, layout, whole, _total, lax.psum)
        kept = [
            jnp.where(f, u, jnp.zeros_like(u))
            for f, u in zip(finite, part.arrays, strict=True)
        ]
        room = jnp.iinfo(jnp.int32).max - state.total
        total = state.total + jnp.minimum(zeroed, room)
        return part.replace(kept), ZeroNonfiniteState(zeroed=zeroed, total=total)

    return optax.GradientTransformationExtraArgs(init, update)


def check_finite() -> optax.GradientTransformationExtraArgs:
    """Raises if an element is NaN or inf, naming the leaf, inside jitted code.

    PyTorch's `error_if_nonfinite` for JAX. It checks only in a function that is
    transformed by `jax.experimental.checkify.checkify` and is not there otherwise, so
    it may stay in the chain of a production run. JAX's checkify refuses a vmapped
    `while_loop`, which a norm is: around a vmapped clip by norm use `jax.lax.map`.

    Returns:
      A transformation without state that gives back the updates as they are.

    Examples:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> from jax.experimental import checkify
      >>> tx = optaxclip.check_finite()
      >>> update = lambda updates: tx.update(updates, tx.init(updates))[0]
      >>> checked = jax.jit(checkify.checkify(update))
      >>> error, _ = checked({"w": jnp.array([1.0, jnp.nan])})
      >>> print(error.get().split(" (")[0])
      check_finite: updates must be finite, got 1 of 2 elements NaN or inf at w
    """

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        for path, leaf in _trees.named(updates):
            bad = jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32)
            checkify.debug_check(
                bad == 0,
                "check_finite: updates must be finite, got {bad} of {size} elements "
                f"NaN or inf at {_escaped(path)}",
                bad=bad,
                size=jnp.int32(jnp.size(leaf)),
            )
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _total(counts: list[jax.Array]) -> jax.Array:
    return sum(counts, jnp.zeros((), jnp.int32))


def _escaped(path: str) -> str:
    return path.replace("{", "{{").replace("}", "}}")
