"""What counts as one magnitude: an element, a unit, a leaf, a group, the whole tree.

A scope splits updates into magnitudes and what is left, the directions:

    magnitudes, rebuild = scope.split(updates, norm, axis_name)
    updates = rebuild(new_magnitudes, alone)

`magnitudes` is a pytree of real arrays, float32 or wider, each entry a *cell*; they
broadcast against the leaves they were measured on. `rebuild` takes the new magnitude
of every cell, and whether the cell is to be left alone: then its updates come out bit
for bit as they went in. The other laws every scope obeys:

* the new magnitudes are what measuring the result gives, to the last bits of the leaf
  dtype; dtypes, weak types and structure are those that went in;
* a cell whose magnitude is NaN or inf comes out as NaN, unless it is left alone: its
  finite neighbours do not silently become zeros. `element` and `side` have no
  neighbours: there inf takes the new magnitude and NaN stays;
* leaves that are not floating point, `None` and `MaskedNode` pass through uncounted;
* derivatives are finite, and right wherever the norm has one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip import _mesh, _trees, axes, norms
from optaxclip._checks import check_number
from optaxclip._numerics import quotient, rescaled

PyTree = Any
Rebuild = Callable[[PyTree, PyTree], PyTree]


class Scope(NamedTuple):
    """What counts as one magnitude.

    Attributes:
      split: `(updates, norm, axis_name=None) -> (magnitudes, rebuild)`. `norm` is None,
        or the norm of the whole tree if the caller knows it; scopes that measure
        something else ignore it. `axis_name` says how leaves are split, as for
        `optaxclip.sharded`; scopes that sum nothing ignore it.
      elementwise: whether there are as many cells as elements.
    """

    split: Callable[..., tuple[PyTree, Rebuild]]
    elementwise: bool = False

    def described(self, params: PyTree, axis_name: _mesh.AxisName = None) -> PyTree:
        """Describes the magnitudes of updates of these params; nothing is measured."""
        known = _mesh.for_shapes(axis_name)
        # Only types of norms tell over which axes they vary.
        norm = None if _mesh.tracked() else 0.0
        return jax.eval_shape(lambda p: self.split(p, norm, known)[0], params)

    def own(
        self, params: PyTree, updates: PyTree, axis_name: _mesh.AxisName, who: str
    ) -> PyTree:
        """Measures the params of some updates, or refuses in the name of `who`."""
        return self.split(_trees.align(params, updates, who), None, axis_name)[0]


def element() -> Scope:
    """Makes every element a cell: magnitude `|u|`, direction the sign or the phase.

    Returns:
      A scope whose magnitudes have the structure and shapes of the updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> magnitudes, _ = scopes.element().split(jnp.array([3.0, -4.0]), None)
      >>> print(magnitudes)
      [3. 4.]
    """

    def split(updates, norm, axis_name=None):
        del norm, axis_name
        part = _trees.counted(updates)
        seen = [_modulus(u) for u in part.arrays]

        def rebuild(kept, alone):
            cells = zip(part.arrays, seen, part.values(kept), part.values(alone))
            return part.replace([_turn(*cell) for cell in cells])

        return part.cells(seen), rebuild

    return Scope(split, elementwise=True)


def side() -> Scope:
    """Makes two cells of every element: how far it is below zero, how far above.

    Returns:
      A scope whose magnitudes are `{"negative": max(-u, 0), "positive": max(u, 0)}`,
      each with the structure and shapes of the updates. Bounds may be given by side.

    Raises:
      TypeError: by `split`, for complex updates, which have no sides.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> magnitudes, _ = scopes.side().split(jnp.array([3.0, -4.0]), None)
      >>> print(magnitudes["negative"], magnitudes["positive"])
      [0. 4.] [3. 0.]
    """

    def split(updates, norm, axis_name=None):
        del norm, axis_name
        part = _trees.counted(updates)
        for path, leaf in _trees.named(updates):
            if jnp.iscomplexobj(leaf):
                raise TypeError(
                    f"scopes.side: complex updates have no sides, got {leaf.dtype} at "
                    f"{path}. Use the element scope, which bounds the modulus."
                )
        wide = [u.astype(_trees.widest(u.dtype)) for u in part.arrays]
        zeros = [jnp.zeros_like(w) for w in wide]
        seen = {
            "negative": part.cells([jnp.maximum(-w, z) for w, z in zip(wide, zeros)]),
            "positive": part.cells([jnp.maximum(w, z) for w, z in zip(wide, zeros)]),
        }

        def rebuild(kept, alone):
            low, high = (part.values(kept[s]) for s in ("negative", "positive"))
            still = [part.values(alone[s]) for s in ("negative", "positive")]
            new = []
            for i, (u, w) in enumerate(zip(part.arrays, wide, strict=True)):
                size = jnp.where(w < 0, low[i], high[i])
                signed = jnp.copysign(size, w).astype(u.dtype)
                new.append(jnp.where(still[0][i] & still[1][i], u, signed))
            return part.replace(new)

        return seen, rebuild

    return Scope(split, elementwise=True)


def unit(axis: Any = None, ord: float | str | None = None) -> Scope:
    """Makes every slice that feeds one output a cell, such as a column of a kernel.

    Args:
      axis: which axes a unit spans: None (by rank), an int, a tuple, a pytree prefix
        of these, or a callable of path and leaf; see `optaxclip.axes`.
      ord: order of the norm, as in `norms.tree_norm`.

    Returns:
      A scope whose magnitudes have the structure of the updates and their shapes, with
      1 for every axis that a unit spans.

    Raises:
      TypeError: for an `axis` or `ord` that is not static.
      ValueError: for another `ord`; by `split`, for axes out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> magnitudes, _ = scopes.unit().split(jnp.array([[3.0, 0.0], [4.0, 1.0]]), None)
      >>> print(magnitudes)
      [[5. 1.]]
    """
    ord = norms.check_ord(ord, "scopes.unit")

    def split(updates, norm, axis_name=None):
        del norm
        part = _trees.counted(updates)
        described = part.cells(_mesh.whole(part, axis_name, "scopes.unit"))
        spanned = axes.resolve(axis, described, "scopes.unit: axis")
        layout = _mesh.layout(part, axis_name, "scopes.unit", spanned)
        seen = norms.measure(part.arrays, layout, axes=spanned, ord=ord)
        return part.cells(seen), _rescaling(part, seen, part.values)

    return Scope(split)


def leaf(ord: float | str | None = None) -> Scope:
    """Makes every array of the tree a cell.

    Flax' `LSTMCell` and `GRUCell` hold one array per gate, so there a leaf is a gate.

    Args:
      ord: order of the norm, as in `norms.tree_norm`.

    Returns:
      A scope whose magnitudes have the structure of the updates, each a scalar.

    Raises:
      ValueError: for another `ord`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> updates = {"b": jnp.array([1.0]), "w": jnp.array([3.0, 4.0])}
      >>> magnitudes, _ = scopes.leaf().split(updates, None)
      >>> print(float(magnitudes["b"]), float(magnitudes["w"]))
      1.0 5.0
    """
    ord = norms.check_ord(ord, "scopes.leaf")

    def split(updates, norm, axis_name=None):
        del norm
        part = _trees.counted(updates)
        layout = _mesh.layout(part, axis_name, "scopes.leaf")
        seen = norms.measure(part.arrays, layout, ord=ord)

        def rebuild(kept, alone):
            cells = zip(seen, part.values(kept), part.values(alone), strict=True)
            terms = [_terms(*cell) for cell in cells]
            pairs = zip(part.arrays, terms, strict=True)
            return part.replace([_precisely(u, *t) for u, t in pairs])

        return part.cells(seen), rebuild

    return Scope(split)


def peak(rescale: bool = False) -> Scope:
    """Makes every array a cell of which only the largest elements are cut.

    The magnitude is the largest modulus; elements within the new one stay as they are,
    bit for bit, and those beyond get it: the projection on the ball of the inf norm.
    `leaf(ord=inf)` has the same magnitudes and scales the array as a whole.

    Args:
      rescale: elements beyond are multiplied by new / old instead, so that they keep
        their proportions, but fall below some that were smaller.

    Returns:
      A scope whose magnitudes have the structure of the updates, each a scalar.

    Raises:
      TypeError: if `rescale` is not a bool.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, scopes
      >>> updates = jnp.array([1.0, -4.0, 8.0])
      >>> print(clip_by(scopes.peak(), 2.0).update(updates, None)[0])
      [ 1. -2.  2.]
      >>> print(clip_by(scopes.peak(rescale=True), 2.0).update(updates, None)[0])
      [ 1. -1.  2.]

    References:
      With `rescale`, AdaClip of Stable-SPAM: Huang et al., 2025,
      https://arxiv.org/abs/2502.17055
    """
    if not isinstance(rescale, bool):
        raise TypeError(
            f"scopes.peak: rescale must be True or False, got rescale={rescale!r}. "
            "Pass one of these."
        )

    def split(updates, norm, axis_name=None):
        del norm
        part = _trees.counted(updates)
        layout = _mesh.layout(part, axis_name, "scopes.peak")
        seen = norms.measure(part.arrays, layout, ord=math.inf)

        def rebuild(kept, alone):
            cells = zip(part.arrays, seen, part.values(kept), part.values(alone))
            return part.replace([_cut(*cell, rescale) for cell in cells])

        return part.cells(seen), rebuild

    return Scope(split)


def group(
    labels: PyTree | Callable[[PyTree], PyTree], ord: float | str | None = None
) -> Scope:
    """Makes all leaves of one label a cell.

    Args:
      labels: pytree of labels, a prefix of the updates, or a callable that makes one of
        the updates, as for `optax.partition`.
      ord: order of the norm, as in `norms.tree_norm`.

    Returns:
      A scope whose magnitudes are a dict from label to scalar. A label without leaves
      has magnitude 0.

    Raises:
      ValueError: for another `ord`; by `split`, if a leaf has no label.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0]), "c": jnp.ones(1)}
      >>> labels = {"a": "hidden", "b": "hidden", "c": "output"}
      >>> magnitudes, _ = scopes.group(labels).split(updates, None)
      >>> print({label: float(m) for label, m in magnitudes.items()})
      {'hidden': 5.0, 'output': 1.0}
    """
    ord = norms.check_ord(ord, "scopes.group")

    def split(updates, norm, axis_name=None):
        del norm
        part = _trees.counted(updates)
        tree = labels(updates) if _trees.is_function(labels) else labels
        cells = _trees.only_counted(updates)
        label_of = jax.tree.leaves(_trees.spread(tree, cells, "scopes.group: labels"))
        names = _sorted_labels(tree)
        groups = [[i for i, name in enumerate(label_of) if name == n] for n in names]
        layout = _mesh.layout(part, axis_name, "scopes.group")
        seen = norms.measure(part.arrays, layout, groups=groups, ord=ord)
        cell_of = [names.index(name) for name in label_of]

        def listed(cells):
            return [cells[name] for name in names]

        magnitudes = dict(zip(names, seen, strict=True))
        return magnitudes, _rescaling(part, seen, listed, cell_of)

    return Scope(split)


def tree(ord: float | str | None = None) -> Scope:
    """Makes the whole tree one cell: its magnitude is the global norm.

    Args:
      ord: order of the norm, as in `norms.tree_norm`.

    Returns:
      A scope whose magnitude is a scalar. If the caller of `split` gives a norm it is
      taken as it is and nothing is measured.

    Raises:
      ValueError: for another `ord`; by `split`, for a `norm` that is negative or NaN or
        not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import scopes
      >>> updates = {"b": jnp.array([3.0]), "w": jnp.array([0.0, 4.0])}
      >>> magnitude, _ = scopes.tree().split(updates, None)
      >>> print(float(magnitude))
      5.0
    """
    ord = norms.check_ord(ord, "scopes.tree")

    def split(updates, norm, axis_name=None):
        part = _trees.counted(updates)
        if norm is None:
            whole = [range(len(part.arrays))]
            layout = _mesh.layout(part, axis_name, "scopes.tree")
            (seen,) = norms.measure(part.arrays, layout, groups=whole, ord=ord)
        else:
            dtype = _trees.widest(*(u.dtype for u in part.arrays))
            seen = _known(norm, dtype, axis_name)
        cell_of = [0] * len(part.arrays)
        return seen, _rescaling(part, [seen], lambda cell: [cell], cell_of)

    return Scope(split)


def _sorted_labels(tree: PyTree) -> list[Any]:
    found = set(jax.tree.leaves(tree))
    try:
        return sorted(found)
    except TypeError:
        raise TypeError(
            "scopes.group: labels must be all strings or all ints, got "
            f"{sorted(map(repr, found))}. They are the keys of a dict of magnitudes."
        ) from None


def _known(
    norm: jax.typing.ArrayLike, dtype: Any, axis_name: _mesh.AxisName
) -> jax.Array:
    check_number(norm, "update: norm", nan_allowed=True)
    norm = jnp.asarray(norm)
    if norm.ndim:
        raise ValueError(
            f"update: norm must be a scalar, got norm of shape {norm.shape}. Give the "
            "norm of all updates together."
        )
    if (names := _mesh.varying(norm)) and axis_name != ():
        raise ValueError(
            "update: norm must be the same on all devices, got one that varies over "
            f"{', '.join(map(repr, sorted(names)))}. Sum its square over them with "
            "lax.psum."
        )
    return norm.astype(dtype)


def _modulus(u: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(u):
        return jnp.abs(u)
    return jnp.abs(u.astype(_trees.widest(u.dtype)))


def _turn(u, seen, kept, alone):
    """Gives each element its new modulus; an inf takes it with the sign it has."""
    if jnp.iscomplexobj(u):
        return jnp.where(
            alone, u, u * quotient(*_terms(seen, kept, alone)).astype(u.dtype)
        )
    wide = u.astype(seen.dtype)
    return jnp.where(alone, u, jnp.copysign(kept, wide).astype(u.dtype))


def _cut(u, seen, kept, alone, rescale):
    """Gives the elements beyond the new peak, and the peak itself, a new modulus."""
    modulus = _modulus(u)
    finite = jnp.isfinite(seen)
    beyond = ~(modulus <= kept) | (modulus == seen)  # all of them if kept is NaN
    still = alone | (finite & ~beyond)
    new = jnp.where(finite, kept, jnp.nan)
    if not rescale:
        return _turn(u, modulus, lax.full_like(modulus, new), still)
    factor = quotient(new, jnp.where(seen > 0, seen, 1))
    dtype = _trees.widened(u.dtype, seen.dtype)
    scaled = u.astype(dtype) * lax.full_like(u, factor.astype(dtype), dtype)
    return jnp.where(still, u, scaled.astype(u.dtype))


def _rescaling(
    part: _trees.Counted,
    seen: Sequence[jax.Array],
    listed: Callable[[PyTree], list[jax.Array]],
    cell_of: Sequence[int] | None = None,
) -> Rebuild:
    """Makes the rebuild of a scope whose cells hold whole slices of the updates.

    `where(factor == 1, u, u * factor)` with a factor per cell: a scalar factor fuses
    into whatever reads the result, and an idle clip writes nothing.

    Args:
      part: the updates.
      seen: the magnitude of every cell.
      listed: lists a pytree of cells in the order of `seen`.
      cell_of: for each array, the position of its cell; None: each has its own.
    """
    cell_of = range(len(part.arrays)) if cell_of is None else cell_of

    def rebuild(kept, alone):
        cells = zip(seen, listed(kept), listed(alone), strict=True)
        terms = [_terms(*cell) for cell in cells]
        factors = [quotient(*t) for t in terms]
        still = [factor == 1 for factor in factors]
        spread: dict[Any, jax.Array] = {}
        new = []
        for u, cell in zip(part.arrays, cell_of, strict=True):
            real = _trees.widest(u.dtype, factors[cell].dtype)
            dtype = _trees.widened(u.dtype, real)
            factor, *ends = (x.astype(dtype) for x in (factors[cell], *terms[cell]))
            wide = u.astype(dtype)
            if factor.ndim:
                scaled = rescaled(wide * factor, wide, *ends).astype(u.dtype)
                new.append(jnp.where(still[cell], u, scaled))
                continue
            like = (cell, jax.typeof(u))
            if like not in spread:
                spread[like] = lax.full_like(u, factor, dtype)
            scaled = rescaled(wide * spread[like], wide, *ends).astype(u.dtype)
            new.append(lax.select(still[cell], u, scaled))
        return part.replace(new)

    return rebuild


def _terms(seen: jax.Array, kept: jax.Array, alone: jax.Array):
    """What multiplies and what divides a cell: 1 if alone, NaN if not finite.

    Their quotient is left to the last: XLA computes it once, but would repeat whatever
    follows it in the kernel of every leaf. Neither it nor its inverse overflows.
    """
    one = jnp.ones_like(seen)
    new = jnp.where(alone, one, jnp.where(jnp.isfinite(seen), kept, jnp.nan))
    largest = jnp.finfo(seen.dtype).max / 8
    old = jnp.where(seen > 0, jnp.maximum(seen, kept / largest), one)
    return new, jnp.where(alone, one, old)


def _precisely(u: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `u * new / old` for an array that is a cell of its own.

    A factor of one float carries its rounding into every element and so into the norm.
    This one has two parts, `high` of half the digits, so that its products are exact,
    and `low`, what it leaves. A division would be as exact, but XLA writes the quotient
    of an array to memory before it is used twice.
    """
    info = jnp.finfo(old.dtype)
    halved = functools.partial(
        lax.reduce_precision, exponent_bits=info.nexp, mantissa_bits=info.nmant // 2
    )
    factor = quotient(new, old)
    high, head = halved(factor), halved(old)
    low = quotient((new - high * head) - high * (old - head), old)
    # There low would underflow, or head overflow.
    extreme = (factor < info.smallest_normal / info.eps**3) | (old > info.max / 2)
    high, low = jnp.where(extreme, factor, high), jnp.where(extreme, 0, low)
    dtype = _trees.widened(u.dtype, _trees.widest(u.dtype, old.dtype))
    high, low = (lax.full_like(u, part.astype(dtype), dtype) for part in (high, low))
    wide = u.astype(dtype)
    ends = (x.astype(dtype) for x in (new, old))
    scaled = rescaled(wide * high + wide * low, wide, *ends).astype(u.dtype)
    return lax.select(new == old, u, scaled)
