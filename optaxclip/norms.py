"""Norms of arrays and trees that neither overflow, underflow nor lose bits.

Every norm of the library is measured here: of cells of whole arrays, side by side in
one vector, or of the units of each array.

* Sums are taken in float32 or wider (float64 if an array is float64), whatever the
  dtype of the leaves, and are never cast down.
* The Euclidean norm is right wherever it is representable, in one read of the updates
  and without a loop; in which form depends on the platform (`optaxclip._forms`).
* Derivatives are those of the norm, `d|x| = Re(x̄ dx)/|x|`, and 0 at `x = 0`.
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _forms, _mesh, _sums, _trees
from optaxclip import axes as axes_
from optaxclip._numerics import quotient
from optaxclip._sums import by_cell


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
    over = _mesh.layout(part, axis_name, "norms.tree_norm")
    return measure(part.arrays, over, [0] * len(part.arrays), 1, ord)[0]


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
    over = _mesh.layout(part, axis_name, "unitwise_norm", reduced)
    (norm,) = measure_units(part.arrays, over, reduced)
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


class Whole(NamedTuple):
    """Cells of whole arrays, in one vector. Hashable.

    Attributes:
      over: the mesh axes that each array is split over.
      owner: the cell of each array.
      length: how many cells there are.
    """

    over: _mesh.Over
    owner: tuple[int, ...]
    length: int

    def axes(self, i: int) -> None:
        """The axes of an array that lie in one cell, as of a reduction: all."""
        del i

    def each(self, cells: jax.Array) -> list[jax.Array]:
        """The entry of its cell, for every array."""
        return [cells[i] for i in self.owner]

    def combined(self, values: Sequence[jax.Array], how: "_How") -> jax.Array:
        """One value for each cell, of one for each array, over all devices."""
        found = []
        for members, cells, names in self.kinds(values):
            some = how.by_cell(_sums.stacked([values[i] for i in members]), cells)
            found.append(how.across(some, names) if names else some)
        return functools.reduce(how.two, found)

    def kinds(self, arrays: Sequence[jax.Array]) -> _sums.Kinds:
        """Arrays that vary alike: members, their cells, the axes to sum over."""
        alike: dict[Any, list[int]] = {}
        for i, x in enumerate(arrays):
            key = self.over[i], tuple(sorted(_mesh.varying(x)))
            alike.setdefault(key, []).append(i)
        return [
            (members, (tuple(self.owner[i] for i in members), self.length), names)
            for (names, _), members in sorted(alike.items())
        ]

    def euclidean(
        self, arrays: Sequence[jax.Array], dtype: Any, mean: bool
    ) -> jax.Array:
        """The Euclidean norm of each cell, or the root of the mean of the squares."""
        full = [i for i, x in enumerate(arrays) if not _is_empty(x)]
        if not full:
            return jnp.zeros(self.length, dtype)
        some = self._replace(
            over=tuple(self.over[i] for i in full),
            owner=tuple(self.owner[i] for i in full),
        )
        given = [_real(arrays[i]) for i in full]
        measure = functools.partial(_forms.whole, given, some.kinds(given), dtype)
        if not mean:
            return measure()
        sizes = self.sizes(arrays)
        if all(isinstance(size, int) for size in sizes):
            return measure(sizes)
        return self.divided(measure(), _roots(sizes, dtype))  # symbolic

    def sizes(self, arrays: Sequence[jax.Array]) -> list[Any]:
        """The number of elements of each cell on all devices, at least 1."""
        sizes: list[Any] = [0] * self.length
        for i, x in enumerate(arrays):
            sizes[self.owner[i]] += x.size * _mesh.size(self.over[i])
        return [max(size, 1) if isinstance(size, int) else size for size in sizes]

    def divided(self, cells: jax.Array, by: list[jax.Array]) -> jax.Array:
        """Each cell over a number of its own."""
        return cells / _sums.stacked(by)


class Units(NamedTuple):
    """Units of arrays: an array of them for each, with length 1 where it is reduced.

    Attributes:
      over: the mesh axes that the units of each array are split over.
      reduced: for each array, the axes that a unit spans.
    """

    over: _mesh.Over
    reduced: tuple[tuple[int, ...], ...]

    def axes(self, i: int) -> tuple[int, ...]:
        """The axes of an array that lie in one cell, as of a reduction."""
        return self.reduced[i]

    def each(self, cells: list[jax.Array]) -> list[jax.Array]:
        """The cells of every array."""
        return cells

    def combined(self, values: Sequence[jax.Array], how: "_How") -> list[jax.Array]:
        """The same over all devices."""
        return _sums.over_devices(values, self.over, how.across)

    def euclidean(
        self, arrays: Sequence[jax.Array], dtype: Any, mean: bool
    ) -> list[jax.Array]:
        """The Euclidean norm of each unit, or the root of the mean of the squares."""
        full = [i for i, x in enumerate(arrays) if not _is_empty(x)]
        norms = [
            jnp.zeros([1 if d in a else n for d, n in enumerate(x.shape)], dtype)
            for x, a in zip(arrays, self.reduced, strict=True)
        ]
        if full:
            some = lambda values: [values[i] for i in full]
            given = [_real(x) for x in some(arrays)]
            over = some(self.over)
            found = _forms.units(given, some(self.reduced), over, dtype)
            for i, norm in zip(full, found, strict=True):
                norms[i] = norm
        if not mean:
            return norms
        return self.divided(norms, _roots(self.sizes(arrays), dtype))

    def sizes(self, arrays: Sequence[jax.Array]) -> list[Any]:
        """The number of elements of a unit of each array, on all devices."""
        sizes = [
            _mesh.size(over) * math.prod(x.shape[a] for a in axes)
            for x, over, axes in zip(arrays, self.over, self.reduced)
        ]
        return [max(size, 1) if isinstance(size, int) else size for size in sizes]

    def divided(self, cells: list[jax.Array], by: list[jax.Array]) -> list[jax.Array]:
        """The cells of each array over a number of its own."""
        return [c / b for c, b in zip(cells, by, strict=True)]


class _How(NamedTuple):
    """A sum or a maximum: of the entries of a cell, of devices, and of two."""

    by_cell: Callable
    across: Callable
    two: Callable


def measure(
    arrays: Sequence[jax.Array],
    over: _mesh.Over,
    owner: Sequence[int],
    count: int,
    ord: float | str = 2.0,
) -> jax.Array:
    """Measures norms of whole arrays.

    Where other devices hold other parts of a cell there is one collective for each set
    of mesh axes, however many arrays there are.

    Args:
      arrays: real or complex floating point arrays.
      over: the mesh axes that each array is split over.
      owner: the cell that each array belongs to; cells without arrays have norm 0.
      count: how many cells there are.
      ord: the order, as `check_ord` returns it.

    Returns:
      A vector of one norm for each cell, float32, or float64 if an array is.
    """
    return _jitted_norms(tuple(arrays), Whole(over, tuple(owner), count), ord)


def measure_units(
    arrays: Sequence[jax.Array],
    over: _mesh.Over,
    reduced: Sequence[tuple[int, ...]],
    ord: float | str = 2.0,
) -> list[jax.Array]:
    """Measures the norm of each unit of arrays, as `measure` does.

    Args:
      arrays: real or complex floating point arrays.
      over: the mesh axes that the units of each array are split over.
      reduced: for each array, the axes that a unit spans.
      ord: the order, as `check_ord` returns it.

    Returns:
      For each array its norms, with length 1 for the axes that a unit spans.
    """
    return _jitted_norms(tuple(arrays), Units(over, tuple(reduced)), ord)


def total(counts: Sequence[jax.Array], over: _mesh.Over) -> jax.Array:
    """Adds up int32 counts of arrays, those of all devices."""
    if not counts:
        return jnp.zeros((), jnp.int32)
    return Whole(over, (0,) * len(counts), 1).combined(counts, _SUM)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norms(arrays, cells, p):
    dtype = _trees.widest(*(x.dtype for x in arrays))
    if not arrays:
        return jnp.zeros(cells.length, dtype) if isinstance(cells, Whole) else []
    if p in (2, "rms"):
        return cells.euclidean(arrays, dtype, mean=p == "rms")
    moduli = [_modulus(x, dtype) for x in arrays]
    if p == 1:
        return cells.combined(
            [_sum(m, cells.axes(i)) for i, m in enumerate(moduli)], _SUM
        )
    largest = _largest_moduli(arrays, moduli, cells, dtype)
    if p == math.inf:
        return largest
    # Powers of moduli that are at most 1 cannot overflow.
    usable = lambda m: jnp.where((m > 0) & jnp.isfinite(m), m, 1)
    usable = jax.tree.map(usable, largest)
    shares = [m / u for m, u in zip(moduli, cells.each(usable), strict=True)]
    sums = cells.combined(
        [_sum(s**p, cells.axes(i)) for i, s in enumerate(shares)], _SUM
    )

    def root(m, u, s):
        # In two steps for p < 1, where s^(1/p) may be larger than the norm can be.
        power = s ** (0.5 / p) * u * s ** (0.5 / p) if p < 1 else s ** (1 / p) * u
        return jnp.where(jnp.isfinite(m), power, m)

    return jax.tree.map(root, largest, usable, sums)


@_norms.defjvp
def _norms_jvp(cells, p, primals, tangents):
    (arrays,), (tangents,) = primals, tangents
    found = _norms(arrays, cells, p)
    changes, ties = [], []
    for i, (x, dx, n) in enumerate(zip(arrays, tangents, cells.each(found))):
        x, dx = (t.astype(_trees.widened(t.dtype, n.dtype)) for t in (x, dx))
        safe = jnp.where(n > 0, n, 1)
        if p in (2, "rms"):
            slope = jnp.where(n > 0, quotient(x, safe), 0)
        elif p == math.inf:
            slope = jnp.where(jnp.abs(x) == n, jnp.sign(x), 0)
            ties.append(_sum((jnp.abs(x) == n).astype(n.dtype), cells.axes(i)))
        else:
            modulus = jnp.where(x != 0, jnp.abs(x), safe)
            steep = quotient(safe ** (1 - p), modulus ** (1 - p))
            flat = quotient(modulus, safe) ** (p - 1)
            slope = jnp.sign(x) * (steep if p < 1 else flat)
        changes.append(_sum((jnp.conj(slope) * dx).real, cells.axes(i)))
    if not changes:
        return found, jax.tree.map(jnp.zeros_like, found)
    changes = cells.combined(changes, _SUM)
    if p == "rms":
        roots = _roots(cells.sizes(arrays), _trees.widest(*(x.dtype for x in arrays)))
        changes = cells.divided(cells.divided(changes, roots), roots)
    if ties:  # moduli that tie for the largest share the derivative
        ties = cells.combined(ties, _SUM)
        changes = jax.tree.map(lambda c, t: c / jnp.maximum(t, 1), changes, ties)
    return found, changes


# Outside of jit too, a norm is one compiled call.
_jitted_norms = jax.jit(_norms, static_argnums=(1, 2), inline=True)


def _largest_moduli(arrays, moduli, cells, dtype):
    """The largest moduli; NaN where one is, which a maximum over devices may lose."""
    local = [_max(m, cells.axes(i)) for i, m in enumerate(moduli)]
    largest = cells.combined(local, _MAX)
    # Read behind a barrier, or XLA:CPU would write out what both reductions read.
    again = [_modulus(x, dtype) for x in _mesh.barrier(arrays)]
    lost = cells.combined(
        [_sum(m - m, cells.axes(i)) for i, m in enumerate(again)], _SUM
    )
    keep = lambda z, m: jnp.where(jnp.isnan(z) & (m < jnp.inf), z, m)
    return jax.tree.map(keep, lost, largest)


def _largest_by_cell(values, cells):
    mine = np.arange(cells[1])[:, None] == np.asarray(cells[0])
    return jnp.max(jnp.where(mine, values, 0), axis=-1)


_SUM = _How(by_cell, lax.psum, jnp.add)
_MAX = _How(_largest_by_cell, lax.pmax, jnp.maximum)


def _modulus(x, dtype):
    return jnp.abs(x.astype(_trees.widened(x.dtype, dtype)))


def _real(x):
    return jnp.abs(x) if jnp.iscomplexobj(x) else x


def _is_empty(x):
    return isinstance(x.size, int) and x.size == 0


def _roots(sizes, dtype):
    """The roots of numbers of elements, which may be symbolic."""

    def root(size):
        if isinstance(size, int):
            return jnp.asarray(np.sqrt(np.float64(size)), dtype)
        return jnp.sqrt(jnp.maximum(jnp.asarray(size).astype(dtype), 1))

    return [root(size) for size in sizes]


def _sum(x, axis):
    return jnp.sum(x, axis=axis, keepdims=axis is not None)


def _max(x, axis):
    return jnp.max(x, axis=axis, keepdims=axis is not None, initial=0)
