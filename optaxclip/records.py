"""What a clip saw and did: the record, and finding records in optimizer states."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _cells, _mesh, _sums, _trees, norms
from optaxclip._numerics import count_if

PyTree = Any


class Record(NamedTuple):
    """State of a `recorded` bound. `norm` is taken *before* the clip.

    The structure is fixed from `init` on, so a record can be carried through
    `lax.scan`, `optax.MultiSteps` and checkpoints. Before the first step `norm` and
    `limit` are 0. `by_name` gives the entries of both the names of their leaves.

    Attributes:
      norm: the global norm for a clip by global norm; a vector with the norm of every
        leaf for `leaf` and of every label for `group`; a vector with the largest unit
        norm or modulus of every leaf for `unit` and `element`. The entry of a leaf
        that has no update at a step stays as it was.
      limit: the same, the limit of the cell whose magnitude is in `norm`.
      scale: smallest factor a finite cell was multiplied by; 1 if nothing was clipped.
      clipped: share of cells whose factor was below 1, in [0, 1].
      steps: number of updates seen.
      clipped_steps: updates in which any cell was clipped.
      nonfinite_steps: updates in which any magnitude was NaN or inf.
      bound: state of the bound that is recorded.
    """

    norm: jax.Array  # shape=() or (leaves,) or (labels,), dtype of the magnitudes
    limit: jax.Array  # the same
    scale: jax.Array  # shape=(), dtype=jnp.float32
    clipped: jax.Array  # shape=(), dtype=jnp.float32
    steps: jax.Array  # shape=(), dtype=jnp.int32
    clipped_steps: jax.Array  # shape=(), dtype=jnp.int32
    nonfinite_steps: jax.Array  # shape=(), dtype=jnp.int32
    bound: PyTree

    @classmethod
    def empty(cls, magnitudes: PyTree, bound: PyTree) -> "Record":
        """Returns the record before the first step."""

        def zeros():
            arrays = list(_cells.of(magnitudes).arrays)
            if not _cells.are_whole(magnitudes):
                arrays = [None if m is None else jnp.zeros((), m.dtype) for m in arrays]
            found = _side_by_side(magnitudes, arrays)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)

        seen = cls(
            norm=zeros(),
            limit=zeros(),
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
        whole = _cells.are_whole(magnitudes)
        arrays, tops, new = (
            _cells.of(cells).arrays for cells in (magnitudes, limits, kept)
        )
        largest = _largest(magnitudes)
        scale = jnp.ones((), jnp.float32)
        clipped = damaged = jnp.zeros((), jnp.float32)
        count = _cells.count(magnitudes) if whole else 0
        at_largest = []
        for m, c, k, top in zip(arrays, tops, new, largest, strict=True):
            if m is None:
                at_largest.append(None)
                continue
            factor = jnp.where((m > 0) & jnp.isfinite(m), k / m, 1)
            factor = factor.astype(jnp.float32)
            scale = jnp.minimum(scale, _smallest(factor, m, whole, 1))
            clipped += _total(k < m, m, whole)
            damaged += _total(~jnp.isfinite(m), m, whole)
            count += 0 if whole else _mesh.count(m, whole)
            at_largest.append(_limit_of(top, m, c, whole))
        seen = Record(
            norm=_renewed(magnitudes, self.norm, largest),
            limit=_renewed(magnitudes, self.limit, at_largest),
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
      >>> print(record.norm, record.clipped)
      [0.5 5. ] 0.5
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, Record))
    found = [node for node in nodes if isinstance(node, Record)]
    return [r for record in found for r in (record, *records(record.bound))]


def by_name(values: jax.Array, tree: PyTree) -> dict[str, jax.Array]:
    """Gives the entries of a vector of leaves or of labels their names.

    Args:
      values: the `norm` or `limit` of a `Record`, or a field of the state of a learned
        bound, of a clip by leaf, unit, element or group: one entry for every leaf or
        label along the last axis.
      tree: the params; for a clip by group its labels or limits.

    Returns:
      A dict from the path of each floating point leaf, as `layer/kernel`, or from each
      label, to its entry.

    Raises:
      ValueError: if there are not as many entries as leaves or labels.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.recorded(optaxclip.clip_by_leaf_norm(1.0))
      >>> updates = {"b": jnp.array([0.5]), "w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(updates, tx.init(updates))
      >>> norms = optaxclip.by_name(state.norm, updates)
      >>> print({name: float(norm) for name, norm in norms.items()})
      {'b': 0.5, 'w': 5.0}
    """
    part = _trees.counted(tree)
    if part.indices or not part.leaves:
        names = [_trees.name(path) for path in part.paths()]
        _, count = _cells.places_of(part)
        places = [
            (names[i], p) for i, p in zip(part.indices, _cells.places_of(part)[0])
        ]
    else:
        labels = sorted(set(part.leaves))
        count = len(labels)
        places = [(str(label), i) for i, label in enumerate(labels)]
    if jnp.ndim(values) == 0 or values.shape[-1] != count:
        raise ValueError(
            f"by_name: values must have an entry for each of the {count} leaves or "
            f"labels of the tree, got shape {jnp.shape(values)}. Pass the params that "
            "tx.init was given, or the labels of a clip by group."
        )
    return {name: values[..., i] for name, i in places}


def _side_by_side(magnitudes: PyTree, values: list[Any]) -> PyTree:
    """One vector of a value for each array, or what is one already."""
    if not isinstance(magnitudes, _cells.Cells):
        return _cells.like(magnitudes, values)
    if _cells.are_whole(magnitudes):
        return values[0]
    dtype = _trees.widest(*(v.dtype for v in values if v is not None))
    filled = [jnp.zeros((), dtype) if v is None else v.astype(dtype) for v in values]
    return _sums.stacked(filled) if filled else jnp.zeros(0, dtype)


def _renewed(magnitudes: PyTree, old: PyTree, values: list[Any]) -> PyTree:
    """The new entries, in the dtype of the old; the old where an update is missing."""
    new = _side_by_side(magnitudes, values)
    measured = _cells.of(magnitudes).places.measured

    if isinstance(magnitudes, _cells.Cells):
        _cells.check_array(old, "recorded")
        if jnp.shape(old) != new.shape:
            raise ValueError(
                "recorded: state must be that of these updates, got an array of shape "
                f"{jnp.shape(old)} for {new.shape}. Pass the state that tx.init made."
            )

    def choose(n, o):
        n = n.astype(o.dtype)
        return n if all(measured) else jnp.where(np.asarray(measured), n, o)

    return jax.tree.map(choose, new, old)


def _largest(magnitudes: PyTree) -> list[Any]:
    """The largest magnitude of each array; whole cells as they are."""
    cells = _cells.of(magnitudes)
    if _cells.are_whole(magnitudes):
        return list(cells.arrays)
    part = _trees.counted([m for m in cells.arrays if m is not None])
    known = _mesh.of_cells(magnitudes, "recorded")
    over = _mesh.layout(part, known, "recorded")
    each = range(len(part.arrays))
    found = iter(norms.measure(part.arrays, over, each, len(part.arrays), math.inf))
    return [None if m is None else next(found) for m in cells.arrays]


def _limit_of(largest, magnitude, limit, whole: bool) -> jax.Array:
    if whole or not limit.ndim:
        return jnp.broadcast_to(limit, jnp.shape(largest))
    at_largest = jnp.where(magnitude == largest, limit, jnp.inf)
    return _smallest(at_largest, magnitude, whole, jnp.inf)


def _total(flags: jax.Array, cells: jax.Array, whole: bool) -> jax.Array:
    """How many flags of cells are true on all devices, as a float."""
    found = jnp.sum(flags, dtype=jnp.float32)
    return _mesh.of_all(lax.psum, found, cells, whole)


def _smallest(values, cells, whole: bool, initial: float) -> jax.Array:
    """The smallest of all devices, or the initial value; NaN where one is NaN."""
    found = jnp.min(values, initial=initial)
    found = _mesh.of_all(lax.pmin, found, cells, whole)
    # A minimum over devices may lose it.
    lost = _total(jnp.isnan(values), cells, whole) > 0
    return jnp.where(lost, jnp.nan, found)
