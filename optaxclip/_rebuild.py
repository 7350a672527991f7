"""Putting the directions back: updates from the new magnitudes of their cells.

Every function here is one of arrays, and static itself:

    new_arrays = put(arrays, seen, kept, alone)

`seen`, `kept` and `alone` are the magnitudes, the new ones, and whether a cell is to be
left alone, as a list of arrays of cells (`optaxclip._cells`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip import _cells, _forms, _trees
from optaxclip._numerics import quotient

PyTree = Any
Arrays = Sequence[jax.Array]


class Rebuild(NamedTuple):
    """What makes updates of new magnitudes, called as `rebuild(kept, alone)`.

    Attributes:
      part: the updates.
      seen: their magnitudes.
      put: one of the functions of this module.
    """

    part: _trees.Counted
    seen: _cells.Cells
    put: Callable[..., list[jax.Array]]

    def __call__(self, kept: PyTree, alone: PyTree) -> PyTree:
        """Returns the updates with their new magnitudes."""
        cells = [_cells.measured(c) for c in (self.seen, kept, alone)]
        return self.part.replace(self.put(self.part.arrays, *cells))

    def bent(self, shape: Callable, limits: PyTree) -> tuple[PyTree, PyTree]:
        """Returns the updates and their magnitudes, bent at the limits by a shape."""
        shared = _shared(limits)
        arrays, kept = _bent(shape, self.put, self.part.arrays, self.seen, shared)
        return self.part.replace(arrays), kept


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _bent(shape, put, arrays, seen, limits):
    """One compiled call for all arrays, outside of jit too."""
    if not isinstance(limits, _cells.Cells):
        spread = iter(_forms.entries(limits, range(len(arrays))))
        spread = [x if x is None else next(spread) for x in seen.arrays]
        limits = _cells.like(seen, spread)
    kept = jax.tree.map(functools.partial(_new_magnitude, shape), seen, limits)
    alone = jax.tree.map(_left_alone, seen, limits, kept)
    return put(arrays, *(_cells.measured(c) for c in (seen, kept, alone))), kept


def _shared(limits):
    """The one limit of all elements, if it is one, or the limits as they are."""
    first, *others = _cells.measured(limits) or [None]
    one = first is not None and jnp.ndim(first) == 0
    if limits.places.form != "elements" or not one:
        return limits
    return first if all(other is first for other in others) else limits


def _new_magnitude(shape, magnitude, limit):
    finite = jnp.minimum(limit, jnp.finfo(magnitude.dtype).max)
    return jnp.where(limit == jnp.inf, magnitude, shape(magnitude, finite))


def _left_alone(magnitude, limit, kept):
    return ((kept == magnitude) & (magnitude < jnp.inf)) | (limit == jnp.inf)


class Rescaled(NamedTuple):
    """Multiplies each array by the factor of its cell.

    Attributes:
      owner: for each array, its cell.
    """

    owner: tuple[int, ...]

    def __call__(self, arrays: Arrays, seen, kept, alone) -> list[jax.Array]:
        """Returns `where(factor == 1, u, u * factor)`: an idle clip writes nothing."""
        new, old = _terms(seen[0], kept[0], alone[0])
        return list(_rescaled(tuple(arrays), new, old, self.owner))


class Cut(NamedTuple):
    """Cuts the elements of each array that are beyond its new peak.

    Attributes:
      owner: for each array, its cell.
      rescale: whether they keep their proportions.
    """

    owner: tuple[int, ...]
    rescale: bool

    def __call__(self, arrays: Arrays, seen, kept, alone) -> list[jax.Array]:
        """Returns each array with a new modulus where it is beyond the peak."""
        still = alone[0].astype(seen[0].dtype)
        cells = (_forms.entries(c, self.owner) for c in (seen[0], kept[0], still))
        return [
            _cut(u, *own, self.rescale) for u, *own in zip(arrays, *cells, strict=True)
        ]


def units_rescaled(arrays: Arrays, seen, kept, alone) -> list[jax.Array]:
    """Multiplies the units of each array by their factors."""
    terms = [_terms(*cells) for cells in zip(seen, kept, alone, strict=True)]
    new, old = (tuple(side) for side in zip(*terms)) if terms else ((), ())
    return list(_rescaled(tuple(arrays), new, old, None))


def _terms(seen: jax.Array, kept: jax.Array, alone: jax.Array):
    """What multiplies and what divides a cell: 1 if alone, NaN if not finite.

    Their quotient is left to the last: XLA computes it once, but would repeat whatever
    follows it in the kernel of every leaf. Neither it nor its inverse overflows.
    """
    largest = jnp.finfo(seen.dtype).max / 8
    new = jnp.where(alone, jnp.ones_like(seen), kept + (seen - seen))
    old = jnp.where(alone, jnp.ones_like(seen), jnp.maximum(seen, kept / largest))
    return new, old


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _rescaled(arrays, new, old, owner):
    """Returns `u * (new / old)`.

    The derivative `(new / old) du + (u / old) (dnew - (new / old) dold)` never forms
    `new / old^2`, which leaves float32 for an old below 1e-19. One rule for all arrays
    keeps `new` and `old`, of which no kernel but that of the factors has need, out of
    the program where nothing is differentiated.
    """
    if owner is None:
        factors = [quotient(n, o) for n, o in zip(new, old, strict=True)]
        factors = _forms.together(factors)
    else:
        factors = _forms.entries(quotient(new, old), owner)
    return tuple(_times(u, f) for u, f in zip(arrays, factors, strict=True))


@_rescaled.defjvp
def _rescaled_jvp(owner, primals, tangents):
    arrays, new, old = primals
    changes, dnew, dold = tangents
    factors = jax.tree.map(quotient, new, old)
    slopes = jax.tree.map(lambda f, dn, do: dn - f * do, factors, dnew, dold)
    cells = old, factors, slopes
    if owner is not None:
        cells = ([c if c.ndim == 0 else c[i] for i in owner] for c in cells)
    out = []
    for u, du, o, factor, slope in zip(arrays, changes, *cells, strict=True):
        (wide, o), (du, factor), slope = (
            _widened(u, o),
            _widened(du, factor),
            _widened(u, slope)[1],
        )
        out.append((du * factor + quotient(wide, o) * slope).astype(u.dtype))
    return _rescaled(arrays, new, old, owner), tuple(out)


def _times(u: jax.Array, factor: jax.Array) -> jax.Array:
    wide, factor = _widened(u, factor)
    scaled = (wide * factor).astype(u.dtype)
    if factor.ndim:
        return jnp.where(factor == 1, u, scaled)
    return lax.select(factor == 1, u, scaled)  # what is u is not written over u


def _widened(u: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in the dtype in which they are multiplied."""
    dtype = _trees.widened(u.dtype, _trees.widest(u.dtype, factor.dtype))
    return u.astype(dtype), factor.astype(dtype)


@functools.partial(jax.jit, inline=True)
def moduli(arrays: Arrays) -> list[jax.Array]:
    """The modulus of every element, float32 or wider."""
    return [_modulus(u) for u in arrays]


@functools.partial(jax.jit, inline=True)
def sides(arrays: Arrays) -> tuple[list[jax.Array], list[jax.Array]]:
    """How far every element is below zero, and how far above."""
    wide = [u.astype(_trees.widest(u.dtype)) for u in arrays]
    zeros = [jnp.zeros_like(w) for w in wide]
    return (
        [jnp.maximum(-w, z) for w, z in zip(wide, zeros, strict=True)],
        [jnp.maximum(w, z) for w, z in zip(wide, zeros, strict=True)],
    )


def turned(arrays: Arrays, seen, kept, alone) -> list[jax.Array]:
    """Gives every element its new modulus, and the sign or the phase that it had."""
    cells = zip(arrays, seen, kept, alone, strict=True)
    return [_turn(*cell) for cell in cells]


def turned_by_side(arrays: Arrays, seen, kept, alone) -> list[jax.Array]:
    """Gives every element its new distance from zero on the side where it is."""
    del seen
    count = len(arrays)
    out = []
    for i, u in enumerate(arrays):
        wide = u.astype(kept[i].dtype)
        size = jnp.where(wide < 0, kept[i], kept[count + i])
        new = (jnp.sign(wide) * size).astype(u.dtype)
        out.append(jnp.where(alone[i] & alone[count + i], u, new))
    return out


def _modulus(u: jax.Array) -> jax.Array:
    return jnp.abs(u if jnp.iscomplexobj(u) else u.astype(_trees.widest(u.dtype)))


def _turn(u, seen, kept, alone):
    if jnp.iscomplexobj(u):
        factor = quotient(*_terms(seen, kept, alone))
        return jnp.where(alone, u, u * factor.astype(u.dtype))
    new = jnp.sign(u.astype(seen.dtype)) * kept
    return jnp.where(alone, u, new.astype(u.dtype))


def _cut(u, seen, kept, still, rescale):
    """Gives the elements beyond the new peak, and the peak itself, a new modulus."""
    modulus = _modulus(u)
    beyond = ~(modulus <= kept) | (modulus == seen)  # all of them if kept is NaN
    alone = (still == 1) | (jnp.isfinite(seen) & ~beyond)
    new = kept + (seen - seen)  # NaN if the peak is not finite
    if not rescale:
        return _turn(u, modulus, lax.full_like(modulus, new), alone)
    factor = quotient(new, jnp.where(seen > 0, seen, 1))
    wide, factor = _widened(u, factor)
    return jnp.where(alone, u, (wide * factor).astype(u.dtype))
