"""Many small arrays as one, for a GPU: one reduction or one operand for all of them.

XLA fuses the padding and the concatenation into the kernel that reads the result, which
so reads each array in place. Of arrays that are split over devices it would exchange
the parts instead; where it may split them each is taken by itself.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._compat import enable_x64, may_be_partitioned
from optaxclip._sums import (
    Arrays,
    by_cell,
    by_size,
    by_type,
    float64_sum,
    root_of_float64,
)

_TILE = 1024  # elements that are added up at once
_TOGETHER = 32  # arrays in one; XLA writes concatenations of more than 64 to memory


def unless_split(joint: Callable, each: Callable, arrays: Any) -> Any:
    """Calls the first function; the second if the compiler may split the arrays."""
    kinds = [jax.typeof(x).sharding for x in jax.tree.leaves(arrays)]
    if any(any(getattr(kind, "spec", ())) for kind in kinds):  # by explicit sharding
        return each(arrays)
    return lax.cond(may_be_partitioned(), each, joint, arrays)


def sums(arrays: Arrays) -> jax.Array:
    """The sum of the squares of each array that is not split: a vector of float64."""
    found = []
    with enable_x64(True):
        for group in _groups([range(len(arrays))]):
            tiles = [_in_tiles(arrays[i]) for i in group]
            wide = lax.convert_element_type(jnp.concatenate(tiles), jnp.float64)
            by_tile = jnp.sum(wide * wide, axis=1)
            counts = [len(t) for t in tiles]
            owner = tuple(np.repeat(np.arange(len(group)), counts).tolist())
            found.append(by_cell(by_tile, (owner, len(group))))
        return jnp.concatenate(found)


def unit_norms(arrays: Arrays, axes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The Euclidean norms over some axes of each array, kept with length 1."""
    each = lambda xs: [
        root_of_float64(float64_sum(x, a)) for x, a in zip(xs, axes, strict=True)
    ]
    return unless_split(functools.partial(_beside, axes), each, arrays)


def cut_out(arrays: Arrays) -> list[jax.Array]:
    """The same arrays; the small ones that vary alike are cut out of one vector."""
    found = list(arrays)
    small = [i for i in by_size(arrays)[0] if arrays[i].dtype == jnp.float32]
    for alike in by_type(arrays, small):
        cut = unless_split(_cut, list, [arrays[i] for i in alike])
        for i, x in zip(alike, cut, strict=True):
            found[i] = x
    return found


def _beside(axes: Sequence[tuple[int, ...]], arrays: Arrays) -> list[jax.Array]:
    """Norms of columns, of matrices of about the same size one behind the other."""
    found: list[Any] = [None] * len(arrays)
    sizes = [_matrix_size(x.shape, a) for x, a in zip(arrays, axes, strict=True)]
    alike: dict[Any, list[int]] = {}
    for i, size in enumerate(sizes):
        alike.setdefault(tuple(n.bit_length() for n in size), []).append(i)
    with enable_x64(True):
        for group in _groups(alike.values()):
            size = tuple(max(sizes[i][d] for i in group) for d in (0, 1))
            layers = [_as_layer(arrays[i], axes[i], size) for i in group]
            wide = lax.convert_element_type(jnp.concatenate(layers), jnp.float64)
            norms = root_of_float64(jnp.sum(wide * wide, axis=1))
            for layer, i in enumerate(group):
                kept = [1 if d in axes[i] else n for d, n in enumerate(arrays[i].shape)]
                found[i] = _row(norms, layer, sizes[i][1]).reshape(kept)
    return found


def _cut(arrays: Arrays) -> list[jax.Array]:
    found = []
    for group in _groups([range(len(arrays))]):
        flat = [lax.reshape(arrays[i], (arrays[i].size,)) for i in group]
        found.append(lax.optimization_barrier(jnp.concatenate(flat)))
    joint = lax.optimization_barrier(jnp.concatenate(found))
    ends = np.cumsum([x.size for x in arrays]).tolist()
    parts = [lax.slice(joint, [e - x.size], [e]) for e, x in zip(ends, arrays)]
    return [lax.reshape(p, x.shape) for p, x in zip(parts, arrays, strict=True)]


def _groups(alike: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    """Cuts sequences into pieces that are not too long for one concatenation."""
    return [
        some[first : first + _TOGETHER]
        for some in alike
        for first in range(0, len(some), _TOGETHER)
    ]


def _matrix_size(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int]:
    rows = math.prod(shape[d] for d in axes)
    return rows, math.prod(shape) // rows


# What follows is traced once for each shape, and not once for each array.


@jax.jit
def _in_tiles(x: jax.Array) -> jax.Array:
    rows = -(-x.size // _TILE)
    flat = lax.reshape(x.astype(jnp.float32), (x.size,))
    padded = lax.pad(flat, np.float32(0), [(0, rows * _TILE - x.size, 0)])
    return padded.reshape(rows, _TILE)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _as_layer(x: jax.Array, axes: tuple[int, ...], size: tuple[int, int]) -> jax.Array:
    """A matrix whose columns are the units, with zeros below and beside it."""
    kept = [d for d in range(x.ndim) if d not in axes]
    rows, columns = _matrix_size(x.shape, axes)
    matrix = x.astype(jnp.float32).transpose([*axes, *kept]).reshape(rows, columns)
    widths = [(0, size[0] - rows, 0), (0, size[1] - columns, 0)]
    return lax.pad(matrix, np.float32(0), widths)[None]


def _row(matrix: jax.Array, row: int, length: int) -> jax.Array:
    return lax.slice(matrix, [row, 0], [row + 1, length])
