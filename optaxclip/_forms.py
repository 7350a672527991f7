"""The same arithmetic in the form that each platform is fast with.

Two things are done to all arrays of a tree, and only these: their squares are summed,
and each is handed its entry of a vector. How, is chosen here, when a program is lowered
for a platform (`lax.platform_dependent`, of which nothing is left in the program), by
the size of an array, and by whether the compiler partitions the program. Everything
between the two is arithmetic on scalars and vectors and is the same everywhere.

A square of float32 leaves float32 beyond 1e19 and below 1e-19. Two forms do not:

* float64: squares of any float32 fit. On a CPU it costs nothing for small arrays, on a
  GPU half the rate of float32, and on a TPU it is emulated, so it is not used there.
* three sums, of the values times 1, 2^-68 and 2^80, of which one has lost nothing. XLA
  computes them in one read on a GPU and a TPU; on a CPU it writes a copy for them.

| | small arrays | large arrays | an entry of a vector |
|---|---|---|---|
| CPU | float64 | float32; float64 if the sum needs it, by one conditional | index as data |
| GPU | float64, 32 arrays in one reduction | three sums | static index behind a barrier |
| GPU, partitioned | float64, one by one | three sums | the same |
| TPU, others | three sums, scales along an axis | three sums | static index |

Why, by what the compilers make of 100 leaves of about 64 x 35 (XLA of jax 0.12.0.1,
compiled for a described H100 and TPU v5e; nothing was run):

* GPU: a kernel for each leaf costs its launch, whatever it computes. Reduced one by one
  and scaled one by one they are 202 kernels in optax's clip by global norm. The tiles
  of 32 leaves are read by one kernel, and writes that have the vector of factors as an
  operand are fused, those of an optimizer behind the clip too: 16 kernels, 18 with
  Adam behind, where Adam alone has 102. A barrier keeps XLA from folding the vector away.
  Concatenations of more than 64 arrays would be written to memory, and split arrays
  would be exchanged between devices.
* CPU: kernels that are alike are compiled once. With a static index all differ, and
  1,000 leaves take nine times as long to compile; so the index is data there. Many
  scalars are stacked in blocks of 128 behind a barrier, for XLA's fusion takes long with
  more. XLA repeats arithmetic on the vector in the kernel of every leaf as far back as
  the last division, so the quotient is the last operation on it.
* TPU: nothing is launched, and vectors cost copies. With three sums in one read, and
  the scales of small arrays along an axis, Adam behind a clip by global norm is
  estimated at 1.01 times the cycles of optax's for a large transformer and 0.6 for 60
  small leaves.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _tiles, _trees
from optaxclip._compat import enable_x64, varying
from optaxclip._tiles import by_cell, float64_sum, root

SMALL_ON_CPU, SMALL = 2**14, 2**16  # elements of the largest array that counts as small
_BLOCK = 128
_SHORT = 64  # elements of the largest unit that is measured with others in one read
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


def whole(
    arrays: Arrays, kinds: Kinds, dtype: Any, sizes: Sequence[int] | None = None
) -> jax.Array:
    """Measures a vector of Euclidean norms, of cells of whole real arrays.

    Args:
      arrays: the arrays.
      kinds: which of them vary alike, and their cells.
      dtype: float32 or float64.
      sizes: what the sum of squares of each cell is divided by, if it is to be a mean.
    """
    given = {"kinds": kinds, "sizes": sizes}
    if dtype == jnp.float64:
        return whole_by_scales([x.astype(dtype) for x in arrays], **given)
    forms = (whole_on_cpu, whole_on_gpu, whole_by_scales)
    return by_platform(*(functools.partial(f, **given) for f in forms), arrays)


def units(
    arrays: Arrays, axes: Sequence[Axes], over: Sequence[Names], dtype: Any
) -> list[jax.Array]:
    """Measures the Euclidean norms of the units of each real array; none is empty."""
    given = {"axes": tuple(axes), "over": tuple(over)}
    if dtype == jnp.float64:
        return units_by_scales([x.astype(dtype) for x in arrays], **given)
    forms = (units_on_cpu, units_on_gpu, units_by_scales)
    return by_platform(*(functools.partial(f, **given) for f in forms), arrays)


def entries(vector: jax.Array, places: Sequence[int]) -> list[jax.Array]:
    """Hands out entries of a vector; of a scalar, as many times itself."""
    count = len(places)
    if vector.ndim == 0:
        same = lambda v: [v] * count
        spread = lambda v: _fenced(lax.broadcast(v, (count,)), range(count))
        return by_platform(same, spread, same, vector)
    by_operand = functools.partial(entries_on_cpu, places=places)
    fenced = functools.partial(_fenced, places=places)
    return by_platform(
        by_operand, fenced, functools.partial(_picked, places=places), vector
    )


def together(arrays: Arrays) -> list[jax.Array]:
    """The same arrays; for a GPU the small ones cut out of one that kernels share."""
    return by_platform(list, _cut_out, list, list(arrays))


def whole_on_cpu(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    """Sums in float64; large arrays in float32, and again if a cell needs it."""
    with enable_x64(True):
        sums = [
            _cpu_total([arrays[i] for i in some], cells) for some, cells, _ in kinds
        ]
        return root(_joined(sums, kinds, sizes))


def units_on_cpu(
    arrays: Arrays, axes: Sequence[Axes], over: Sequence[Names]
) -> list[jax.Array]:
    """Sums in float64; large arrays in float32, and again if one of them needs it."""
    with enable_x64(True):
        sums, large = _cpu_sums(arrays, axes)
        if large:

            def again(given):
                return [float64_sum(x, axes[i]) for i, x in zip(large, given[0])]

            off = [jnp.any(_unsafe(sums[i])) for i in large]
            given = [arrays[i] for i in large], [sums[i] for i in large]
            off = functools.reduce(jnp.logical_or, off)
            found = lax.cond(off, again, lambda given: given[1], given)
            for i, s in zip(large, found, strict=True):
                sums[i] = s
        return [root(s) for s in over_devices(sums, over, lax.psum)]


def whole_on_gpu(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    """Three sums; of small arrays from float64, many in one reduction."""
    joint = functools.partial(_gpu_joint, kinds=kinds, sizes=sizes)
    each = functools.partial(_gpu_each, kinds=kinds, sizes=sizes)
    return _tiles.unless_split(joint, each, arrays)


def units_on_gpu(
    arrays: Arrays, axes: Sequence[Axes], over: Sequence[Names]
) -> list[jax.Array]:
    """Sums in float64; of many small arrays that are whole in one reduction."""
    found: list[Any] = [None] * len(arrays)
    joint = [i for i, x in enumerate(arrays) if _is_small(x, SMALL) and not over[i]]
    for alike in _by_type(arrays, joint):
        norms = _tiles.unit_norms([arrays[i] for i in alike], [axes[i] for i in alike])
        for i, norm in zip(alike, norms, strict=True):
            found[i] = norm
    rest = [i for i, norm in enumerate(found) if norm is None]
    sums = [float64_sum(arrays[i], axes[i]) for i in rest]
    sums = over_devices(sums, [over[i] for i in rest], lax.psum)
    for i, s in zip(rest, sums, strict=True):
        found[i] = root(s)
    return found


def whole_by_scales(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    """Three sums: for TPUs, and for float64 on every platform."""
    sums = [_three_sums(x, None) for x in arrays]
    parts = [
        by_cell(stacked([sums[i] for i in some], axis=1), cells)
        for some, cells, _ in kinds
    ]
    return _root(_joined(parts, kinds, sizes))


def units_by_scales(
    arrays: Arrays, axes: Sequence[Axes], over: Sequence[Names]
) -> list[jax.Array]:
    """Three sums: for TPUs, and for float64 on every platform."""
    sums = []
    for x, a in zip(arrays, axes, strict=True):
        each = lambda x, a=a: _three_sums(x, a)
        joint = lambda x, a=a: _three_sums(x, a, joint=True)
        short = not _is_small(x, SMALL) and math.prod(x.shape[i] for i in a) <= _SHORT
        sums.append(_tiles.unless_split(joint, each, x) if short else each(x))
    return [_root(s) for s in over_devices(sums, over, lax.psum)]


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


def stacked(values: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """Stacks small arrays, many of them in blocks that a compiler fuses sooner."""
    if len(values) <= _BLOCK:
        return jnp.stack(values, axis)
    blocks = [list(values[i : i + _BLOCK]) for i in range(0, len(values), _BLOCK)]
    stacks = lax.optimization_barrier([jnp.stack(block, axis) for block in blocks])
    return jnp.concatenate(stacks, axis)


def by_platform(cpu: Callable, gpu: Callable, other: Callable, given: Any) -> Any:
    """Calls the function for the platform that the program is lowered for."""
    return lax.platform_dependent(given, cpu=cpu, cuda=gpu, rocm=gpu, default=other)


def _joined(parts: Sequence[jax.Array], kinds: Kinds, sizes: Any) -> jax.Array:
    """The sum over kinds of arrays, and over the devices that hold parts of them."""
    sums = [
        lax.psum(part, names) if names else part
        for part, (_, _, names) in zip(parts, kinds, strict=True)
    ]
    total = functools.reduce(jnp.add, sums)
    return total if sizes is None else total / np.asarray(sizes, total.dtype)


def _cpu_sums(arrays: Arrays, axes: Sequence[Axes]) -> tuple[list[Any], list[int]]:
    """Sums as float64, and which of the arrays are large: those are of float32."""
    narrow = [x.dtype.itemsize < 4 and x.dtype != jnp.bfloat16 for x in arrays]
    large = [i for i, x in enumerate(arrays) if not _is_small(x, SMALL_ON_CPU)]
    sums = []
    for i, (x, a) in enumerate(zip(arrays, axes, strict=True)):
        if i in large or narrow[i]:
            y = x.astype(jnp.float32)
            plain = jnp.sum(y * y, axis=a, keepdims=a is not None)
            sums.append(lax.convert_element_type(plain, jnp.float64))
        else:
            sums.append(float64_sum(x, a))
    return sums, [i for i in large if not narrow[i]]


def _cpu_total(arrays: Arrays, cells: tuple[tuple[int, ...], int]) -> jax.Array:
    sums, large = _cpu_sums(arrays, [None] * len(arrays))
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
    off = jnp.any(concerned & _unsafe(plain))
    return lax.cond(off, again, lambda given: given[2], given)


def _gpu_joint(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    parts = []
    for some, cells, _ in kinds:
        small, large = _by_size([arrays[i] for i in some])
        found = []
        if small:
            found.append(_scaled(_tiles.sums([arrays[some[i]] for i in small])))
        if large:
            sums = [_three_sums(arrays[some[i]], None, joint=True) for i in large]
            found.append(jnp.stack(sums, axis=1))
        sums, order = jnp.concatenate(found, axis=1), np.argsort(small + large)
        if (order[1:] < order[:-1]).any():
            sums = sums[:, order]
        parts.append(by_cell(sums, cells))
    return _root(_joined(parts, kinds, sizes))


def _gpu_each(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    with enable_x64(True):
        sums = [float64_sum(x, None) for x in arrays]
        parts = [by_cell(stacked([sums[i] for i in some]), c) for some, c, _ in kinds]
        return root(_joined(parts, kinds, sizes))


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for each shape
def _three_sums(x: jax.Array, axes: Axes, joint: bool = False) -> Any:
    """The sums of the squares of the values times each scale, along a first axis.

    Of a large array they are three reductions that XLA fuses; or one with three
    results, `joint`, which is the same work in fewer kernels, and where units are many
    and short it is one read instead of three, but it must not be partitioned.
    """
    x = x.astype(_trees.widest(x.dtype))
    keep, axes = axes is not None, tuple(range(x.ndim)) if axes is None else axes
    scales = np.asarray(_SCALES[x.dtype.name], x.dtype)
    if _is_small(x, SMALL):
        y = x[None] * scales.reshape(3, *[1] * x.ndim)
        return jnp.sum(y * y, axis=tuple(a + 1 for a in axes), keepdims=keep)
    squares = [lax.square(x * s) for s in scales]
    if joint:
        add = lambda a, b: tuple(jnp.add(p, q) for p, q in zip(a, b, strict=True))
        each = lax.reduce(tuple(squares), (np.zeros((), x.dtype),) * 3, add, axes)
        each = [jnp.expand_dims(s, axes) if keep else s for s in each]
    else:
        each = [jnp.sum(y, axis=axes, keepdims=keep) for y in squares]
    return jnp.stack(each)


def _scaled(exact: jax.Array) -> jax.Array:
    """The three sums, of one in float64."""
    with enable_x64(True):
        squares = np.square(np.asarray(_SCALES["float32"], np.float64))
        three = exact[None] * squares.reshape(3, *[1] * exact.ndim)
        return lax.convert_element_type(three, jnp.float32)


@jax.jit
def _root(sums: Any) -> jax.Array:
    """The norm, of the one of three sums that has lost nothing."""
    dtype = sums[0].dtype
    (low, high), (_, down, up) = _SAFE[dtype.name], _SCALES[dtype.name]
    large, small = sums[0] > high, sums[0] < low
    choose = lambda a, b, c: jnp.where(large, b, jnp.where(small, c, a))
    back = np.asarray([1, 1 / down, 1 / up], dtype)
    return jnp.sqrt(choose(*sums)) * choose(*back)


def _unsafe(sums: jax.Array) -> jax.Array:
    low, high = _SAFE["float32"]
    return (sums < low) | (sums > high)


def _by_size(arrays: Arrays) -> tuple[list[int], list[int]]:
    small = [i for i, x in enumerate(arrays) if _is_small(x, SMALL)]
    return small, [i for i, x in enumerate(arrays) if not _is_small(x, SMALL)]


def _is_small(x: jax.Array, most: int) -> bool:
    return isinstance(x.size, int) and x.size <= most  # it may be symbolic


def _fenced(vector: jax.Array, places: Sequence[int]) -> list[jax.Array]:
    return _picked(lax.optimization_barrier(vector), places)


def _picked(vector: jax.Array, places: Sequence[int]) -> list[jax.Array]:
    return [lax.squeeze(lax.slice(vector, [i], [i + 1]), [0]) for i in places]


def entries_on_cpu(vector: jax.Array, places: Sequence[int]) -> list[jax.Array]:
    """Entries of a vector, of which the kernels that use them are alike."""
    # Two numbers each: a single one would be folded into the kernel that uses it.
    pairs = [np.asarray([i, len(vector)], np.uint32) for i in places]
    return [
        lax.squeeze(_dynamic_entry(vector, pair), [0])
        for pair in lax.optimization_barrier(pairs)
    ]


@jax.jit
def _dynamic_entry(vector: jax.Array, pair: jax.Array) -> jax.Array:
    return lax.dynamic_slice(vector, [pair[0]], [1])


def _cut_out(arrays: Arrays) -> list[jax.Array]:
    found = list(arrays)
    small = [i for i in _by_size(arrays)[0] if arrays[i].dtype == jnp.float32]
    for alike in _by_type(arrays, small):
        if len(alike) > 1:
            cut = _tiles.cut_out([arrays[i] for i in alike])
            for i, x in zip(alike, cut, strict=True):
                found[i] = x
    return found


def _by_type(arrays: Arrays, some: Sequence[int]) -> list[list[int]]:
    """Sorts arrays by the manual mesh axes that they vary over."""
    alike: dict[Any, list[int]] = {}
    for i in some:
        alike.setdefault(varying(jax.typeof(arrays[i])), []).append(i)
    return list(alike.values())
