"""Sums of squares that neither overflow nor underflow, and how they are put together.

A sum of squares is one of float64, or three of float32: of the values times three
scales, of which one has lost nothing. `optaxclip._forms` chooses.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _trees
from optaxclip._compat import enable_x64, varying

SMALL_ON_CPU, SMALL = 2**14, 2**16  # elements of the largest array that counts as small
_BLOCK = 128  # scalars that are stacked at once
# In each dtype the scales of three sums, and the sums of squares that have neither
# overflowed nor lost more than the last bits, of up to 2^37 elements.
_SCALES = {"float32": (1, 2.0**-68, 2.0**80), "float64": (1, 2.0**-520, 2.0**640)}
_SAFE = {"float32": (2.0**-66, 2.0**126), "float64": (2.0**-930, 2.0**1022)}

Arrays = Sequence[jax.Array]
Axes = tuple[int, ...] | None  # those that are summed over and kept with length 1; all
Names = tuple[str, ...]  # the manual mesh axes that arrays are split over
# Arrays that vary alike: their positions; the cell of each, and how many cells there
# are; the mesh axes that they are split over.
Kinds = Sequence[tuple[Sequence[int], tuple[tuple[int, ...], int], Names]]


@functools.partial(jax.jit, static_argnums=1)  # traced and lowered once for each shape
def float64_sum(x: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """The sum of squares in float64; over all axes, or some that are kept."""
    with enable_x64(True):
        y = lax.convert_element_type(x, jnp.float64)
        return jnp.sum(y * y, axis=axes, keepdims=axes is not None)


@jax.jit
def root_of_float64(sums: jax.Array) -> jax.Array:
    """The root of sums of squares in float64, as float32."""
    with enable_x64(True):
        return lax.convert_element_type(jnp.sqrt(sums), jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for each shape
def three_sums(x: jax.Array, axes: Axes, joint: bool = False) -> Any:
    """The sums of the squares of the values times each scale, along a first axis.

    Of a large array they are three reductions that XLA fuses; or one with three
    results, `joint`, which is the same work in fewer kernels, and where units are many
    and short it is one read instead of three, but it must not be partitioned.
    """
    x = x.astype(_trees.widest(x.dtype))
    keep, axes = axes is not None, tuple(range(x.ndim)) if axes is None else axes
    scales = np.asarray(_SCALES[x.dtype.name], x.dtype)
    # Of a single element XLA may multiply its square by that of a scale: inf.
    single = math.prod(x.shape[a] for a in axes) == 1
    fence = lax.optimization_barrier if single else lambda y: y
    if is_small(x, SMALL):
        y = fence(x[None] * scales.reshape(3, *[1] * x.ndim))
        return jnp.sum(y * y, axis=tuple(a + 1 for a in axes), keepdims=keep)
    squares = [lax.square(fence(x * s)) for s in scales]
    if joint:
        add = lambda a, b: tuple(jnp.add(p, q) for p, q in zip(a, b, strict=True))
        each = lax.reduce(tuple(squares), (np.zeros((), x.dtype),) * 3, add, axes)
        each = [jnp.expand_dims(s, axes) if keep else s for s in each]
    else:
        each = [jnp.sum(y, axis=axes, keepdims=keep) for y in squares]
    return jnp.stack(each)


def scaled(exact: jax.Array) -> jax.Array:
    """The three sums, of one in float64."""
    with enable_x64(True):
        three = [exact * lax.full_like(exact, s**2) for s in _SCALES["float32"]]
        return lax.convert_element_type(jnp.stack(three), jnp.float32)


@jax.jit
def root_of_three(sums: Any) -> jax.Array:
    """The norm, of the one of three sums that has lost nothing."""
    dtype = sums[0].dtype
    (low, high), (_, down, up) = _SAFE[dtype.name], _SCALES[dtype.name]
    large, small = sums[0] > high, sums[0] < low
    choose = lambda a, b, c: jnp.where(large, b, jnp.where(small, c, a))
    back = np.asarray([1, 1 / down, 1 / up], dtype)
    return jnp.sqrt(choose(*sums)) * choose(*back)


def cpu_sums(arrays: Arrays, axes: Sequence[Axes]) -> tuple[list[Any], list[int]]:
    """Sums as float64, and which of the arrays are large: those are of float32."""
    narrow = [x.dtype.itemsize < 4 and x.dtype != jnp.bfloat16 for x in arrays]
    large = [i for i, x in enumerate(arrays) if not is_small(x, SMALL_ON_CPU)]
    sums = []
    for i, (x, a) in enumerate(zip(arrays, axes, strict=True)):
        if i in large or narrow[i]:
            y = x.astype(jnp.float32)
            plain = jnp.sum(y * y, axis=a, keepdims=a is not None)
            sums.append(lax.convert_element_type(plain, jnp.float64))
        else:
            sums.append(float64_sum(x, a))
    return sums, [i for i in large if not narrow[i]]


def cpu_total(arrays: Arrays, cells: tuple[tuple[int, ...], int]) -> jax.Array:
    """The sum of squares of each cell of whole arrays, as float64.

    Large arrays are summed in float32, and again if a cell of theirs needs it.
    """
    sums, large = cpu_sums(arrays, [None] * len(arrays))
    total = lambda sums: by_cell(stacked(sums), cells)
    plain = total(sums)
    if not large:
        return plain

    def again(given):
        found = list(given[1])
        for i, x in zip(large, given[0], strict=True):
            found[i] = float64_sum(x, None)
        return total(found)

    concerned = np.isin(np.arange(cells[1]), [cells[0][i] for i in large])
    given = [arrays[i] for i in large], sums, plain
    off = jnp.any(concerned & unsafe(plain))
    return lax.cond(off, again, lambda given: given[2], given)


def unsafe(sums: jax.Array) -> jax.Array:
    low, high = _SAFE["float32"]
    return (sums < low) | (sums > high)


def by_cell(values: jax.Array, cells: tuple[tuple[int, ...], int]) -> jax.Array:
    """Adds up along the last axis what belongs to the same cell.

    Args:
      values: one for each array, along the last axis.
      cells: the cell of each array, and the number of cells.
    """
    owner, count = cells
    if owner == tuple(range(count)):
        return values
    if count == 1:
        return jnp.sum(values, axis=-1, keepdims=True)
    mine = np.arange(count)[:, None] == np.asarray(owner)
    values = values[..., None, :]
    chosen = jnp.where(mine, values, lax.full_like(values, 0))
    return jnp.sum(chosen, axis=-1)


def stacked(values: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """Stacks small arrays, many of them in blocks that a compiler fuses sooner."""
    if len(values) <= _BLOCK:
        return jnp.stack(values, axis)
    blocks = [list(values[i : i + _BLOCK]) for i in range(0, len(values), _BLOCK)]
    stacks = lax.optimization_barrier([jnp.stack(block, axis) for block in blocks])
    return jnp.concatenate(stacks, axis)


def over_kinds(parts: Sequence[jax.Array], kinds: Kinds, sizes: Any) -> jax.Array:
    """The sum over kinds of arrays, and over the devices that hold parts of them."""
    sums = [
        lax.psum(part, names) if names else part
        for part, (_, _, names) in zip(parts, kinds, strict=True)
    ]
    total = functools.reduce(jnp.add, sums)
    if sizes is None:
        return total
    # Not as a constant of float64, which older versions of JAX pass on as float32.
    kind = np.uint32 if max(sizes) < 2**32 else np.float32
    shape = [*[1] * (total.ndim - 1), len(sizes)]
    return total / lax.convert_element_type(
        np.asarray(sizes, kind).reshape(shape), total.dtype
    )


def over_devices(
    values: Sequence[jax.Array], over: Sequence[Names], across: Callable
) -> list[jax.Array]:
    """Combines each value with those of other devices; once for each set of axes."""
    found = list(values)
    for names in sorted(set(over) - {()}):
        alike = [i for i, other in enumerate(over) if other == names]
        joint = across([values[i] for i in alike], names)
        for i, value in zip(alike, joint, strict=True):
            found[i] = value
    return found


def is_small(x: jax.Array, most: int) -> bool:
    return isinstance(x.size, int) and x.size <= most  # it may be symbolic


def by_size(arrays: Arrays) -> tuple[list[int], list[int]]:
    small = [i for i, x in enumerate(arrays) if is_small(x, SMALL)]
    return small, [i for i, x in enumerate(arrays) if not is_small(x, SMALL)]


def by_type(arrays: Arrays, some: Sequence[int]) -> list[list[int]]:
    """Sorts arrays by the manual mesh axes that they vary over."""
    alike: dict[Any, list[int]] = {}
    for i in some:
        alike.setdefault(varying(jax.typeof(arrays[i])), []).append(i)
    return list(alike.values())
