"""Bounds that are made of other bounds."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optaxclip import _mesh, norms
from optaxclip._checks import check_number
from optaxclip._numerics import quotient
from optaxclip.bounds._rules import (
    Bound,
    BoundLike,
    cast,
    each,
    joined,
    largest_window,
    of,
    refuse_no_state,
)
from optaxclip.records import Record


def relative(
    ratio: BoundLike,
    floor: jax.typing.ArrayLike | None = 1e-3,
    who: str = "bounds.relative: ratio",
) -> Bound:
    """Makes the bound that is a share of the parameter's own magnitude.

    `limit = ratio * max(own, floor)`, cell by cell.

    Sees the parameters. `ratio` may itself be any bound: it sees, and learns from, the
    magnitudes divided by `max(own, floor)`. So a learned ratio learns how large
    updates are for their parameters: AGC without a ratio to tune.

    Args:
      ratio: dimensionless bound of update over parameter.
      floor: smallest parameter magnitude assumed, so that parameters at 0 can move;
        None: a parameter at 0 sets no limit.
      who: "function: argument" of the caller, for messages.

    Returns:
      A bound with the state of `ratio`.

    Raises:
      TypeError, ValueError: as `of` does for `ratio` and `floor`; by `limit`, if params
        are missing or do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import bounds
      >>> bound = bounds.relative(0.1)
      >>> limits, _ = bound.limit(None, jnp.array(5.0), lambda who: jnp.array(20.0))
      >>> print(limits)
      2.0

    References:
      Brock et al., High-performance large-scale image recognition without
      normalization, 2021, https://arxiv.org/abs/2102.06171
    """
    inner = of(ratio, who)
    function = who.split(": ")[0]
    if floor is not None:
        check_number(floor, f"{function}: floor")

    free = floor is None
    least = 0.0 if free else floor

    def limit(state, magnitudes, own):
        size = lambda own, m: _at_least(own, m, least)
        sizes = jax.tree.map(size, own(function), magnitudes)
        shares = jax.tree.map(_share, magnitudes, sizes)
        ratios, learn = inner.limit(state, shares, own)
        limits = jax.tree.map(lambda r, size: _times(r, size, free), ratios, sizes)
        return limits, lambda kept: learn(jax.tree.map(_share, kept, sizes))

    return Bound(inner.init, limit, inner.window)


def at_most(*values: BoundLike) -> Bound:
    """Makes the bound that is the smallest of several.

    Each sees what it sees alone; one that learns what was kept learns what all of them
    together kept.

    Args:
      *values: numbers, schedules, bounds, or pytree prefixes of these.

    Returns:
      A bound whose state is the tuple of their states, or empty if all are.

    Raises:
      TypeError, ValueError: as `of` does.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optaxclip import bounds
      >>> bound = bounds.at_most(bounds.relative(0.1), 1.5)
      >>> limits, _ = bound.limit(None, jnp.array(5.0), lambda who: jnp.array(20.0))
      >>> print(limits)
      1.5
    """
    return _combination(jnp.minimum, values, "bounds.at_most: values")


def at_least(*values: BoundLike) -> Bound:
    """Makes the bound that is the largest of several.

    For instance a learned one that is not to fall below a number. Each sees what it
    sees alone; one that learns what was kept learns what all of them together kept.

    Args:
      *values: numbers, schedules, bounds, or pytree prefixes of these.

    Returns:
      A bound whose state is the tuple of their states, or empty if all are.

    Raises:
      TypeError, ValueError: as `of` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import bounds
      >>> bound = bounds.at_least(bounds.relative(0.1), 1.5)
      >>> limits, _ = bound.limit(None, jnp.array(5.0), lambda who: jnp.array(20.0))
      >>> print(limits)
      2.0
    """
    return _combination(jnp.maximum, values, "bounds.at_least: values")


def plus(*values: BoundLike) -> Bound:
    """Makes the bound that is the sum of several.

    For instance a running mean plus three running deviations. Each sees what it sees
    alone; one that learns what was kept learns what all of them together kept.

    Args:
      *values: numbers, schedules, bounds, or pytree prefixes of these.

    Returns:
      A bound whose state is the tuple of their states, or empty if all are.

    Raises:
      TypeError, ValueError: as `of` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import bounds
      >>> bound = bounds.plus(bounds.relative(0.1), 1.5)
      >>> limits, _ = bound.limit(None, jnp.array(5.0), lambda who: jnp.array(20.0))
      >>> print(limits)
      3.5
    """
    return _combination(jnp.add, values, "bounds.plus: values")


def phases(before: BoundLike, after: BoundLike) -> Bound:
    """Makes the bound that is one until another has a limit, cell by cell.

    `limit = before where after is inf else after`. A learned bound gives inf during its
    warm-up: so long `before` holds, while `after` learns already. A cell that
    sees its first update late, such as an expert that was never used, has a late
    warm-up.

    With `jointly` as `before`, the warm-up has a coarser scope than what follows.

    Args:
      before: a number, a schedule, a bound, or a pytree prefix of these.
      after: the same; usually a learned bound.

    Returns:
      A bound whose state is the pair of their states, or empty if both are.

    Raises:
      TypeError, ValueError: as `of` does.

    Examples:
      Half as much again as the mean of the first two, and at most 4 until then:

      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> learned = bounds.ema(1.5, decay=0.9, warmup=2)
      >>> tx = optaxclip.clip_by_global_norm(bounds.phases(4.0, learned))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 9.0, 9.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [4.]
      [3.75]
    """
    choose = lambda first, then: jnp.where(then == jnp.inf, first, then)
    first = of(before, "bounds.phases: before")
    then = of(after, "bounds.phases: after")
    return _combination(choose, (first, then), "bounds.phases: before")


def jointly(bound: BoundLike, who: str = "bounds.jointly: bound") -> Bound:
    """Makes the bound of the common norm of all cells, in a finer scope.

    `limit_i = m_i c / n` with the Euclidean norm n of all magnitudes m and its limit c:
    with the scopes `unit`, `leaf` and `group` of order 2 all updates are then scaled by
    one factor, as by a clip by global norm, without measuring them again.

    Sees, and learns from, the norm n. If it is not finite the updates become NaN.

    Args:
      bound: of the common norm: a number, a schedule or a bound.
      who: "function: argument" of the caller, for messages.

    Returns:
      A bound with the state of `bound` for one magnitude.

    Raises:
      TypeError, ValueError: as `of` does.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip import bounds
      >>> tx = optaxclip.clip_by_leaf_norm(bounds.jointly(1.0))
      >>> updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> print(jax.tree.map(str, tx.update(updates, None)[0]))
      {'a': '[0.6]', 'b': '[0.8]'}
    """
    inner = of(bound, who)
    function = who.split(": ")[0]

    def together(cells, dtype=None):
        known = _mesh.of_cells(cells, function)
        norm = norms.tree_norm(jax.tree.leaves(cells), axis_name=known)
        return norm.astype(dtype or norm.dtype)

    def init(magnitudes):
        return inner.init(jax.eval_shape(together, magnitudes))

    def limit(state, magnitudes, own):
        total = together(magnitudes)
        most, learn = inner.limit(
            state, total, lambda who: together(own(who), total.dtype)
        )
        positive = jnp.where(total > 0, total, 1)
        finite = jnp.where(most == jnp.inf, 1, most)

        def lay(m):
            seen = m.astype(total.dtype)
            # m / n first, for the derivative of c / n leaves the range of floats.
            limit = quotient(seen, positive) * finite
            limit = jnp.where(total <= most, jnp.maximum(limit, seen), limit)
            limit = jnp.where(total == 0, most, limit)
            limit = jnp.where(jnp.isfinite(total), limit, jnp.nan)
            return jnp.where(most == jnp.inf, most, limit).astype(m.dtype)

        limits = jax.tree.map(lay, magnitudes)
        return limits, lambda kept: learn(together(kept, total.dtype))

    return Bound(init, limit)


def recorded(bound: BoundLike) -> Bound:
    """Makes the same bound, which also remembers what the clip saw and did.

    Everything comes from the magnitudes already measured: nothing is read again. With
    the `element` scope the share of clipped cells is a reduction over all elements.
    `recorded(inf)` measures and never clips: the way to look before choosing a number.

    Args:
      bound: a number, a schedule, a bound, or a pytree prefix of these.

    Returns:
      A bound whose state is a `Record`; `records` finds it in any optimizer state.

    Raises:
      TypeError, ValueError: as `of` does.

    Examples:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> clip = optaxclip.clip_by_global_norm(optaxclip.recorded(1.0))
      >>> tx = optax.chain(clip, optax.sgd(0.1))
      >>> params = jnp.zeros(2)
      >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
      >>> (record,) = optaxclip.records(state)
      >>> print(f"{record.norm:.1f} {record.scale:.1f} {record.clipped_steps}")
      5.0 0.2 1
    """
    inner = of(bound, "recorded: bound")

    def init(magnitudes):
        return Record.empty(magnitudes, inner.init(magnitudes))

    def limit(state, magnitudes, own):
        refuse_no_state(state, "recorded: bound")
        limits, learn = inner.limit(state.bound, magnitudes, own)

        def note(kept):
            return state.after(magnitudes, limits, kept, learn(kept))

        return limits, note

    return Bound(init, limit, inner.window)


def _combination(choose: Callable, values: tuple[BoundLike, ...], who: str) -> Bound:
    if not values:
        function, argument = who.split(": ")
        raise ValueError(
            f"{function}: {argument} must not be empty. Pass at least one."
        )
    rules = [of(value, who) for value in values]

    def init(magnitudes):
        return joined([rule.init(magnitudes) for rule in rules])

    def limit(state, magnitudes, own):
        pairs = zip(rules, each(state, len(rules)), strict=True)
        found = [rule.limit(s, magnitudes, own) for rule, s in pairs]
        limits = found[0][0]
        for other, _ in found[1:]:
            limits = jax.tree.map(choose, limits, other)
        return limits, lambda kept: joined([learn(kept) for _, learn in found])

    return Bound(init, limit, largest_window(rules))


# Of units there is an array for each leaf: these are traced once for each shape.


@jax.jit
def _at_least(own: jax.Array, magnitude: jax.Array, least: jax.Array) -> jax.Array:
    """A size in the dtype of a magnitude, and not below another."""
    return jnp.maximum(own, cast(least, own)).astype(magnitude.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _times(ratio: jax.Array, size: jax.Array, free: bool) -> jax.Array:
    """The share of a size; inf for a ratio of inf, and if free for a size of 0."""
    unlimited = (ratio == jnp.inf) | (size == 0) if free else ratio == jnp.inf
    return jnp.where(unlimited, jnp.inf, ratio * size)


@jax.jit
def _share(magnitude: jax.Array, size: jax.Array) -> jax.Array:
    """Magnitude over size; 0, from which no bound learns, where there is no size."""
    ratio = quotient(magnitude, jnp.where(size == 0, 1, size))
    return jnp.where(size == 0, 0 * ratio, ratio)
