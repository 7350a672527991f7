"""Which leaves of a pytree count, what they are called, how one tree covers another."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import optax
from jax.extend.core.primitives import convert_element_type_p

PyTree = Any


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

    def path(self, i: int) -> str:
        """Names the place of an array, as `layer/kernel`."""
        numbered = self.treedef.unflatten(range(len(self.leaves)))
        return name(_key_paths(numbered)[self.indices[i]])

    def replace(self, arrays: Sequence[jax.Array]) -> PyTree:
        """Returns the tree with other arrays, their dtypes and weak types kept."""
        leaves = list(self.leaves)
        for i, old, new in zip(self.indices, self.arrays, arrays, strict=True):
            leaves[i] = _typed_like(new, old)
        return self.treedef.unflatten(leaves)

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
    arrays = [jnp.asarray(leaves[i]) for i in indices]
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


def only_counted(tree: PyTree) -> PyTree:
    """Returns the tree without the leaves that do not count: `None` for each."""
    part_of = lambda leaf: leaf if absent(leaf) or _is_inexact(leaf) else None
    return jax.tree.map(part_of, tree, is_leaf=absent)


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


def spread(prefix: PyTree, tree: PyTree, who: str, is_leaf: Callable | None = None):
    """Lays a prefix tree over a tree: every leaf of the tree gets the value above it.

    Raises:
      ValueError: if a leaf of the tree has no value above it, or a value covers a
        place that does not exist; the message names the first such place.
    """
    if not jax.tree.leaves(tree):
        return tree
    try:
        return jax.tree.map(
            lambda value, part: jax.tree.map(lambda _: value, part),
            prefix,
            tree,
            is_leaf=is_leaf,
        )
    except (ValueError, TypeError):
        pass
    function, argument = who.split(": ")
    have = _key_paths(prefix, is_leaf)
    want = _key_paths(tree)
    for path in want:
        if not any(path[: len(p)] == p for p in have):
            raise ValueError(
                f"{function}: {argument} has no value for {name(path)}, got values for "
                f"{', '.join(map(name, have)) or 'nothing'}. Add one for it or for a "
                "branch above it, or pass one value for all."
            )
    places = _key_paths(tree, absent)
    for path in have:
        if not any(path == p[: len(path)] for p in places):
            raise ValueError(
                f"{function}: {argument} has a value for {name(path)}, which does not "
                f"exist; there are {', '.join(map(name, want)) or 'no leaves'}. Remove "
                "it or correct its name."
            )
    raise ValueError(
        f"{function}: {argument} must be one value or a prefix of the tree, got "
        f"{jax.tree.structure(prefix)} for {jax.tree.structure(tree)}. Use the same "
        "containers as the tree."
    )


def first_difference(want: PyTree, have: PyTree, a: str, b: str) -> str:
    """Says where two trees differ; their leaves are called a and b."""
    wanted, had = _key_paths(want), _key_paths(have)
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


def _typed_like(new: jax.Array, old: jax.Array) -> jax.Array:
    new = new.astype(old.dtype)
    if jax.typeof(old).weak_type and not jax.typeof(new).weak_type:
        # No function of the public API makes a traced value weakly typed again.
        new = convert_element_type_p.bind(
            new, new_dtype=old.dtype, weak_type=True, sharding=None
        )
    return new


def _key_paths(tree: PyTree, is_leaf: Callable | None = None) -> list[tuple]:
    return [p for p, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]]
