"""How large a magnitude may be at this step: the limits, and what they learn.

A bound is to magnitudes what a gradient transformation is to updates:

    state = bound.init(magnitudes)
    limits, learn = bound.limit(state, magnitudes, own)
    state = learn(new_magnitudes)

`limits` broadcast against the magnitudes cell by cell. `own(who)` measures the
parameters in the same scope; only a bound that calls it needs params. `learn` runs
after the shape, so a bound may learn from what was seen, what was kept, or both. The
state has the structure, shapes and dtypes that `init` gives, always, and is
`optax.EmptyState` for a bound that learns nothing: such a clip accepts `state=None`.

Wherever a clip takes a bound it takes

* a number >= 0: 0 lets nothing through, inf everything. A Python number that is
  negative or NaN is refused when the clip is made; a traced one is clamped at 0, and
  NaN makes the updates NaN;
* an optax schedule of the step;
* a `Bound`;
* a pytree of these that is a prefix of the magnitudes: of the updates for `element`,
  `unit` and `leaf`, a dict by label for `group`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _trees
from optaxclip._checks import check_number
from optaxclip._numerics import quotient
from optaxclip.records import Record

PyTree = Any
Own = Callable[[str], PyTree]
Learn = Callable[[PyTree], PyTree]


class Bound(NamedTuple):
    """A rule for how large magnitudes may be.

    Attributes:
      init: `magnitudes -> state`; only structure, shapes and dtypes may be used.
      limit: `(state, magnitudes, own) -> (limits, learn)`, where `own(who)` gives
        the magnitudes of the parameters, or refuses in the name of `who` if there are
        none, and `learn(kept)` the next state.
    """

    init: Callable[[PyTree], PyTree]
    limit: Callable[[PyTree, PyTree, Own], tuple[PyTree, Learn]]


BoundLike = jax.typing.ArrayLike | optax.Schedule | Bound | PyTree


class ScheduleState(NamedTuple):
    """State of a scheduled bound."""

    step: jax.Array  # shape=(), dtype=jnp.int32


def of(value: BoundLike, who: str = "bounds.of: value") -> Bound:
    """Makes a bound of whatever a clip takes as one.

    Args:
      value: a number, a schedule, a `Bound`, or a pytree of these.
      who: "function: argument" of the caller, for messages.

    Returns:
      The bound itself, or `constant`, `schedule` or `parts` of the value.

    Raises:
      TypeError: for anything that is none of these, bools and strings included.
      ValueError: for a negative number or NaN.

    Examples:
      >>> from optaxclip import bounds
      >>> bounds.of(-1.0, "clip_by_global_norm: max_norm")
      Traceback (most recent call last):
      ValueError: clip_by_global_norm: max_norm must be >= 0, got max_norm=-1.0. Pass a number >= 0; inf means no limit.
    """  # noqa: E501
    if isinstance(value, Bound):
        return value
    if _trees.is_function(value):
        return schedule(value, who)
    leaves = jax.tree.leaves(value, is_leaf=_is_rule)
    if any(map(_is_rule, leaves)):
        return parts(value, who)
    return constant(value, who)


def constant(value: PyTree, who: str = "bounds.constant: value") -> Bound:
    """Makes the bound that never changes.

    Sees nothing and learns nothing.

    Args:
      value: a number >= 0 in the units of the magnitudes, or a pytree prefix of such.
      who: "function: argument" of the caller, for messages.

    Returns:
      A bound without state.

    Raises:
      TypeError: for anything but real numbers.
      ValueError: for a negative number or NaN; by `limit`, if the prefix does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import bounds
      >>> limits, _ = bounds.constant(2.0).limit(None, jnp.array([1.0, 3.0]), None)
      >>> print(limits)
      2.0
    """
    for leaf in jax.tree.leaves(value) or [value]:
        check_number(leaf, who)

    def limit(state, magnitudes, own):
        del own
        return _limits(value, magnitudes, who), lambda kept: state

    return Bound(lambda magnitudes: optax.EmptyState(), limit)


def schedule(
    value: Callable[[jax.Array], PyTree], who: str = "bounds.schedule: value"
) -> Bound:
    """Makes the bound that depends on the step: `value(0)` at the first.

    Sees nothing and learns nothing but the step.

    Args:
      value: an optax schedule; it may give a pytree prefix of the magnitudes.
      who: "function: argument" of the caller, for messages.

    Returns:
      A bound with a `ScheduleState`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optaxclip import bounds
      >>> bound = bounds.schedule(optax.linear_schedule(1.0, 0.0, 10))
      >>> state = bound.init(jnp.array(1.0))
      >>> for _ in range(3):
      ...     limits, learn = bound.limit(state, jnp.array(5.0), None)
      ...     state = learn(limits)
      ...     print(f"{limits:.1f}")
      1.0
      0.9
      0.8
    """

    def init(magnitudes):
        del magnitudes
        return ScheduleState(step=jnp.zeros((), jnp.int32))

    def limit(state, magnitudes, own):
        del own
        _refuse_no_state(state, who)
        limits = _limits(value(state.step), magnitudes, who)
        following = ScheduleState(step=jnp.asarray(optax.safe_increment(state.step)))
        return limits, lambda kept: following

    return Bound(init, limit)


def relative(
    ratio: BoundLike,
    floor: jax.typing.ArrayLike = 1e-3,
    who: str = "bounds.relative: ratio",
) -> Bound:
    """Makes the bound that is a share of the parameter's own magnitude.

    `limit = ratio * max(own, floor)`, cell by cell.

    Sees the parameters. `ratio` may itself be any bound: it sees, and learns from, the
    magnitudes divided by `max(own, floor)`.

    Args:
      ratio: dimensionless bound of update over parameter.
      floor: smallest parameter magnitude assumed, so that parameters at 0 can move.
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
    check_number(floor, f"{function}: floor")

    def limit(state, magnitudes, own):
        sizes = jax.tree.map(
            lambda size, m: jnp.maximum(size, _cast(floor, size)).astype(m.dtype),
            own(function),
            magnitudes,
        )
        shares = jax.tree.map(_share, magnitudes, sizes)
        limits, learn = inner.limit(state, shares, own)
        limits = jax.tree.map(
            lambda r, s: jnp.where(r == jnp.inf, r, r * s), limits, sizes
        )
        return limits, lambda kept: learn(jax.tree.map(_share, kept, sizes))

    return Bound(inner.init, limit)


def at_most(*values: BoundLike) -> Bound:
    """Makes the bound that is the smallest of several.

    Each sees what it sees alone, and learns from what all of them together kept.

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
    sees alone, and learns from what all of them together kept.

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


def parts(values: PyTree, who: str = "bounds.parts: values") -> Bound:
    """Makes the bound that follows another rule on each part of the magnitudes.

    Args:
      values: pytree of numbers, schedules and bounds, a prefix of the magnitudes: a
        dict by label for the `group` scope.
      who: "function: argument" of the caller, for messages.

    Returns:
      A bound whose state is the tuple of their states in the order of the leaves, or
      empty if all are.

    Raises:
      TypeError, ValueError: as `of` does; by `init` and `limit`, if a part is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optaxclip import bounds
      >>> bound = bounds.parts({"hidden": 1.0, "output": optax.constant_schedule(5.0)})
      >>> norms = {"hidden": jnp.array(3.0), "output": jnp.array(3.0)}
      >>> limits, _ = bound.limit(bound.init(norms), norms, None)
      >>> print({label: float(limit) for label, limit in limits.items()})
      {'hidden': 1.0, 'output': 5.0}
    """
    rules, treedef = jax.tree.flatten(values, is_leaf=_is_rule)
    rules = [of(rule, who) for rule in rules]

    def split(magnitudes):
        if not jax.tree.leaves(magnitudes):
            return [magnitudes for _ in rules]
        _trees.spread(treedef.unflatten(range(len(rules))), magnitudes, who)
        return treedef.flatten_up_to(magnitudes)

    def init(magnitudes):
        pairs = zip(rules, split(magnitudes), strict=True)
        return _joined([rule.init(part) for rule, part in pairs])

    def limit(state, magnitudes, own):
        limits, learners = [], []
        states = _each(state, len(rules))
        for i, part in enumerate(split(magnitudes)):
            found, learn = rules[i].limit(
                states[i], part, lambda who, i=i: split(own(who))[i]
            )
            limits.append(found)
            learners.append(learn)

        def learn_all(kept):
            pairs = zip(learners, split(kept), strict=True)
            return _joined([learn(part) for learn, part in pairs])

        laid = treedef.unflatten(limits) if jax.tree.leaves(magnitudes) else magnitudes
        return laid, learn_all

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
        _refuse_no_state(state, "recorded: bound")
        limits, learn = inner.limit(state.bound, magnitudes, own)

        def note(kept):
            return state.after(magnitudes, limits, kept, learn(kept))

        return limits, note

    return Bound(init, limit)


def _combination(choose: Callable, values: tuple[BoundLike, ...], who: str) -> Bound:
    if not values:
        function, argument = who.split(": ")
        raise ValueError(
            f"{function}: {argument} must not be empty. Pass at least one."
        )
    rules = [of(value, who) for value in values]

    def init(magnitudes):
        return _joined([rule.init(magnitudes) for rule in rules])

    def limit(state, magnitudes, own):
        pairs = zip(rules, _each(state, len(rules)), strict=True)
        found = [rule.limit(s, magnitudes, own) for rule, s in pairs]
        limits = found[0][0]
        for other, _ in found[1:]:
            limits = jax.tree.map(choose, limits, other)
        return limits, lambda kept: _joined([learn(kept) for _, learn in found])

    return Bound(init, limit)


def _refuse_no_state(state: PyTree, who: str) -> None:
    if state is None:
        function, argument = who.split(": ")
        raise ValueError(
            f"{function}: {argument} learns from step to step and needs its state, got "
            "None. Call tx.init(params) and pass the state on."
        )


def _is_empty(state: PyTree) -> bool:
    return state is None or isinstance(state, optax.EmptyState)


def _joined(states: list[PyTree]) -> PyTree:
    """The state of several bounds: still empty if all are."""
    return states[0] if all(map(_is_empty, states)) else tuple(states)


def _each(state: PyTree, count: int) -> list[PyTree]:
    return [state] * count if _is_empty(state) else list(state)


def _is_rule(node: Any) -> bool:
    return isinstance(node, Bound) or _trees.is_function(node)


def _limits(value: PyTree, magnitudes: PyTree, who: str) -> PyTree:
    """Lays numbers over magnitudes, in their dtype, none below 0."""

    def lay(number, magnitude):
        limit = jnp.maximum(_cast(number, magnitude), 0)
        shape = magnitude.shape
        if limit.ndim and jnp.broadcast_shapes(limit.shape, shape) != shape:
            function, argument = who.split(": ")
            raise ValueError(
                f"{function}: {argument} must be a scalar or fit the magnitudes, got "
                f"shape {limit.shape} for magnitudes of shape {shape}. Pass one number "
                "per leaf."
            )
        return limit

    return jax.tree.map(lay, _trees.spread(value, magnitudes, who), magnitudes)


def _cast(number: jax.typing.ArrayLike, like: jax.Array) -> jax.Array:
    return jnp.asarray(number).astype(like.dtype)


def _share(magnitude: jax.Array, size: jax.Array) -> jax.Array:
    return quotient(magnitude, jnp.where(size > 0, size, 1))
