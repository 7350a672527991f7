"""The same arithmetic in the form that each platform is fast with.

Two things are done to all arrays of a tree, and only these: their squares are summed,
and each is handed its entry of a vector. How is chosen here, when a program is lowered
for a platform (by `lax.platform_dependent`, which leaves nothing of the other forms),
by the size of an array, and by whether the compiler may partition the program. All that
lies between the two is arithmetic on scalars and vectors, the same everywhere.

| | small arrays | large arrays | an entry of a vector |
|---|---|---|---|
| CPU | float64 | float32; a conditional repeats it in float64 | by an index as data |
| GPU | float64, 32 arrays at once | three sums; units float64 | behind a barrier |
| GPU, partitioned | float64 | float64 | behind a barrier |
| TPU, others | three sums along an axis | three sums | by a static index |

Squares of float32 overflow beyond 1e19 and vanish below 1e-19. Those of float64 do not:
a CPU adds small arrays as fast, a GPU is fast enough, a TPU emulates it. Nor do all of
three sums, of the values times 1, 2^-68 and 2^80, which GPUs and TPUs take in one read.

Why so, by what XLA makes of it (jax 0.12.0.1 for a described H100 and v5e, 0.10.2 for
CPUs, 2026-11-28; nothing was run; `python -m benchmarks compile`):

* GPU, 100 leaves of about 64 x 35: each kernel costs its launch. optax's clip by global
  norm has 202; this one 16, and 18 with Adam behind, where Adam alone has 102. Up to 32
  leaves are read by one kernel (more than 64 would be written to memory first), and
  writes with one vector as an operand are fused, an optimizer's too. The barrier keeps
  XLA from folding that vector away. For a program that is partitioned the arrays would
  be exchanged between the devices, so there each is reduced by itself. Three sums of
  units of a large array are not one read (10 passes in AGC of 4096 x 4096 with Adam,
  8 in float64), and three sums of a partitioned array are three kernels.
* CPU, 1,000 leaves: kernels that are alike are compiled once. With a static index all
  differ, which takes nine times as long. Scalars are stacked in blocks of 128 behind a
  barrier, for a flat stack fuses slowly. XLA repeats what follows the last division of
  a vector in the kernel of every leaf, so the quotient is the last operation.
* TPU: nothing is launched, and vectors cost copies. With Adam behind, XLA estimates a
  clip by global norm at 1.01 times the cycles of optax's for a scanned transformer, and
  at 0.6 for 60 small leaves, where a loop took 1.27 and 1.5.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _tiles
from optaxclip._compat import enable_x64
from optaxclip._sums import (
    SMALL,
    Arrays,
    Kinds,
    Names,
    by_cell,
    by_size,
    by_type,
    cpu_sums,
    cpu_total,
    float64_sum,
    is_small,
    over_devices,
    over_kinds,
    root_of_float64,
    root_of_three,
    scaled,
    stacked,
    three_sums,
    unsafe,
)

_SHORT = 64  # elements of the largest unit that is measured with others in one read


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
    cpu, gpu, other = (functools.partial(f, **given) for f in forms)
    return by_platform(cpu, gpu, other, arrays)


def units(
    arrays: Arrays, axes: Sequence[tuple[int, ...]], over: Sequence[Names], dtype: Any
) -> list[jax.Array]:
    """Measures the Euclidean norms of the units of each real array; none is empty."""
    given = {"axes": tuple(axes), "over": tuple(over)}
    if dtype == jnp.float64:
        return units_by_scales([x.astype(dtype) for x in arrays], **given)
    forms = (units_on_cpu, units_on_gpu, units_by_scales)
    cpu, gpu, other = (functools.partial(f, **given) for f in forms)
    return by_platform(cpu, gpu, other, arrays)


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
    return by_platform(list, _tiles.cut_out, list, list(arrays))


def whole_on_cpu(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    """Sums in float64; large arrays in float32, and again if a cell needs it."""
    with enable_x64(True):
        sums = [cpu_total([arrays[i] for i in some], cells) for some, cells, _ in kinds]
        return root_of_float64(over_kinds(sums, kinds, sizes))


def units_on_cpu(
    arrays: Arrays, axes: Sequence[tuple[int, ...]], over: Sequence[Names]
) -> list[jax.Array]:
    """Sums in float64; large arrays in float32, and again if one of them needs it."""
    with enable_x64(True):
        sums, large = cpu_sums(arrays, axes)
        if large:

            def again(given):
                return [float64_sum(x, axes[i]) for i, x in zip(large, given[0])]

            off = [jnp.any(unsafe(sums[i])) for i in large]
            given = [arrays[i] for i in large], [sums[i] for i in large]
            off = functools.reduce(jnp.logical_or, off)
            found = lax.cond(off, again, lambda given: given[1], given)
            for i, s in zip(large, found, strict=True):
                sums[i] = s
        return [root_of_float64(s) for s in over_devices(sums, over, lax.psum)]


def whole_on_gpu(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    """Three sums; of small arrays from float64, many in one reduction."""
    joint = functools.partial(_gpu_joint, kinds=kinds, sizes=sizes)
    each = functools.partial(_gpu_each, kinds=kinds, sizes=sizes)
    return _tiles.unless_split(joint, each, arrays)


def units_on_gpu(
    arrays: Arrays, axes: Sequence[tuple[int, ...]], over: Sequence[Names]
) -> list[jax.Array]:
    """Sums in float64; of many small arrays that are whole in one reduction."""
    found: list[Any] = [None] * len(arrays)
    joint = [i for i, x in enumerate(arrays) if is_small(x, SMALL) and not over[i]]
    for alike in by_type(arrays, joint):
        norms = _tiles.unit_norms([arrays[i] for i in alike], [axes[i] for i in alike])
        for i, norm in zip(alike, norms, strict=True):
            found[i] = norm
    rest = [i for i, norm in enumerate(found) if norm is None]
    sums = [float64_sum(arrays[i], axes[i]) for i in rest]
    sums = over_devices(sums, [over[i] for i in rest], lax.psum)
    for i, s in zip(rest, sums, strict=True):
        found[i] = root_of_float64(s)
    return found


def whole_by_scales(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    """Three sums: for TPUs, and for float64 on every platform."""
    sums = [three_sums(x, None) for x in arrays]
    column = lambda some: stacked([sums[i] for i in some], axis=1)
    parts = [by_cell(column(some), cells) for some, cells, _ in kinds]
    return root_of_three(over_kinds(parts, kinds, sizes))


def units_by_scales(
    arrays: Arrays, axes: Sequence[tuple[int, ...]], over: Sequence[Names]
) -> list[jax.Array]:
    """Three sums: for TPUs, and for float64 on every platform."""
    sums = []
    for x, a in zip(arrays, axes, strict=True):
        each = lambda x, a=a: three_sums(x, a)
        joint = lambda x, a=a: three_sums(x, a, joint=True)
        size = math.prod(x.shape[i] for i in a)  # it may be symbolic
        short = isinstance(size, int) and size <= _SHORT and not is_small(x, SMALL)
        sums.append(_tiles.unless_split(joint, each, x) if short else each(x))
    return [root_of_three(s) for s in over_devices(sums, over, lax.psum)]


def by_platform(cpu: Callable, gpu: Callable, other: Callable, given: Any) -> Any:
    """Calls the function for the platform that the program is lowered for."""
    return lax.platform_dependent(given, cpu=cpu, cuda=gpu, rocm=gpu, default=other)


def _gpu_joint(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    parts = []
    for some, cells, _ in kinds:
        small, large = by_size([arrays[i] for i in some])
        found = []
        if small:
            found.append(scaled(_tiles.sums([arrays[some[i]] for i in small])))
        if large:
            sums = [three_sums(arrays[some[i]], None, joint=True) for i in large]
            found.append(jnp.stack(sums, axis=1))
        sums, order = jnp.concatenate(found, axis=1), np.argsort(small + large)
        if (order[1:] < order[:-1]).any():
            sums = sums[:, order]
        parts.append(by_cell(sums, cells))
    return root_of_three(over_kinds(parts, kinds, sizes))


def _gpu_each(arrays: Arrays, kinds: Kinds, sizes: Any = None) -> jax.Array:
    with enable_x64(True):
        sums = [float64_sum(x, None) for x in arrays]
        parts = [by_cell(stacked([sums[i] for i in some]), c) for some, c, _ in kinds]
        return root_of_float64(over_kinds(parts, kinds, sizes))


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
