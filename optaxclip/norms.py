"""Norms of arrays and trees that neither overflow, underflow nor lose bits.

Every norm of the library is measured here, by one function over three static choices:
which axes of each array are reduced, which arrays share one norm, and the order.

* Sums are taken in float32 or wider (float64 if an array is float64), whatever the
  dtype of the leaves, and are never cast down.
* The Euclidean norm is right wherever it is representable. The squares are summed once;
  only if the sum leaves the range in which no square can have overflowed or vanished
  is the same loop run again on values scaled by a power of two. The loop body is
  compiled once, and in the normal range runs once: one read of the updates.
* Derivatives are those of the norm, `d|x| = Re(x̄ dx)/|x|`, and 0 at `x = 0`.
"""

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip import _mesh, _trees
from optaxclip import axes as axes_
from optaxclip._numerics import quotient

# Larger arrays are summed without a scale in the first pass, for the multiplication by
# it costs XLA:CPU a third more, and have a scale of their own in the others, for it
# writes out the broadcast of a scalar that arrays of one shape share.
_SMALL = 2**14
# So many scalars are added in one kernel. XLA:CPU's fusion takes cubic time in the
# number of reductions that feed one sum (58 s instead of 4 s for 3,000 leaves).
_FAN_IN = 128


def tree_norm(
    tree: Any, ord: float | str | None = None, axis_name: _mesh.AxisName = None
) -> jax.Array:
    """Measures the norm of all leaves of a tree together.

    `(sum |x|^p)^(1/p)` over every element of every leaf; `ord` is p.

    Args:
      tree: pytree of arrays. Leaves that are not floating point do not count.
      ord: None or 2 (Euclidean), 1, `inf` (largest modulus), any p > 0, or "rms"
        (Euclidean norm divided by the square root of the number of elements).
      axis_name: the mesh axes that leaves are split over, inside `shard_map` and
        `pmap`; see `optaxclip.sharded`. None: read from their types.

    Returns:
      A scalar, float32 or wider; 0 for an empty tree, NaN or inf if an element is.

    Raises:
      ValueError: if `ord` is none of these, or it is not known how a leaf is split.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import norms
      >>> tree = {"w": jnp.array([3e20, 4e20]), "b": jnp.zeros(2, jnp.bfloat16)}
      >>> print(f"{norms.tree_norm(tree):.3g} {norms.tree_norm(tree, ord=1):.3g}")
      5e+20 7e+20
    """
    part = _trees.counted(_mesh.aligned(tree, None, "norms.tree_norm"))
    ord = check_ord(ord, "norms.tree_norm")
    split = _mesh.layout(part, axis_name, "norms.tree_norm")
    return measure(part.arrays, split, groups=[range(len(part.arrays))], ord=ord)[0]


def unitwise_norm(
    x: jax.typing.ArrayLike,
    axis: int | tuple[int, ...] | None = None,
    axis_name: _mesh.AxisName = None,
) -> jax.Array:
    """Measures the Euclidean norm of each unit of an array.

    Args:
      x: array of any real or complex dtype; integers are taken as float32.
      axis: the axes that are reduced. None chooses them by rank as
        `optaxclip.axes.by_rank` does.
      axis_name: the `PartitionSpec` of `x` inside `shard_map`, if `x` is split; see
        `optaxclip.sharded`.

    Returns:
      An array of the shape of `x`, float32 or wider, each unit holding its norm.

    Raises:
      ValueError: if `axis` is out of range, or None and the rank is above 5; if it is
        not known how `x` is split.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> print(optaxclip.unitwise_norm(jnp.array([[3., 0.], [4., 1.]])))
      [[5. 1.]
       [5. 1.]]

    References:
      optax.unitwise_norm. Differs: the result is never narrower than float32 and its
      derivative at a unit of zeros is 0 instead of NaN.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)
    part = _trees.counted(_mesh.aligned(x, None, "unitwise_norm"))
    (described,) = _mesh.whole(part, axis_name, "unitwise_norm")
    reduced = axes_.resolve(axis, described, "unitwise_norm: axis")
    split = _mesh.layout(part, axis_name, "unitwise_norm", reduced)
    (norm,) = measure(part.arrays, split, axes=reduced)
    return norm + jnp.zeros_like(x, dtype=norm.dtype)


def check_ord(ord: Any, who: str) -> float | str:
    """Returns the order as a float or "rms", or refuses it."""
    rule = "must be None, 1, 2, inf, any p > 0 or 'rms'"
    if isinstance(ord, jax.Array):
        raise TypeError(
            f"{who}: ord {rule}, got an array. It is static: with "
            "inject_hyperparams, name it in static_args."
        )
    if ord is None:
        return 2.0
    if ord == "rms":
        return "rms"
    number = isinstance(ord, numbers.Real) and not isinstance(ord, bool)
    if not number or not float(ord) > 0:
        raise ValueError(f"{who}: ord {rule}, got ord={ord!r}. Pass one of these.")
    return float(ord)


def measure(
    arrays: Sequence[jax.Array],
    layout: _mesh.Layout,
    *,
    axes: Sequence[tuple[int, ...]] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    ord: float | str = 2.0,
) -> list[jax.Array]:
    """Measures one norm per array, per slice of each array, or per group of arrays.

    Where other devices hold other parts of a cell there is one collective for each set
    of mesh axes, however many arrays there are.

    Args:
      arrays: real or complex floating point arrays.
      layout: the mesh axes that the cells are split over.
      axes: for each array, the axes that are reduced; they are kept with length 1.
        None: all axes, giving scalars.
      groups: positions of the arrays that share a norm. None: each has its own.
      ord: the order, as `check_ord` returns it.

    Returns:
      The norms of each group, float32 or wider.
    """
    static_axes = (None,) * len(arrays) if axes is None else tuple(axes)
    each = [(i,) for i in range(len(arrays))]
    static_groups = tuple(map(tuple, each if groups is None else groups))
    static = (layout, static_axes, static_groups, ord)
    return list(_jitted_norms(tuple(arrays), *static))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _norms(arrays, layout, axes, groups, p):
    wide = _widened(arrays, groups)
    if p in (2, "rms"):
        return _euclidean(wide, layout, axes, groups, mean=p == "rms")
    moduli = [jnp.abs(x) for x in wide]
    if p == 1:
        return _totals([_sum(m, a) for m, a in zip(moduli, axes)], layout, groups)
    largest = _largest_moduli(arrays, moduli, layout, axes, groups)
    if p == math.inf:
        return largest
    # Powers of moduli that are at most 1 cannot overflow.
    usable = [jnp.where((m > 0) & jnp.isfinite(m), m, 1) for m in largest]
    units = _per_array(usable, groups, len(moduli))
    sums = [_sum((m / u) ** p, a) for m, u, a in zip(moduli, units, axes)]
    return [
        jnp.where(jnp.isfinite(m), (s ** (0.5 / p) * u) * s ** (0.5 / p), m)
        for s, u, m in zip(_totals(sums, layout, groups), usable, largest)
    ]


@_norms.defjvp
def _norms_jvp(layout, axes, groups, p, primals, tangents):
    (arrays,), (tangents,) = primals, tangents
    found = _norms(arrays, layout, axes, groups, p)
    changes, ties = [], []
    norms = _per_array(found, groups, len(arrays))
    for x, dx, n, a in zip(arrays, tangents, norms, axes):
        x, dx = (t.astype(_trees.widened(t.dtype, n.dtype)) for t in (x, dx))
        safe = jnp.where(n > 0, n, 1)
        if p in (2, "rms"):
            slope = jnp.where(n > 0, quotient(x, safe), 0)
        elif p == math.inf:
            slope = jnp.where(jnp.abs(x) == n, jnp.sign(x), 0)
            ties.append(_sum((jnp.abs(x) == n).astype(n.dtype), a))
        else:
            modulus = jnp.where(x != 0, jnp.abs(x), safe)
            steep = quotient(safe ** (1 - p), modulus ** (1 - p))
            flat = quotient(modulus, safe) ** (p - 1)
            slope = jnp.sign(x) * (steep if p < 1 else flat)
        changes.append(_sum((jnp.conj(slope) * dx).real, a))
    changes = _totals(changes, layout, groups)
    if p == "rms":
        sizes = _cell_sizes(arrays, layout, axes, groups)
        changes = [c / max(size, 1) for c, size in zip(changes, sizes)]
    if ties:  # moduli that tie for the largest share the derivative
        ties = _totals(ties, layout, groups)
        changes = [c / jnp.maximum(t, 1) for c, t in zip(changes, ties)]
    return found, changes


# Outside of jit too, a norm is one compiled call.
_jitted_norms = jax.jit(_norms, static_argnums=(1, 2, 3, 4), inline=True)


def _euclidean(arrays, layout, axes, groups, mean):
    """Sums the squares once, and again scaled by a power of two if a cell needs it."""
    if not arrays:
        return [jnp.zeros((), jnp.float32) for _ in groups]
    # A constant leaf must not be seen as one: XLA would square it and the scale apart.
    arrays = _mesh.barrier(arrays)
    # Devices that measure each for itself may run different numbers of passes.
    alone = _mesh.alone(arrays, layout)
    arrays = [_mesh.varying_over(x, alone) for x in arrays]
    start = [_unmeasured(arrays, layout, axes, group) for group in groups]
    dtypes = {n.dtype for n in start}
    sizes = _cell_sizes(arrays, layout, axes, groups)
    safe = {dtype: _safe_range(dtype, max(sizes)) for dtype in dtypes}

    def run(carry):
        # Pass 0 measures as is, 1 scales down for overflow, 2 scales up for underflow.
        this, found = carry
        scales = {dtype: _power_of_two(dtype, this) for dtype in dtypes}
        renewed = {
            dtype: (
                jnp.where(this == 2, lo, 0).astype(dtype),
                jnp.where(this == 2, jnp.inf, hi).astype(dtype),
            )
            for dtype, (lo, hi) in safe.items()
        }
        sums = _totals(_squares(arrays, axes, scales, this), layout, groups)
        if mean:
            sums = [s / max(size, 1) for s, size in zip(sums, sizes)]
        norms = []
        for s, old in zip(sums, found, strict=True):
            low, high = renewed[s.dtype]
            new = lax.div(lax.sqrt(s), lax.full_like(s, scales[s.dtype]))
            # What is in range, or NaN already, stays as an earlier pass measured it.
            unsafe = lax.bitwise_or(old < low, old > high)
            norms.append(lax.select(unsafe, new, old))
        # Scalars of one dtype, and so of one safe range, are compared together.
        alike = {(n.shape, n.dtype) for n in norms} == {((), norms[0].dtype)}
        seen = [_stacked(norms)] if alike else norms
        large = _count([n > safe[n.dtype][1] for n in seen])
        small = _count([n < safe[n.dtype][0] for n in seen])
        if layout.beside:  # all devices must run the same passes
            large, small = lax.psum((large, small), layout.beside)
        following = jnp.where((this < 2) & (small > 0), 2, 3)
        following = jnp.where((this < 1) & (large > 0), 1, following)
        return following.astype(jnp.int32), norms

    first = _mesh.varying_over(jnp.int32(0), alone)
    return lax.while_loop(lambda carry: carry[0] < 3, run, (first, start))[1]


def _largest_moduli(arrays, moduli, layout, axes, groups):
    """The largest moduli; NaN where one is, which a maximum over devices may lose."""
    local = [_max(m, a) for m, a in zip(moduli, axes)]
    largest = _mesh.joined(local, layout, groups, _largest, lax.pmax)
    # Read behind a barrier, or XLA:CPU would write out what both reductions read.
    again = [jnp.abs(x) for x in _widened(_mesh.barrier(arrays), groups)]
    zeros = [_sum(m - m, a) for m, a in zip(again, axes)]
    lost = _totals(zeros, layout, groups)
    return [
        jnp.where(jnp.isnan(z) & (m < jnp.inf), z, m) for z, m in zip(lost, largest)
    ]


def _unmeasured(arrays, layout, axes, group):
    """An infinite norm of the shape, dtype and place of one cell."""
    if not group:
        return jnp.full((), jnp.inf, jnp.float32)
    x, axis, over = arrays[group[0]], axes[group[0]], layout.over[group[0]]
    part = functools.partial(_sum, axis=axis)
    measured = lambda x: lax.psum(part(x), over) if over else part(x)
    return _mesh.full(jax.eval_shape(measured, x.real), jnp.inf)


def _power_of_two(dtype, this):
    exponent = jnp.finfo(dtype).maxexp * 5 // 8
    down, up = 2.0**-exponent, 2.0**exponent
    return jnp.where(this == 0, 1, jnp.where(this == 1, down, up)).astype(dtype)


def _squares(arrays, axes, scales, this):
    """Sums `|scale * x|^2` over the axes of each array."""
    shared: dict[Any, jax.Array] = {}
    sums: list[Any] = [None] * len(arrays)
    for i, x in enumerate(arrays):
        like = jax.typeof(x)
        if x.size <= _SMALL:
            if like not in shared:
                shared[like] = lax.full_like(x, scales[x.real.dtype], x.real.dtype)
            sums[i] = _square_sum(x, axes[i], shared[like])
    large = [i for i, x in enumerate(arrays) if x.size > _SMALL]

    def plain(xs):
        return [_square_sum(x, axes[i]) for x, i in zip(xs, large)]

    def scaled(xs):
        own = lax.optimization_barrier([scales[x.real.dtype] for x in xs])
        return [_square_sum(x, axes[i], s) for x, i, s in zip(xs, large, own)]

    if large:
        measured = lax.cond(this == 0, plain, scaled, [arrays[i] for i in large])
        for i, s in zip(large, measured):
            sums[i] = s
    return sums


def _square_sum(x, axis, scale=None):
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    if scale is not None:
        parts = [part * scale for part in parts]
    return _sum(functools.reduce(jnp.add, [part * part for part in parts]), axis)


def _widened(arrays, groups):
    """Casts each array to the widest dtype of its group, at least float32."""
    new = list(arrays)
    for group in groups:
        real = _trees.widest(*(arrays[i].dtype for i in group))
        for i in group:
            new[i] = arrays[i].astype(_trees.widened(arrays[i].dtype, real))
    return new


def _safe_range(dtype, size):
    """The norms that a plain sum of `size` squares gives to the last bits."""
    info = jnp.finfo(dtype)
    smallest = float(info.smallest_normal) * max(size, 1) / float(info.eps)
    return math.sqrt(smallest), math.sqrt(float(info.max) / 4)


def _cell_sizes(arrays, layout, axes, groups):
    """How many elements one cell of each group has, on all devices together."""
    sizes = [
        _mesh.size(over) * math.prod(x.shape if a is None else [x.shape[i] for i in a])
        for x, over, a in zip(arrays, layout.over, axes)
    ]
    return [sum(sizes[i] for i in group) for group in groups]


def _totals(values, layout, groups):
    return _mesh.joined(values, layout, groups, _total, lax.psum)


def _per_array(cells, groups, count):
    spread: list[Any] = [None] * count
    for cell, group in zip(cells, groups, strict=True):
        for i in group:
            spread[i] = cell
    return spread


def _total(values):
    if not values:
        return jnp.zeros((), jnp.float32)
    if values[0].ndim == 0 and len(values) > _FAN_IN:
        return jnp.sum(_stacked(values))
    return functools.reduce(jnp.add, values)


def _largest(values):
    return functools.reduce(jnp.maximum, values or [jnp.zeros((), jnp.float32)])


def _count(flags):
    return _total([jnp.any(flag).astype(jnp.float32) for flag in flags])


def _stacked(values):
    """Stacks scalars, many of them in blocks that no compiler fuses into one kernel."""
    if len(values) <= _FAN_IN:
        return jnp.stack(values)
    blocks = [values[i : i + _FAN_IN] for i in range(0, len(values), _FAN_IN)]
    return jnp.concatenate([_fenced(jnp.stack(block)) for block in blocks])


def _fenced(block):
    """The same values, sorted by the place they have: nothing fuses through a sort."""
    return lax.sort((lax.iota(jnp.int32, block.size), block), num_keys=1)[1]


def _sum(x, axis):
    return jnp.sum(x, axis=axis, keepdims=axis is not None)


def _max(x, axis):
    return jnp.max(x, axis=axis, keepdims=axis is not None, initial=0)
