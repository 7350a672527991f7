"""What counts as one magnitude: an element, a unit, a leaf, a group, the whole tree.

A scope splits updates into magnitudes and what is left, the directions:

    magnitudes, rebuild = scope.split(updates, norm, axis_name)
    updates = rebuild(new_magnitudes, alone)

`magnitudes` is a pytree of real arrays, float32 or wider, each entry a *cell*. Cells
that are whole arrays, or groups of them, lie side by side in one vector; units and
elements keep an array for each leaf, which broadcasts against it. `rebuild` takes the
new magnitude of every cell, and whether the cell is to be left alone: then its updates
come out bit for bit as they went in. The other laws every scope obeys:

* the new magnitudes are what measuring the result gives, to the last bits of the leaf
  dtype; dtypes, weak types and structure are those that went in;
* a cell whose magnitude is NaN or inf comes out as NaN, unless it is left alone: its
  finite neighbours do not silently become zeros. `element` and `side` have no
  neighbours: there inf takes the new magnitude and NaN stays;
* leaves that are not floating point, `None` and `MaskedNode` pass through uncounted;
* derivatives are finite, and right wherever the norm has one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _cells, _mesh, _rebuild, _trees, axes, norms
from optaxclip._checks import check_number
from optaxclip._rebuild import Rebuild

PyTree = Any


class Scope(NamedTuple):
    """What counts as one magnitude.

    Attributes:
      split: `(updates, norm, axis_name=None) -> (magnitudes, rebuild)`. `norm` is None,
        or the norm of the whole tree if the caller knows it; scopes that measure
        something else ignore it. `axis_name` says how leaves are split, as for
        `optaxclip.sharded`; scopes that sum nothing ignore it.
      elementwise: whether there are as many cells as elements.
    """

    split: Callable[..., tuple[_cells.Cells, Rebuild]]
    elementwise: bool = False

    def described(
        self, params: PyTree, axis_name: _mesh.AxisName = None
    ) -> _cells.Cells:
        """Describes the magnitudes of updates of these params; nothing is measured."""
        known = _mesh.for_shapes(axis_name)
        # Only types of norms tell over which axes they vary.
        norm = None if _mesh.tracked() else 0.0
        part = _trees.counted(params)
        measured = lambda arrays: self.split(part.with_arrays(arrays), norm, known)[0]
        return jax.eval_shape(measured, part.arrays)

    def own(
        self, params: PyTree, updates: PyTree, axis_name: _mesh.AxisName, who: str
    ) -> _cells.Cells:
        """Measures the params of some updates, or refuses in the name of `who`."""
        return self.split(_trees.align(params, updates, who), None, axis_name)[0]


def element() -> Scope:
    """Makes every element a cell: magnitude `|u|`, direction the sign or the phase.

    Returns:
      A scope whose magnitudes are arrays of the shapes of the updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> magnitudes, _ = scopes.element().split(jnp.array([3.0, -4.0]), None)
      >>> print(magnitudes.arrays[0])
      [3. 4.]
    """

    def split(updates, norm, axis_name=None):
        del norm, axis_name
        part = _trees.counted(updates)
        seen = _rebuild.moduli(part.arrays)
        cells = _cells.of_leaves("elements", part, _cells.by_place(part, seen))
        return cells, Rebuild(part, cells, _rebuild.turned)

    return Scope(split, elementwise=True)


def side() -> Scope:
    """Makes two cells of every element: how far it is below zero, how far above.

    Returns:
      A scope whose magnitudes are `max(-u, 0)` of all updates, then `max(u, 0)`. Bounds
      may be given by side, as `{"negative": ..., "positive": ...}`.

    Raises:
      TypeError: by `split`, for complex updates, which have no sides.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> magnitudes, _ = scopes.side().split(jnp.array([3.0, -4.0]), None)
      >>> print(*magnitudes.arrays)
      [0. 4.] [3. 0.]
    """

    def split(updates, norm, axis_name=None):
        del norm, axis_name
        part = _trees.counted(updates)
        for path, leaf in _trees.named(updates):
            if jnp.iscomplexobj(leaf):
                raise TypeError(
                    f"scopes.side: complex updates have no sides, got {leaf.dtype} at "
                    f"{path}. Use the element scope, which bounds the modulus."
                )
        low, high = _rebuild.sides(part.arrays)
        cells = _cells.of_sides(part, low, high)
        return cells, Rebuild(part, cells, _rebuild.turned_by_side)

    return Scope(split, elementwise=True)


def unit(axis: Any = None, ord: float | str | None = None) -> Scope:
    """Makes every slice that feeds one output a cell, such as a column of a kernel.

    Args:
      axis: which axes a unit spans: None (by rank), an int, a tuple, a pytree prefix
        of these, or a callable of path and leaf; see `optaxclip.axes`.
      ord: order of the norm, as in `norms.tree_norm`.

    Returns:
      A scope whose magnitudes are arrays of the shapes of the updates, with 1 for every
      axis that a unit spans.

    Raises:
      TypeError: for an `axis` or `ord` that is not static.
      ValueError: for another `ord`; by `split`, for axes out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> magnitudes, _ = scopes.unit().split(jnp.array([[3.0, 0.0], [4.0, 1.0]]), None)
      >>> print(magnitudes.arrays[0])
      [[5. 1.]]
    """
    ord = norms.check_ord(ord, "scopes.unit")

    def split(updates, norm, axis_name=None):
        del norm
        part = _trees.counted(updates)
        described = part.with_arrays(_mesh.whole(part, axis_name, "scopes.unit"))
        spanned = axes.resolve(axis, described, "scopes.unit: axis")
        over = _mesh.layout(part, axis_name, "scopes.unit", spanned)
        seen = norms.measure_units(part.arrays, over, spanned, ord)
        cells = _cells.of_leaves("units", part, _cells.by_place(part, seen))
        return cells, Rebuild(part, cells, _rebuild.units_rescaled)

    return Scope(split)


def leaf(ord: float | str | None = None) -> Scope:
    """Makes every array of the tree a cell.

    Flax' `LSTMCell` and `GRUCell` hold one array per gate, so there a leaf is a gate.

    Args:
      ord: order of the norm, as in `norms.tree_norm`.

    Returns:
      A scope whose magnitudes are a vector, with an entry for every leaf of the
      updates: 0 for one that is not measured.

    Raises:
      ValueError: for another `ord`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> updates = {"b": jnp.array([1.0]), "w": jnp.array([3.0, 4.0])}
      >>> magnitudes, _ = scopes.leaf().split(updates, None)
      >>> print(magnitudes.arrays[0])
      [1. 5.]
    """
    ord = norms.check_ord(ord, "scopes.leaf")

    def split(updates, norm, axis_name=None):
        del norm
        part = _trees.counted(updates)
        over = _mesh.layout(part, axis_name, "scopes.leaf")
        places, count = _cells.places_of(part)
        seen = norms.measure(part.arrays, over, places, count, ord)
        cells = _cells.of_leaves("vector", part, [seen])
        return cells, Rebuild(part, cells, _rebuild.Rescaled(tuple(places), True))

    return Scope(split)


def peak(rescale: bool = False) -> Scope:
    """Makes every array a cell of which only the largest elements are cut.

    The magnitude is the largest modulus; elements within the new one stay as they are,
    bit for bit, and those beyond get it: the projection on the ball of the inf norm.
    `leaf(ord=inf)` has the same magnitudes and scales the array as a whole.

    Args:
      rescale: elements beyond are multiplied by new / old instead, so that they keep
        their proportions, but fall below some that were smaller.

    Returns:
      A scope whose magnitudes are a vector, as those of `leaf`.

    Raises:
      TypeError: if `rescale` is not a bool.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, scopes
      >>> updates = jnp.array([1.0, -4.0, 8.0])
      >>> print(clip_by(scopes.peak(), 2.0).update(updates, None)[0])
      [ 1. -2.  2.]
      >>> print(clip_by(scopes.peak(rescale=True), 2.0).update(updates, None)[0])
      [ 1. -1.  2.]

    References:
      With `rescale`, AdaClip of Stable-SPAM: Huang et al., 2025,
      https://arxiv.org/abs/2502.17055
    """
    if not isinstance(rescale, bool):
        raise TypeError(
            f"scopes.peak: rescale must be True or False, got rescale={rescale!r}. "
            "Pass one of these."
        )

    def split(updates, norm, axis_name=None):
        del norm
        part = _trees.counted(updates)
        over = _mesh.layout(part, axis_name, "scopes.peak")
        places, count = _cells.places_of(part)
        seen = norms.measure(part.arrays, over, places, count, math.inf)
        cells = _cells.of_leaves("vector", part, [seen])
        return cells, Rebuild(part, cells, _rebuild.Cut(tuple(places), rescale))

    return Scope(split)


def group(
    labels: PyTree | Callable[[PyTree], PyTree], ord: float | str | None = None
) -> Scope:
    """Makes all leaves of one label a cell.

    Args:
      labels: pytree of labels, a prefix of the updates, or a callable that makes one of
        the updates, as for `optax.partition`.
      ord: order of the norm, as in `norms.tree_norm`.

    Returns:
      A scope whose magnitudes are a vector, with an entry for every label in sorted
      order. A label without leaves has magnitude 0.

    Raises:
      ValueError: for another `ord`; by `split`, if a leaf has no label.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0]), "c": jnp.ones(1)}
      >>> labels = {"a": "hidden", "b": "hidden", "c": "output"}
      >>> magnitudes, _ = scopes.group(labels).split(updates, None)
      >>> print(magnitudes.arrays[0])  # hidden, output
      [5. 1.]
    """
    ord = norms.check_ord(ord, "scopes.group")

    def split(updates, norm, axis_name=None):
        del norm
        part = _trees.counted(updates)
        tree = labels(updates) if _trees.is_function(labels) else labels
        label_of = _trees.spread(tree, part, "scopes.group: labels")
        names = _sorted_labels(tree)
        owner = tuple(names.index(label) for label in label_of)
        over = _mesh.layout(part, axis_name, "scopes.group")
        seen = norms.measure(part.arrays, over, owner, len(names), ord)
        cells = _cells.by_label(seen, names)
        return cells, Rebuild(part, cells, _rebuild.Rescaled(owner))

    return Scope(split)


def tree(ord: float | str | None = None) -> Scope:
    """Makes the whole tree one cell: its magnitude is the global norm.

    Args:
      ord: order of the norm, as in `norms.tree_norm`.

    Returns:
      A scope whose magnitude is a scalar. If the caller of `split` gives a norm it is
      taken as it is and nothing is measured.

    Raises:
      ValueError: for another `ord`; by `split`, for a `norm` that is negative or NaN or
        not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> updates = {"b": jnp.array([3.0]), "w": jnp.array([0.0, 4.0])}
      >>> magnitude, _ = scopes.tree().split(updates, None)
      >>> print(magnitude.arrays[0])
      5.0
    """
    ord = norms.check_ord(ord, "scopes.tree")

    def split(updates, norm, axis_name=None):
        part = _trees.counted(updates)
        if norm is None:
            over = _mesh.layout(part, axis_name, "scopes.tree")
            owner = (0,) * len(part.arrays)
            seen = norms.measure(part.arrays, over, owner, 1, ord)[0]
        else:
            dtype = _trees.widest(*(u.dtype for u in part.arrays))
            seen = _known(norm, dtype, axis_name)
        cells = _cells.one(seen)
        return cells, Rebuild(part, cells, _rebuild.Rescaled((0,) * len(part.arrays)))

    return Scope(split)


def _sorted_labels(tree: PyTree) -> list[Any]:
    found = set(jax.tree.leaves(tree))
    try:
        return sorted(found)
    except TypeError:
        raise TypeError(
            "scopes.group: labels must be all strings or all ints, got "
            f"{sorted(map(repr, found))}. They are the keys of a dict of magnitudes."
        ) from None


def _known(
    norm: jax.typing.ArrayLike, dtype: Any, axis_name: _mesh.AxisName
) -> jax.Array:
    check_number(norm, "update: norm", nan_allowed=True)
    norm = jnp.asarray(norm)
    if norm.ndim:
        raise ValueError(
            f"update: norm must be a scalar, got norm of shape {norm.shape}. Give the "
            "norm of all updates together."
        )
    if (names := _mesh.varying(norm)) and axis_name != ():
        raise ValueError(
            "update: norm must be the same on all devices, got one that varies over "
            f"{', '.join(map(repr, sorted(names)))}. Sum its square over them with "
            "lax.psum."
        )
    return norm.astype(dtype)
