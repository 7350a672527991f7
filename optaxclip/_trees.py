"""Which leaves of a pytree count, what they are called, how one tree covers another."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core.primitives import convert_element_type_p

PyTree = Any
Path = tuple[Any, ...]


class Counted(NamedTuple):
    """The leaves of a tree that are measured and clipped, and the way back.

    Attributes:
      arrays: the real or complex floating point leaves, in order.
      indices: their positions among all leaves.
      leaves: all leaves; `None` and `MaskedNode` count as leaves here.
      treedef: the structure of all leaves.
    """

    arrays: list[jax.Array]
    indices: list[int]
    leaves: list[Any]
    treedef: Any

    def paths(self) -> list[Path]:
        """The key path of every leaf, those that are not counted too."""
        return key_paths(self.treedef.unflatten(self.leaves), absent)

    def path(self, i: int) -> str:
        """Names the place of an array, as `layer/kernel`."""
        return name(self.paths()[self.indices[i]])

    def with_arrays(self, arrays: Sequence[Any]) -> PyTree:
        """Returns the tree with other arrays."""
        leaves = list(self.leaves)
        for i, new in zip(self.indices, arrays, strict=True):
            leaves[i] = new
        return self.treedef.unflatten(leaves)

    def replace(self, arrays: Sequence[jax.Array]) -> PyTree:
        """Returns the tree with other arrays, their dtypes and weak types kept."""
        pairs = zip(arrays, self.arrays, strict=True)
        return self.with_arrays([_typed_like(new, old) for new, old in pairs])

    def cells(self, values: Sequence[Any]) -> PyTree:
        """Returns the tree of values, without the leaves that are not counted."""
        leaves = [leaf if absent(leaf) else None for leaf in self.leaves]
        for i, value in zip(self.indices, values, strict=True):
            leaves[i] = value
        return self.treedef.unflatten(leaves)

    def placed(self, values: Sequence[Any], cells: PyTree) -> PyTree:
        """Returns the tree of cells with other values where there are arrays."""
        leaves = self.treedef.flatten_up_to(cells)
        for i, value in zip(self.indices, values, strict=True):
            leaves[i] = value
        return self.treedef.unflatten(leaves)

    def values(self, cells: PyTree) -> list[Any]:
        """Returns the values of a tree made by `cells`, in the order of the arrays."""
        leaves = self.treedef.flatten_up_to(cells)
        return [leaves[i] for i in self.indices]


def counted(tree: PyTree) -> Counted:
    """Finds the leaves that count: inexact arrays, NumPy arrays and Python floats.

    Integers, bools, float0, PRNG keys, `None` and `MaskedNode` do not count: they pass
    through every clip unchanged.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=absent)
    indices = [i for i, leaf in enumerate(leaves) if _is_inexact(leaf)]
    arrays = [_as_array(leaves[i]) for i in indices]
    return Counted(arrays, indices, leaves, treedef)


def is_function(node: Any) -> TypeGuard[Callable]:
    """Whether a node is a function rather than a pytree that can be called."""
    return callable(node) and jax.tree_util.all_leaves([node])


def widest(*dtypes: Any) -> jnp.dtype:
    """Returns the real dtype that measures all of these: float32, or float64."""
    inexact = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    bits = max((jnp.finfo(dtype).bits for dtype in inexact), default=32)
    return jnp.dtype(jnp.float64 if bits > 32 else jnp.float32)


def widened(dtype: Any, real: Any) -> jnp.dtype:
    """Returns the dtype, real or complex as it is, with the width of a real one."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(real)
    return jnp.dtype(jnp.complex128 if jnp.finfo(real).bits > 32 else jnp.complex64)


def named(tree: PyTree) -> list[tuple[str, Any]]:
    """Returns the path, as `layer/kernel`, and the leaf of all leaves that count."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=absent)
    return [(name(path), leaf) for path, leaf in flat if _is_inexact(leaf)]


def name(path: tuple[Any, ...]) -> str:
    """Writes a key path as `layer/kernel`; the root of a tree is `.`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "."


def align(params: PyTree, updates: PyTree, who: str) -> PyTree:
    """Returns the params of the updates that count, in the structure of the updates.

    Raises:
      ValueError: if `params` is missing, has another structure, or a leaf has another
        shape; the message names the leaf.
    """
    if params is None:
        raise ValueError(
            f"{who}: needs params, got None. Call tx.update(updates, state, params)."
        )
    part = counted(updates)
    try:
        leaves = part.treedef.flatten_up_to(params)
    except ValueError:
        where = first_difference(updates, params, "update", "param")
        raise ValueError(
            f"{who}: params must have the structure of updates, {where}. Pass the "
            "params that the gradients were taken of, filtered in the same way."
        ) from None
    aligned = [leaves[i] for i in part.indices]
    for i, (param, update) in enumerate(zip(aligned, part.arrays, strict=True)):
        single = jax.tree_util.all_leaves([param])  # not None, and no branch
        if not single or not _is_inexact(param) or jnp.shape(param) != update.shape:
            got = jnp.shape(param) if single else type(param).__name__
            raise ValueError(
                f"{who}: params must match updates, got {got} for an update of shape "
                f"{update.shape} at {part.path(i)}. Pass the params that the gradients "
                "were taken of."
            )
    return part.cells(aligned)


def spread(
    prefix: PyTree, part: Counted, who: str, is_leaf: Callable | None = None
) -> list[Any]:
    """Lays a prefix tree over a tree: the value above each of its arrays.

    Raises:
      ValueError: if an array has no value above it, or a value covers a place that does
        not exist; the message names the first such place.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(prefix, is_leaf)
    places = part.paths()
    return spread_over(dict(flat), [places[i] for i in part.indices], places, who)


def spread_over(
    values: dict[Path, Any], paths: Sequence[Path], places: Sequence[Path], who: str
) -> list[Any]:
    """The same for values by path, the paths of arrays, and those of all places."""
    function, argument = who.split(": ")
    found = []
    for path in paths:
        above = [path[:n] for n in range(len(path) + 1) if path[:n] in values]
        if not above:
            raise ValueError(
                f"{function}: {argument} has no value for {name(path)}, got values for "
                f"{', '.join(map(name, values)) or 'nothing'}. Add one for it or for a "
                "branch above it, or pass one value for all."
            )
        found.append(values[above[0]])
    for path in values if paths else ():
        if not any(path == place[: len(path)] for place in places):
            raise ValueError(
                f"{function}: {argument} has a value for {name(path)}, which does not "
                f"exist; there are {', '.join(map(name, paths)) or 'no leaves'}. "
                "Remove it or correct its name."
            )
    return found


def first_difference(want: PyTree, have: PyTree, a: str, b: str) -> str:
    """Says where two trees differ; their leaves are called a and b."""
    wanted, had = key_paths(want), key_paths(have)
    for path in wanted:
        if path not in had:
            return f"got no {b} at {name(path)}"
    for path in had:
        if path not in wanted:
            return f"got no {a} at {name(path)}"
    return f"got {jax.tree.structure(have)} for {jax.tree.structure(want)}"


def absent(node: Any) -> bool:
    """Whether a node stands for a leaf that is not there."""
    return node is None or isinstance(node, optax.MaskedNode)


def _is_inexact(leaf: Any) -> bool:
    if not hasattr(leaf, "dtype"):
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _as_array(leaf: Any) -> Any:
    """An array of a number or a NumPy array; what only has a shape stays as it is."""
    known = isinstance(leaf, float | complex | np.ndarray | np.generic)
    return jnp.asarray(leaf) if known else leaf


def _typed_like(new: jax.Array, old: jax.Array) -> jax.Array:
    new = new if new.dtype == old.dtype else new.astype(old.dtype)
    if jax.typeof(old).weak_type and not jax.typeof(new).weak_type:
        # No function of the public API makes a traced value weakly typed again.
        new = convert_element_type_p.bind(
            new, new_dtype=old.dtype, weak_type=True, sharding=None
        )
    return new


def key_paths(tree: PyTree, is_leaf: Callable | None = None) -> list[Path]:
    """The key path of every leaf."""
    return [p for p, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]]
