"""What a clip saw and did: the record, and finding records in optimizer states."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _mesh, _trees, norms
from optaxclip._numerics import count_if

PyTree = Any


class Record(NamedTuple):
    """State of a `recorded` bound. `norm` is taken *before* the clip.

    The structure is fixed from `init` on, so a record can be carried through
    `lax.scan`, `optax.MultiSteps` and checkpoints. Before the first step `norm` and
    `limit` are 0. With scopes finer than a group these have the structure of the
    params, so `optax.tree_map_params` takes them for slots of params.

    Attributes:
      norm: in the structure of the magnitudes, the largest magnitude of each array:
        the global norm for a clip by global norm, one norm per leaf or per label for
        `leaf` and `group`, the largest unit norm or modulus of each leaf for `unit`
        and `element`.
      limit: the same, the limit of the cell whose magnitude is in `norm`.
      scale: smallest factor a finite cell was multiplied by; 1 if nothing was clipped.
      clipped: share of cells whose factor was below 1, in [0, 1].
      steps: number of updates seen.
      clipped_steps: updates in which any cell was clipped.
      nonfinite_steps: updates in which any magnitude was NaN or inf.
      bound: state of the bound that is recorded.
    """

    norm: PyTree  # arrays of shape=(), dtype of the magnitudes
    limit: PyTree  # arrays of shape=(), dtype of the magnitudes
    scale: jax.Array  # shape=(), dtype=jnp.float32
    clipped: jax.Array  # shape=(), dtype=jnp.float32
    steps: jax.Array  # shape=(), dtype=jnp.int32
    clipped_steps: jax.Array  # shape=(), dtype=jnp.int32
    nonfinite_steps: jax.Array  # shape=(), dtype=jnp.int32
    bound: PyTree

    @classmethod
    def empty(cls, magnitudes: PyTree, bound: PyTree) -> "Record":
        """Returns the record before the first step."""

        def zero(magnitude):
            return jnp.zeros((), magnitude.dtype)

        seen = cls(
            norm=jax.tree.map(zero, magnitudes),
            limit=jax.tree.map(zero, magnitudes),
            scale=jnp.ones((), jnp.float32),
            clipped=jnp.zeros((), jnp.float32),
            steps=jnp.zeros((), jnp.int32),
            clipped_steps=jnp.zeros((), jnp.int32),
            nonfinite_steps=jnp.zeros((), jnp.int32),
            bound=None,
        )
        return _mesh.varying_like(seen, magnitudes)._replace(bound=bound)

    def after(
        self, magnitudes: PyTree, limits: PyTree, kept: PyTree, bound: PyTree
    ) -> "Record":
        """Returns the record after one more step."""
        known = _mesh.of_cells(magnitudes, "recorded")
        largest = jax.tree.map(lambda m: _largest(m, known), magnitudes)
        scale = jnp.ones((), jnp.float32)
        clipped = damaged = jnp.zeros((), jnp.float32)
        count = 0
        for seen, new in zip(
            jax.tree.leaves(magnitudes), jax.tree.leaves(kept), strict=True
        ):
            factor = jnp.where((seen > 0) & jnp.isfinite(seen), new / seen, 1)
            factor = factor.astype(jnp.float32)
            scale = jnp.minimum(scale, _mesh.smallest(factor, initial=1))
            clipped += _mesh.total(new < seen)
            damaged += _mesh.total(~jnp.isfinite(seen))
            count += _mesh.count(seen)
        seen = Record(
            norm=_typed_like(self.norm, largest),
            limit=_typed_like(
                self.limit, jax.tree.map(_limit_of, largest, magnitudes, limits)
            ),
            scale=scale,
            clipped=clipped / max(count, 1),
            steps=count_if(True, self.steps),
            clipped_steps=count_if(clipped > 0, self.clipped_steps),
            nonfinite_steps=count_if(damaged > 0, self.nonfinite_steps),
            bound=None,
        )
        return _mesh.varying_like(seen, magnitudes)._replace(bound=bound)


def records(opt_state: PyTree) -> list[Record]:
    """Finds every record in an optimizer state, in the order of the chain.

    Args:
      opt_state: the state of any transformation: chains, `masked`, `partition`,
        `MultiSteps`, `inject_hyperparams`, `nnx.Optimizer.opt_state`.

    Returns:
      The records; an empty list if no bound is `recorded`.

    Examples:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.clip_by_leaf_norm(optaxclip.recorded(1.0))
      >>> updates = {"b": jnp.array([0.5]), "w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(updates, tx.init(updates))
      >>> (record,) = optaxclip.records(state)
      >>> print({k: float(n) for k, n in record.norm.items()}, float(record.clipped))
      {'b': 0.5, 'w': 5.0} 0.5
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, Record))
    found = [node for node in nodes if isinstance(node, Record)]
    return [r for record in found for r in (record, *records(record.bound))]


def _typed_like(old: PyTree, new: PyTree) -> PyTree:
    """The new tree in the dtypes of the old; the old where an update is missing."""
    return jax.tree.map(
        lambda n, o: o if _trees.absent(n) else n.astype(o.dtype),
        new,
        old,
        is_leaf=_trees.absent,
    )


def _largest(magnitude: jax.Array, axis_name: _mesh.AxisName) -> jax.Array:
    if not magnitude.ndim:
        return magnitude
    return norms.tree_norm(magnitude, math.inf, axis_name)


def _limit_of(largest: jax.Array, magnitude: jax.Array, limit: jax.Array) -> jax.Array:
    if not limit.ndim:
        return limit
    at_largest = jnp.where(magnitude == largest, limit, jnp.inf)
    return _mesh.smallest(at_largest, initial=jnp.inf)
