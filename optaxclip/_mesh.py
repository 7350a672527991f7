"""Over which mesh axes a leaf is split, where a function sees one device's part.

Under `jit` every array is whole, whatever its sharding, and nothing here is needed.
Inside `shard_map` and `pmap` the mesh axes are *manual*: a norm is the sum over the
devices that hold the other parts. Which axes these are is read from the type of a leaf,
the set of axes it *varies* over, if types keep track of it (`check_vma=True`), and must
be given as `axis_name` if they do not. What cannot be known is refused.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from optaxclip import _cells, _compat, _trees

PyTree = Any
# Whether the cells of a device are all there are, as axis_name=() says.
_each_for_itself = contextvars.ContextVar("each_for_itself", default=False)
# None (automatic), a name, a tuple of names, or a prefix tree of PartitionSpecs.
AxisName = Any
# For each array, the mesh axes that every cell of it is split over.
Over = tuple[tuple[str, ...], ...]


class _Split(NamedTuple):
    """The axes a leaf is split over, and those of each dimension if they are known."""

    names: frozenset[str]
    by_dimension: tuple[tuple[str, ...], ...] | None


def check_axis_name(axis_name: AxisName, who: str) -> AxisName:
    """Returns what names mesh axes, with a list of names as a tuple, or refuses it."""
    if axis_name is None or _are_names(axis_name):
        return tuple(axis_name) if isinstance(axis_name, list) else axis_name
    leaves = jax.tree.leaves(axis_name, is_leaf=_is_spec)
    if not leaves or not all(map(_is_spec, leaves)):
        raise TypeError(
            f"{who}: axis_name must be None, a name, a tuple of names or a pytree of "
            f"PartitionSpecs, got axis_name={axis_name!r}. Pass the in_specs of the "
            "updates."
        )
    return axis_name


def varying(x: Any) -> frozenset[str]:
    """The manual axes that an array, or its description, is known to vary over."""
    described = isinstance(x, jax.ShapeDtypeStruct)
    return _compat.varying(x if described else jax.typeof(x))


def tracked() -> bool:
    """Whether types say which manual axes an array varies over."""
    manual = _manual()
    if not manual:
        return False
    return bool(varying(jax.eval_shape(lambda: lax.axis_index(manual[0]))))


def replicated(arrays: Sequence[jax.Array]) -> bool:
    """Whether every device is known to have all of every array."""
    return not _manual() or (tracked() and not any(map(varying, arrays)))


def for_shapes(axis_name: AxisName) -> AxisName:
    """What names the mesh axes where only shapes and types of norms are wanted."""
    known = tracked() or (_manual() and axis_name is not None)
    return axis_name if known else ()


@contextlib.contextmanager
def bounding(axis_name: AxisName) -> Iterator[None]:
    """Within it bounds put cells together of a clip that was told this."""
    token = _each_for_itself.set(axis_name == ())
    try:
        yield
    finally:
        _each_for_itself.reset(token)


def of_cells(magnitudes: PyTree, who: str) -> AxisName:
    """What names the mesh axes if the cells themselves are to be put together.

    Cells of whole arrays are on every device; those of elements and units may be one
    device's part of them.

    Raises:
      ValueError: if nothing says how cells of elements or units are split.
    """
    if _cells.are_whole(magnitudes) or _each_for_itself.get():
        return ()
    if _manual() and not tracked():
        path, magnitude = _cells.named(magnitudes)[0]
        raise ValueError(
            f"{who}: cells of elements or units must not be put together where types "
            f"do not tell how they are split, got {path} of shape {magnitude.shape}. "
            "Use shard_map with check_vma=True, or sharded(clip, ()) if every device "
            "has all of them."
        )
    return None


def aligned(updates: PyTree, params: PyTree, who: str) -> PyTree:
    """Returns the updates as types that vary as their parameters do.

    An update that is a constant, such as zeros, is a part like any other then. If there
    are no params, or of another structure, the updates stay as they are.

    Raises:
      ValueError: if an update is not reduced yet, or varies over an axis over which its
        parameter is the same: it is not averaged yet.
    """
    part = _trees.counted(updates)
    for i, u in enumerate(part.arrays):
        if waiting := _compat.unreduced(jax.typeof(u)):
            raise ValueError(
                f"{who}: updates must be reduced, got partial sums over "
                f"{_listed(waiting)} at {part.path(i)}. Reduce them before clipping, "
                "with jax.sharding.reshard or lax.psum."
            )
    if params is None or not tracked():
        return updates
    try:
        leaves = part.treedef.flatten_up_to(params)
    except ValueError:
        return updates
    new = list(part.arrays)
    for i, u in enumerate(part.arrays):
        param = leaves[part.indices[i]]
        if not jax.tree_util.all_leaves([param]):  # None, or a branch
            continue
        if more := varying(u) - varying(param):
            raise ValueError(
                f"{who}: updates must be averaged over the data-parallel devices, got "
                f"one that varies over {_listed(more)} at {part.path(i)}, where its "
                "parameter does not. Average the gradients first: lax.pmean(grads, "
                f"{_argument(more)})."
            )
        new[i] = varying_over(u, varying(param))
    return part.replace(new)


def varying_over(x: jax.Array, names: frozenset[str]) -> jax.Array:
    """The same values as a type that also varies over some axes."""
    more = tuple(sorted(names - varying(x)))
    return _compat.vary(x, more) if more else x


def varying_like(tree: PyTree, magnitudes: PyTree) -> PyTree:
    """The arrays of a tree as types that vary as the magnitudes of whole leaves do.

    They vary if every device measures for itself, and so does what is decided by them.
    """
    own = _cells.are_whole(magnitudes) or _each_for_itself.get()
    cells = jax.tree.leaves(magnitudes) if own else []
    names = frozenset().union(*map(varying, cells))
    return jax.tree.map(lambda x: varying_over(x, names), tree) if names else tree


def barrier(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """An `optimization_barrier` after which each array varies over what it did."""
    new = list(arrays)
    kinds = [tuple(sorted(varying(x))) for x in arrays]
    for kind in sorted(set(kinds)):
        alike = [i for i, other in enumerate(kinds) if other == kind]
        for i, x in zip(alike, lax.optimization_barrier([arrays[i] for i in alike])):
            new[i] = x
    return new


def full(like: Any, value: Any) -> jax.Array:
    """An array of one value: shape, dtype, sharding and varying axes as described."""
    array = lax.full(like.shape, value, like.dtype, sharding=like.sharding)
    return varying_over(array, varying(like))


def layout(
    part: _trees.Counted,
    axis_name: AxisName,
    who: str,
    axes: Sequence[tuple[int, ...]] | None = None,
) -> Over:
    """Finds the mesh axes that norms of arrays have to be summed over.

    Args:
      part: the arrays.
      axis_name: what the caller was given.
      who: function, for messages.
      axes: for each array, the axes that are reduced; None: all.

    Raises:
      ValueError: if it is not known how a leaf is split, if what is given does not
        exist or disagrees with the type of a leaf.
    """
    over = []
    for i, split in enumerate(_splits(part, axis_name, who)):
        rank = part.arrays[i].ndim
        reduced = range(rank) if axes is None else axes[i]
        if not split.names or len(reduced) == rank:
            own = split.names
        elif split.by_dimension is None:
            raise ValueError(
                f"{who}: axis_name must tell which dimensions are split where norms "
                f"are of slices, got axis_name={axis_name!r} for {part.path(i)}, split "
                f"over {_listed(split.names)}. Give the PartitionSpecs, as "
                "axis_name=specs or to any clip by optaxclip.sharded(clip, specs)."
            )
        else:
            own = frozenset(n for d in reduced for n in split.by_dimension[d])
        over.append(tuple(sorted(own)))
    return tuple(over)


def whole(part: _trees.Counted, axis_name: AxisName, who: str) -> list[Any]:
    """Describes the arrays of which these are one device's part.

    Where nothing says which dimension is split, one of length 1 may be part of a longer
    one, and has length 2 here.
    """
    shapes = []
    for x, split in zip(part.arrays, _splits(part, axis_name, who), strict=True):
        shape = x.shape
        if split.by_dimension is not None:
            shape = tuple(
                n * size(names)
                for n, names in zip(shape, split.by_dimension, strict=True)
            )
        elif split.names:
            shape = tuple(max(n, 2) for n in shape)
        shapes.append(jax.ShapeDtypeStruct(shape, x.dtype))
    return shapes


def size(names: Iterable[str]) -> int:
    """How many devices there are along some mesh axes."""
    return math.prod(map(lax.axis_size, names))


def of_all(
    collective: Callable, values: jax.Array, cells: jax.Array, whole: bool
) -> jax.Array:
    """Combines what was found in some cells with what other devices found in theirs.

    Args:
      collective: `lax.psum`, `lax.pmin` or `lax.pmax`.
      values: what was found.
      cells: the cells it was found in.
      whole: whether these are cells of whole arrays, which every device has.
    """
    names = _axes_of_cells(cells, whole)
    return collective(values, names) if names else values


def count(cells: jax.Array, whole: bool) -> int:
    """How many cells an array of them has on all devices."""
    return cells.size * size(_axes_of_cells(cells, whole))


def _axes_of_cells(cells: jax.Array, whole: bool) -> tuple[str, ...]:
    # A whole cell that varies is what each device measured for itself.
    alone = whole or _each_for_itself.get()
    return () if alone else tuple(sorted(varying(cells)))


def _splits(part: _trees.Counted, axis_name: AxisName, who: str) -> list[_Split]:
    """How each array is split, as its type or the caller says."""
    manual, known = _manual(), tracked()
    if axis_name is None:
        if manual and not known and part.arrays:
            raise ValueError(
                f"{who}: axis_name must be given where types do not tell which leaves "
                "are split, as in shard_map with check_vma=False and in pmap, got None "
                f"for {part.path(0)}. Use shard_map with check_vma=True; or give the "
                "PartitionSpecs, as axis_name=specs or to any clip by "
                "optaxclip.sharded(clip, specs); or () for them, if every device has "
                "all of every leaf, as averaged gradients are."
            )
        return [_Split(varying(x), None) for x in part.arrays]
    given = _given(part, axis_name, who)
    if axis_name == ():  # each device for itself, whatever types say
        return given
    for i, (x, split) in enumerate(zip(part.arrays, given, strict=True)):
        if known and split.names & set(manual) != varying(x):
            raise ValueError(
                f"{who}: axis_name must agree with the types of the updates, got "
                f"{_listed(split.names & set(manual))} for {part.path(i)}, which "
                f"varies over {_listed(varying(x))}. Leave axis_name out, or give the "
                "PartitionSpec of every leaf."
            )
    return given


def _given(part: _trees.Counted, axis_name: AxisName, who: str) -> list[_Split]:
    if _are_names(axis_name):
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        return [_Split(frozenset(_bound(names, who)), None)] * len(part.arrays)
    # Outside of shard_map the compiler follows the shardings that specs describe.
    here = bool(_manual())
    laid = _trees.spread(axis_name, part, f"{who}: axis_name", is_leaf=_is_spec)
    given = []
    for i, (x, spec) in enumerate(zip(part.arrays, laid, strict=True)):
        if len(spec) > x.ndim:
            raise ValueError(
                f"{who}: axis_name must have a PartitionSpec no longer than the rank "
                f"of its leaf, got {spec} for shape {x.shape} at {part.path(i)}. Give "
                "the in_specs of the updates."
            )
        entries = (*spec, *[None] * (x.ndim - len(spec)))
        dimensions = tuple(_bound(_names_of(e), who) if here else () for e in entries)
        names = frozenset(n for dimension in dimensions for n in dimension)
        given.append(_Split(names, dimensions))
    return given


def _bound(names: tuple[str, ...], who: str) -> tuple[str, ...]:
    """Those of the axes that are mapped here; the others are followed by the compiler.

    Raises:
      ValueError: if an axis does not exist.
    """
    there = jax.sharding.get_abstract_mesh().axis_names
    mapped = []
    for name in names:
        try:
            lax.axis_size(name)
        except NameError:
            if name not in there:
                raise ValueError(
                    f"{who}: axis_name must be a mesh axis, got {name!r}; there is "
                    f"{_listed(there)}. Correct it; outside shard_map and pmap leave "
                    "axis_name out, for shardings are followed there."
                ) from None
        else:
            mapped.append(name)
    return tuple(mapped)


def _manual() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _are_names(axis_name: Any) -> bool:
    if isinstance(axis_name, str) or axis_name == ():
        return True
    plain = type(axis_name) in (tuple, list) and len(axis_name) > 0
    return plain and all(isinstance(name, str) for name in axis_name)


def _is_spec(node: Any) -> bool:
    return isinstance(node, jax.sharding.PartitionSpec)


def _names_of(entry: Any) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()


def _listed(names: Any) -> str:
    return ", ".join(map(repr, sorted(names))) or "no axis"


def _argument(names: Any) -> str:
    one, *others = sorted(names)
    return repr((one, *others)) if others else repr(one)
