"""Putting the directions back: updates from the new magnitudes of their cells.

Every function here is one of arrays, and static itself:

    new_arrays = put(arrays, seen, targets, alone, raises)

with lists of arrays of cells (`optaxclip._cells`): the magnitudes, what they become
where `alone` is not set, and whether that may be more. What is done array by array is
jitted by itself, so that it is traced once for each shape and not for each array.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip import _cells, _forms, _trees, shapes
from optaxclip._compat import enable_x64
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
        return self.part.replace(self.put(self.part.arrays, *cells, True))

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
    bend = functools.partial(_bend, shape)
    pairs = zip(_cells.measured(seen), _cells.measured(limits), strict=True)
    found = [bend(m, c) for m, c in pairs]
    kept, targets, alone = ([f[i] for f in found] for i in range(3))
    filled = iter(kept)
    kept = [x if x is None else next(filled) for x in seen.arrays]
    raises = shape is not shapes.hard
    arrays = put(arrays, _cells.measured(seen), targets, alone, raises)
    return arrays, _cells.like(seen, kept)


@functools.partial(jax.jit, static_argnums=0)  # traced once for each shape and dtype
def _bend(shape, magnitude, limit):
    """The new magnitude, what it is where it changes, and where it does not."""
    free = limit == jnp.inf
    if shape is shapes.hard:  # that of nearly every clip, in the fewest operations
        alone = (magnitude <= limit) | free
        return jnp.minimum(magnitude, limit), limit, alone
    finite = jnp.minimum(limit, jnp.finfo(magnitude.dtype).max)
    kept = jnp.where(free, magnitude, shape(magnitude, finite))
    return kept, kept, ((kept == magnitude) & (magnitude < jnp.inf)) | free


def _shared(limits):
    """The one limit of all elements, if it is one, or the limits as they are."""
    first, *others = _cells.measured(limits) or [None]
    one = first is not None and jnp.ndim(first) == 0
    if limits.places.form != "elements" or not one:
        return limits
    return first if all(other is first for other in others) else limits


class Rescaled(NamedTuple):
    """Multiplies each array by the factor of its cell.

    Attributes:
      owner: for each array, its cell.
      exact: whether the factor is rounded on a CPU only with the result, for norms of
        single arrays that are what they should be to the last bit.
    """

    owner: tuple[int, ...]
    exact: bool = False

    def __call__(self, arrays: Arrays, seen, targets, alone, raises) -> list[jax.Array]:
        """Returns `where(factor == 1, u, u * factor)`: an idle clip writes nothing."""
        new, old = _terms(seen[0], targets[0], alone[0], raises)
        return list(_rescaled(tuple(arrays), new, old, self.owner, self.exact))


def units_rescaled(arrays: Arrays, seen, targets, alone, raises) -> list[jax.Array]:
    """Multiplies the units of each array by their factors."""
    cells = zip(seen, targets, alone, strict=True)
    terms = [_terms(*cell, raises) for cell in cells]
    new, old = (tuple(side) for side in zip(*terms)) if terms else ((), ())
    return list(_rescaled(tuple(arrays), new, old, None, False))


@functools.partial(jax.jit, static_argnums=3)
def _terms(seen: jax.Array, target: jax.Array, alone: jax.Array, raises: bool):
    """What multiplies and what divides a cell: 1 if alone, NaN if not finite.

    Their quotient is left to the last: XLA computes it once, but would repeat whatever
    follows it in the kernel of every leaf. It does not overflow.
    """
    one = lax.full_like(seen, 1)
    if raises:
        seen = jnp.maximum(seen, target / (jnp.finfo(seen.dtype).max / 8))
    return (
        lax.select(alone, one, target + (seen - seen)),
        lax.select(alone, one, seen),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _rescaled(arrays, new, old, owner, exact):
    """Returns `u * (new / old)`.

    The derivative `(new / old) du + (u / old) (dnew - (new / old) dold)` never forms
    `new / old^2`, which leaves float32 for an old below 1e-19. One rule for all arrays
    keeps `new` and `old`, of which no kernel but that of the factors has need, out of
    the program where nothing is differentiated.
    """
    if owner is None:
        factors = _forms.together([_factor(*both) for both in zip(new, old)])
        return tuple(_times(u, f) for u, f in zip(arrays, factors, strict=True))
    if not exact or new.dtype == jnp.float64 or not arrays:
        return _scaled(owner, (arrays, new, old))
    by_float64 = functools.partial(_scaled_by_float64, owner)
    plainly = functools.partial(_scaled, owner)
    return _forms.by_platform(by_float64, plainly, plainly, (arrays, new, old))


def _scaled(owner, given):
    arrays, new, old = given
    factors = _forms.entries(_factor(new, old), owner)
    return tuple(_times(u, f) for u, f in zip(arrays, factors, strict=True))


def _scaled_by_float64(owner, given):
    arrays, new, old = given
    with enable_x64(True):
        new, old = (lax.convert_element_type(x, jnp.float64) for x in (new, old))
        factors = _forms.entries_on_cpu(_factor(new, old), owner)
        return tuple(_times(u, f) for u, f in zip(arrays, factors, strict=True))


@_rescaled.defjvp
def _rescaled_jvp(owner, exact, primals, tangents):
    arrays, new, old = primals
    changes, dnew, dold = tangents
    factors = jax.tree.map(_factor, new, old)
    slopes = jax.tree.map(lambda f, dn, do: dn - f * do, factors, dnew, dold)
    cells = old, factors, slopes
    if owner is not None:
        cells = ([c if c.ndim == 0 else c[i] for i in owner] for c in cells)
    out = []
    for u, du, o, factor, slope in zip(arrays, changes, *cells, strict=True):
        dtype = _wide_dtype(u, factor)
        wide, du, o, factor, slope = (
            x.astype(dtype) for x in (u, du, o, factor, slope)
        )
        out.append((du * factor + quotient(wide, o) * slope).astype(u.dtype))
    return _rescaled(arrays, new, old, owner, exact), tuple(out)


_factor = jax.jit(quotient)


@jax.jit
def _times(u: jax.Array, factor: jax.Array) -> jax.Array:
    dtype = _wide_dtype(u, factor)
    wide, factor = (lax.convert_element_type(x, dtype) for x in (u, factor))
    scaled = lax.convert_element_type(wide * factor, u.dtype)
    if factor.ndim:
        return jnp.where(factor == 1, u, scaled)
    return lax.select(factor == 1, u, scaled)  # what is u is not written over u


def _wide_dtype(u: jax.Array, factor: jax.Array) -> Any:
    """The dtype in which both are multiplied."""
    return _trees.widened(u.dtype, _trees.widest(u.dtype, factor.dtype))


class Cut(NamedTuple):
    """Cuts the elements of each array that are beyond its new peak.

    Attributes:
      owner: for each array, its cell.
      rescale: whether they keep their proportions.
    """

    owner: tuple[int, ...]
    rescale: bool

    def __call__(self, arrays: Arrays, seen, targets, alone, raises) -> list[jax.Array]:
        """Returns each array with a new modulus where it is beyond the peak."""
        del raises
        still = alone[0].astype(seen[0].dtype)
        cells = (_forms.entries(c, self.owner) for c in (seen[0], targets[0], still))
        return [
            _cut(u, *own, self.rescale) for u, *own in zip(arrays, *cells, strict=True)
        ]


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


def turned(arrays: Arrays, seen, targets, alone, raises) -> list[jax.Array]:
    """Gives every element its new modulus, and the sign or the phase that it had."""
    del raises
    cells = zip(arrays, seen, targets, alone, strict=True)
    return [_turn(*cell) for cell in cells]


def turned_by_side(arrays: Arrays, seen, targets, alone, raises) -> list[jax.Array]:
    """Gives every element its new distance from zero on the side where it is."""
    del seen, raises
    count = len(arrays)
    cells = zip(targets, targets[count:], alone, alone[count:])
    return [_turn_by_side(u, *c) for u, c in zip(arrays, cells, strict=True)]


@jax.jit
def _modulus(u: jax.Array) -> jax.Array:
    return jnp.abs(u if jnp.iscomplexobj(u) else u.astype(_trees.widest(u.dtype)))


@jax.jit
def _turn(u, seen, target, alone):
    if jnp.iscomplexobj(u):
        factor = _factor(*_terms(seen, target, alone, True))
        return lax.select(alone, u, u * factor.astype(u.dtype))
    new = lax.sign(u.astype(seen.dtype)) * target
    return lax.select(alone, u, new.astype(u.dtype))


@jax.jit
def _turn_by_side(u, low, high, still_low, still_high):
    wide = u.astype(low.dtype)
    new = lax.sign(wide) * jnp.where(wide < 0, low, high)
    return lax.select(still_low & still_high, u, new.astype(u.dtype))


@functools.partial(jax.jit, static_argnums=4)
def _cut(u, seen, target, still, rescale):
    """Gives the elements beyond the new peak, and the peak itself, a new modulus."""
    modulus = _modulus(u)
    beyond = ~(modulus <= target) | (modulus == seen)  # all of them if it is NaN
    alone = (still == 1) | (jnp.isfinite(seen) & ~beyond)
    new = target + (seen - seen)  # NaN if the peak is not finite
    if not rescale:
        return _turn(u, modulus, lax.full_like(modulus, new), alone)
    factor = _factor(*_terms(seen, target, still == 1, True))
    dtype = _wide_dtype(u, factor)
    scaled = u.astype(dtype) * factor.astype(dtype)
    return jnp.where(alone, u, scaled.astype(u.dtype))
