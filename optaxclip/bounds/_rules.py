"""What a rule is, and the rules that learn nothing: a number, a schedule, parts."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _cells, _trees
from optaxclip._checks import check_number, is_static_number

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
      window: how many magnitudes it stores of every cell; if any, `clip_by` refuses the
        scopes whose cells are elements, for it would be so many copies of the params.
    """

    init: Callable[[PyTree], PyTree]
    limit: Callable[[PyTree, PyTree, Own], tuple[PyTree, Learn]]
    window: int = 0


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
    if isinstance(value, optax.GradientTransformation):
        function, argument = who.split(": ")
        raise TypeError(
            f"{function}: {argument} must be a number, a schedule or a bound, got a "
            "gradient transformation. Pass its bound: clip.bound."
        )
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
        refuse_no_state(state, who)
        found = value(state.step)
        if isinstance(found, Bound | optax.GradientTransformation):
            function, argument = who.split(": ")
            raise TypeError(
                f"{function}: {argument} must be a schedule of numbers, got a function "
                f"that returns a {type(found).__name__}. Call it, and pass that."
            )
        limits = _limits(found, magnitudes, who)
        following = ScheduleState(step=jnp.asarray(optax.safe_increment(state.step)))
        return limits, lambda kept: following

    return Bound(init, limit)


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
    rules = {
        path: of(rule, who)
        for path, rule in jax.tree_util.tree_flatten_with_path(
            values, is_leaf=_is_rule
        )[0]
    }

    def init(magnitudes):
        branches = _cells.branches(magnitudes, list(rules), who)
        pairs = zip(rules.values(), branches, strict=True)
        return joined([rule.init(part) for rule, part in pairs])

    def limit(state, magnitudes, own):
        limits, learners = [], []
        states = each(state, len(rules))
        branches = _cells.branches(magnitudes, list(rules), who)
        for i, (rule, part) in enumerate(zip(rules.values(), branches, strict=True)):
            found, learn = rule.limit(
                states[i],
                part,
                lambda name, i=i: _cells.branches(own(name), list(rules), who)[i],
            )
            limits.append(found)
            learners.append(learn)

        def learn_all(kept):
            branches = _cells.branches(kept, list(rules), who)
            pairs = zip(learners, branches, strict=True)
            return joined([learn(part) for learn, part in pairs])

        return _cells.put_together(limits, magnitudes), learn_all

    return Bound(init, limit, largest_window(rules.values()))


def refuse_no_state(state: PyTree, who: str) -> None:
    """Refuses None where a state is needed."""
    if state is None:
        function, argument = who.split(": ")
        raise ValueError(
            f"{function}: {argument} learns from step to step and needs its state, got "
            "None. Call tx.init(params) and pass the state on."
        )


def _is_empty(state: PyTree) -> bool:
    return state is None or isinstance(state, optax.EmptyState)


def joined(states: list[PyTree]) -> PyTree:
    """The state of several bounds: still empty if all are."""
    return states[0] if all(map(_is_empty, states)) else tuple(states)


def each(state: PyTree, count: int) -> list[PyTree]:
    """The states of several bounds, from what `joined` made of them."""
    return [state] * count if _is_empty(state) else list(state)


def largest_window(rules: Iterable[Bound]) -> int:
    """How many magnitudes a bound stores that is made of others."""
    return max((rule.window for rule in rules), default=0)


def _is_rule(node: Any) -> bool:
    return isinstance(node, Bound) or _trees.is_function(node)


def _limits(value: PyTree, magnitudes: PyTree, who: str) -> PyTree:
    """Lays numbers over magnitudes, in their dtype, none below 0."""
    cells = _cells.of(magnitudes)
    arrays, vector = cells.arrays, cells.places.form == "vector"
    if not jax.tree_util.all_leaves([value]):
        values = _cells.laid(value, magnitudes, who)
    elif vector:
        return _cells.like(magnitudes, [_limit(value, arrays[0], (), who)])
    elif np.ndim(value):
        values = [value] * len(arrays)
    else:
        shared = {m.dtype: m for m in arrays if m is not None}
        shared = {t: _limit(value, m, (), who) for t, m in shared.items()}
        laid = [None if m is None else shared[m.dtype] for m in arrays]
        return _cells.like(magnitudes, laid)
    if vector:
        values = [math.inf if v is None else v for v in values]
        numbers = [_limit(v, arrays[0], (), who) for v in values]
        return _cells.like(magnitudes, [_stacked(numbers)])
    pairs = zip(values, arrays, strict=True)
    laid = [None if m is None else _limit(v, m, m.shape, who) for v, m in pairs]
    return _cells.like(magnitudes, laid)


def _stacked(numbers: list[Any]) -> Any:
    static = all(isinstance(n, np.ndarray | np.generic) for n in numbers)
    return np.stack(numbers) if static else jnp.stack(numbers)


def _limit(value: Any, magnitude: jax.Array, shape: tuple[int, ...], who: str) -> Any:
    """A number in the dtype of the magnitudes, static if it is, at least 0.

    Raises:
      ValueError: if it is an array that does not fit the shape.
    """
    if is_static_number(value):
        most = float(jnp.finfo(magnitude.dtype).max)
        value = float(value) if value <= most else math.inf
        return np.asarray(max(value, 0.0), magnitude.dtype)
    limit = jnp.maximum(cast(value, magnitude), 0)
    if limit.ndim and jnp.broadcast_shapes(limit.shape, shape) != shape:
        function, argument = who.split(": ")
        raise ValueError(
            f"{function}: {argument} must be a scalar or fit the magnitudes, got "
            f"shape {limit.shape} for magnitudes of shape {shape}. Pass one number "
            "per leaf."
        )
    return limit


def cast(number: jax.typing.ArrayLike, like: jax.Array) -> jax.Array:
    """The number as an array of the dtype of another."""
    return jnp.asarray(number).astype(like.dtype)
