"""Magnitudes, and to which place of the updates each of them belongs.

Bounds see magnitudes as pytrees of arrays. Those that a scope makes are `Cells`, which
know the places of the tree that was measured, so that a prefix of that tree can be laid
over them. What a bound stores never is: in a state cells of whole arrays are a vector
with an entry for every leaf of the tree, or a scalar; units a tuple of arrays, one for
each leaf; and elements have the structure of the updates. Every leaf has an entry, also
where it does not count or is missing at a step: its magnitude is 0 there, or there is
no array of it, from which nothing is learned.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _trees

PyTree = Any
_RENEW = (
    "Pass the state that tx.init made of these params; after a change of the clip, or "
    "of optaxclip, make it anew."
)


class Places(NamedTuple):
    """What cells are of. Hashable.

    Attributes:
      form: "one" (a scalar), "vector" (an entry for each place), "units" or "elements"
        (an array for each place).
      treedef: the structure of the tree; `None` and `MaskedNode` are leaves of it.
      counts: for each leaf, whether it is measured; None for a `MaskedNode`, which has
        no place.
      part: the first and last place, and how many keys of their paths are left out, if
        these are the cells of a branch.
    """

    form: str
    treedef: Any
    counts: tuple[bool | None, ...]
    part: tuple[int, int, int] | None = None

    @property
    def measured(self) -> list[bool]:
        """For each place, whether it is measured."""
        first, last, _ = self.part or (0, len(self.counts), 0)
        return [c for c in self.counts if c is not None][first:last]

    def paths(self) -> list[tuple[Any, ...]]:
        """The key path of each place."""
        first, last, _ = self.part or (0, len(self.counts), 0)
        pairs = zip(self.all_paths(), self.counts, strict=True)
        return [path for path, c in pairs if c is not None][first:last]

    def all_paths(self) -> list[tuple[Any, ...]]:
        """The key path of each leaf of the tree, those that are masked too."""
        _, _, depth = self.part or (0, 0, 0)
        numbered = self.treedef.unflatten(range(len(self.counts)))
        return [path[depth:] for path in _trees.key_paths(numbered)]


@jax.tree_util.register_pytree_node_class
class Cells:
    """Arrays of cells, a pytree of them.

    Attributes:
      arrays: one if `places.form` is "one" or "vector", else one for each place, None
        where nothing is measured.
      places: what they are of.
    """

    def __init__(self, arrays: Sequence[Any], places: Places):
        """Puts arrays and places together."""
        self.arrays: tuple[Any, ...] = tuple(arrays)
        self.places = places

    def tree_flatten(self) -> tuple[tuple[Any, ...], Places]:
        """Returns the arrays as children and the places as what is static."""
        return self.arrays, self.places

    @classmethod
    def tree_unflatten(cls, places: Places, arrays: Sequence[Any]) -> "Cells":
        """Puts them together again."""
        return cls(arrays, places)


def one(value: jax.Array) -> Cells:
    """The cell that is the whole tree."""
    return Cells([value], Places("one", jax.tree.structure(0), (True,)))


def by_label(vector: jax.Array, names: Sequence[Any]) -> Cells:
    """Cells of labels, which are sorted."""
    treedef = jax.tree.structure(dict.fromkeys(names, 0))
    return Cells([vector], Places("vector", treedef, (True,) * len(names)))


def of_sides(part: _trees.Counted, low: Sequence[Any], high: Sequence[Any]) -> Cells:
    """Cells of the two sides of every element."""
    cells = of_leaves("elements", part, by_place(part, low))
    sides = jax.tree.structure({"negative": 0, "positive": 0})
    places = cells.places._replace(
        treedef=sides.compose(cells.places.treedef), counts=cells.places.counts * 2
    )
    return Cells([*cells.arrays, *by_place(part, high)], places)


def of_leaves(form: str, part: _trees.Counted, arrays: Sequence[Any]) -> Cells:
    """Cells of the leaves of a tree, as `places_of` numbers them."""
    masked = [isinstance(leaf, optax.MaskedNode) for leaf in part.leaves]
    measured = set(part.indices)
    counts = [None if m else i in measured for i, m in enumerate(masked)]
    return Cells(arrays, Places(form, part.treedef, tuple(counts)))


def places_of(part: _trees.Counted) -> tuple[list[int], int]:
    """For each array of a tree the number of its place, and how many there are."""
    masked = [isinstance(leaf, optax.MaskedNode) for leaf in part.leaves]
    number = np.cumsum([not m for m in masked]) - 1
    return [int(number[i]) for i in part.indices], len(masked) - sum(masked)


def by_place(part: _trees.Counted, values: Sequence[Any]) -> list[Any]:
    """Lists values of arrays by place, with None where nothing is measured."""
    places, count = places_of(part)
    listed: list[Any] = [None] * count
    for i, value in zip(places, values, strict=True):
        listed[i] = value
    return listed


def measured(cells: Cells) -> list[jax.Array]:
    """The arrays of units or elements, without places where nothing is measured."""
    return [array for array in cells.arrays if array is not None]


def of(magnitudes: PyTree) -> Cells:
    """The cells of a pytree of arrays, which need not have been made by a scope."""
    if isinstance(magnitudes, Cells):
        return magnitudes
    part = jax.tree.flatten(magnitudes, is_leaf=_trees.absent)
    arrays = [None if _trees.absent(leaf) else leaf for leaf in part[0]]
    counts = tuple(array is not None for array in arrays)
    return Cells(arrays, Places("elements", part[1], counts))


def like(magnitudes: PyTree, arrays: Sequence[Any]) -> PyTree:
    """Other arrays in place of those of some magnitudes."""
    if isinstance(magnitudes, Cells):
        return Cells(arrays, magnitudes.places)
    return of(magnitudes).places.treedef.unflatten(arrays)


def are_whole(magnitudes: PyTree) -> bool:
    """Whether they are of whole arrays, so that every device has all of them."""
    if isinstance(magnitudes, Cells):
        return magnitudes.places.form in ("one", "vector")
    return all(not m.ndim for m in jax.tree.leaves(magnitudes))


def named(magnitudes: PyTree) -> list[tuple[str, jax.Array]]:
    """The path and the array of all units or elements, or of any pytree."""
    cells = of(magnitudes)
    pairs = zip(cells.places.paths(), cells.arrays, strict=True)
    return [(_trees.name(path), array) for path, array in pairs if array is not None]


def count(magnitudes: PyTree) -> int:
    """How many whole cells are measured."""
    return sum(of(magnitudes).places.measured)


def stored(magnitudes: PyTree, arrays: Sequence[Any]) -> PyTree:
    """Arrays of cells as they are kept in a state."""
    cells = of(magnitudes)
    if are_whole(cells) and isinstance(magnitudes, Cells):
        return arrays[0]
    # Without leaves what is empty stays, which optax.tree.map_params takes for params.
    if cells.places.part or (cells.places.form == "units" and arrays):
        return tuple(arrays)
    filled = iter(arrays)
    leaves = [
        optax.MaskedNode() if c is None else next(filled) for c in cells.places.counts
    ]
    return cells.places.treedef.unflatten(leaves)


def restored(magnitudes: PyTree, state: PyTree, who: str) -> list[Any]:
    """The arrays of a state, in the order of the arrays of the magnitudes.

    Raises:
      ValueError: if it is the state of another tree, or of an earlier version.
    """
    cells = of(magnitudes)
    if are_whole(cells) and isinstance(magnitudes, Cells):
        check_array(state, who)
        return [state]
    leaves, have = jax.tree.flatten(state, is_leaf=lambda node: node is None)
    wanted = stored(cells, list(range(len(cells.arrays))))
    if have == jax.tree.structure(wanted):
        return leaves
    if not isinstance(wanted, tuple):
        where = _trees.first_difference(state, wanted, "state", "update")
    elif isinstance(state, tuple):
        names = [_trees.name(path) for path in cells.places.paths()]
        where = f"got {len(leaves)} arrays for {', '.join(names) or 'no leaves'}"
    else:
        raise ValueError(
            f"{who}: state must hold a tuple with the units of each leaf, as those of "
            f"0.1 do not, got {have}. {_RENEW}"
        )
    raise ValueError(
        f"{who}: updates must have the leaves that init saw, {where}. {_RENEW}"
    )


def check_array(state: PyTree, who: str) -> None:
    """Refuses what holds cells of whole arrays in anything but one array."""
    if not jax.tree_util.all_leaves([state]):
        raise ValueError(
            f"{who}: state must hold its cells in one array, as those of 0.1 do not, "
            f"got {jax.tree.structure(state)}. {_RENEW}"
        )


def laid(value: PyTree, magnitudes: PyTree, who: str) -> list[Any]:
    """The value above every place, None where nothing is measured.

    Raises:
      ValueError: if a place has none, or there is a value for none of them.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(value)
    return laid_flat(dict(flat), magnitudes, who)


def laid_flat(values: dict[_trees.Path, Any], magnitudes: PyTree, who: str):
    """The same for values by path."""
    places = of(magnitudes).places
    pairs = list(zip(places.paths(), places.measured, strict=True))
    paths = [path for path, yes in pairs if yes]
    everywhere = places.all_paths()
    found = iter(_trees.spread_over(values, paths, everywhere, who))
    return [next(found) if yes else None for _, yes in pairs]


def branches(magnitudes: PyTree, above: Sequence[_trees.Path], who: str) -> list[Any]:
    """The cells of the branches of a tree that are below some paths.

    Raises:
      ValueError: if a cell is below none of them, or there is nothing below one.
    """
    cells = of(magnitudes)
    laid_flat(dict.fromkeys(above), magnitudes, who)
    first, _, depth = cells.places.part or (0, 0, 0)
    paths = cells.places.paths()
    found = []
    for path in above:
        inside = [i for i, place in enumerate(paths) if place[: len(path)] == path]
        start, stop = (inside[0], inside[-1] + 1) if inside else (0, 0)
        part = (first + start, first + stop, depth + len(path))
        places = cells.places._replace(part=part)
        vector = cells.places.form == "vector"
        arrays = cells.arrays[start:stop]
        if vector:
            arrays = [_cut(cells.arrays[0], start, stop)]
        found.append(Cells(arrays, places))
    return found


def put_together(parts: Sequence[Cells], magnitudes: PyTree) -> PyTree:
    """The cells of a tree, of those of its branches; inf where there is no branch."""
    cells = of(magnitudes)
    first, _, _ = cells.places.part or (0, 0, 0)
    if cells.places.form != "vector":
        arrays: list[Any] = [None] * len(cells.arrays)
        for part in parts:
            start, stop, _ = part.places.part or (0, 0, 0)
            arrays[start - first : stop - first] = part.arrays
        return like(magnitudes, arrays)
    vector, end, pieces = cells.arrays[0], 0, []
    for part in sorted(parts, key=lambda part: part.places.part or (0,)):
        start, stop, _ = part.places.part or (0, 0, 0)
        if start < stop:
            pieces.append(jnp.full(start - first - end, jnp.inf, vector.dtype))
            pieces.append(jnp.broadcast_to(part.arrays[0], (stop - start,)))
            end = stop - first
    pieces.append(jnp.full(len(vector) - end, jnp.inf, vector.dtype))
    return like(magnitudes, [jnp.concatenate(pieces)])


def _cut(vector: Any, start: int, stop: int) -> Any:
    cut = lambda v: v[start:stop]
    described = isinstance(vector, jax.ShapeDtypeStruct)
    return jax.eval_shape(cut, vector) if described else cut(vector)
