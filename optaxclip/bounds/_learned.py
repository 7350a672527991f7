"""How a bound learns: a statistic of every cell that damaged updates cannot reach."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _cells, _mesh
from optaxclip._checks import check_choice
from optaxclip.bounds._rules import Bound, cast, refuse_no_state

PyTree = Any

Number = jax.typing.ArrayLike
Observe = Literal["raw", "current"]


class Statistic(NamedTuple):
    """What is remembered of the magnitudes of a cell.

    Attributes:
      state: the class of the state, a NamedTuple.
      init: a magnitude, or its shape and dtype, to a fresh `state` of arrays whose last
        axes are those of the magnitude.
      add: `(state, m) -> state` that has seen one more magnitude, finite and above 0.
      limit: `(state, m) -> limits` of the magnitude m; inf as long as there is none.
    """

    state: Any
    init: Callable[[Any], Any]
    add: Callable[[Any, jax.Array], Any]
    limit: Callable[[Any, jax.Array], jax.Array]


def learned(statistic: Statistic, observe: str, who: str, window: int = 0) -> Bound:
    """Makes the bound that a statistic gives.

    Only a magnitude that is finite and above 0 is learned from: one NaN or inf leaves
    no trace, and zeros never pull a limit down to 0. The rest of the state of that cell
    stays as it is, to the bit.

    Args:
      statistic: what is remembered, cell by cell.
      observe: "raw": the limit sees the past, and the statistic what was measured;
        "kept": the limit sees the past, and the statistic what the clip kept;
        "current": the limit sees this update too, and the statistic what was measured;
        "limited": as "kept", but for what this bound alone would have kept.
      who: the function of the caller, for messages.
      window: how many magnitudes are stored of a cell.

    Returns:
      A bound whose state is `statistic.state`, each field a vector of cells, or arrays
      of units or elements (`optaxclip._cells`).
    """

    def init(magnitudes):
        cells = [
            None if m is None else _placed(statistic.init(m), m)
            for m in _cells.of(magnitudes).arrays
        ]
        return _by_field(statistic, cells, magnitudes)

    def limit(state, magnitudes, own):
        del own
        refuse_no_state(state, f"{who}: its bound")
        cells = _cells_of(statistic, state, magnitudes, who)
        seen = _cells.of(magnitudes).arrays
        for cell, m in zip(cells, seen, strict=True):
            _check_shapes(cell, m, window, who)
        after = [_grown(statistic, *args) for args in zip(cells, seen, seen)]
        at = after if observe == "current" else cells
        limits = [_limit(statistic, *args) for args in zip(at, seen)]

        def learn(kept):
            if observe in ("raw", "current"):
                return _by_field(statistic, after, magnitudes)
            if observe == "kept":
                learned_from = _cells.of(kept).arrays
            else:
                learned_from = [
                    None if m is None else jnp.minimum(m, c)
                    for m, c in zip(seen, limits, strict=True)
                ]
            grown = [
                _grown(statistic, *args) for args in zip(cells, seen, learned_from)
            ]
            return _by_field(statistic, grown, magnitudes)

        return _cells.like(magnitudes, limits), learn

    return Bound(init, limit, window)


def check_observe(observe: Any, who: str) -> None:
    """Refuses what is no way of observing all of history.

    What is kept is never above such a limit, so one that learned it could only fall.
    """
    check_choice(observe, f"{who}: observe", ("raw", "current"))


def enough(count: jax.Array, warmup: Number, least: int = 1) -> jax.Array:
    """Whether a cell has seen its warm-up, and the least that a statistic needs."""
    needed = jnp.maximum(jnp.asarray(warmup), least)
    return count.astype(needed.dtype) >= needed


def one_more(count: jax.Array, like: jax.Array) -> jax.Array:
    """The count after one more, in the dtype of a magnitude; it does not overflow."""
    return count.astype(like.dtype) + 1


def times(ratio: Number, value: jax.Array, least: float = 0) -> jax.Array:
    """The multiple of a value; inf for a ratio of inf, whatever the value."""
    ratio = jnp.maximum(cast(ratio, value), least)
    finite = jnp.minimum(ratio, jnp.finfo(value.dtype).max)
    return jnp.where(ratio == jnp.inf, jnp.inf, finite * value)


def _placed(cell: Any, magnitude: Any) -> Any:
    """A fresh cell, sharded as the magnitude is, in buffers that can be donated."""
    described = isinstance(magnitude, jax.ShapeDtypeStruct)
    sharding = (magnitude if described else jax.typeof(magnitude)).sharding
    spec = getattr(sharding, "spec", ())

    def place(field):
        field = _mesh.varying_over(field, _mesh.varying(magnitude))
        if not any(spec):
            return jnp.copy(field)
        whole = [None] * (field.ndim - magnitude.ndim)
        return jax.sharding.reshard(field, jax.P(*whole, *spec))

    return jax.tree.map(place, cell)


def _grown(statistic: Statistic, cell: Any, seen: Any, kept: Any) -> Any:
    """The state of a cell after one more update; the same if it had none."""
    if seen is None:
        return cell
    dtype = _dtype(cell)
    used, safe = _observed(seen.astype(dtype), kept.astype(dtype))

    def choose(new, old):
        return jnp.where(jnp.broadcast_to(used, old.shape), new.astype(old.dtype), old)

    return jax.tree.map(choose, statistic.add(cell, safe), cell)


def _observed(seen: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns whether a magnitude is learned from, and the magnitude or else 1."""
    used = jnp.isfinite(seen) & (seen > 0) & jnp.isfinite(kept) & (kept > 0)
    return used, jnp.where(used, kept, jnp.ones_like(kept))


def _limit(statistic: Statistic, cell: Any, seen: Any) -> Any:
    if seen is None:
        return seen
    limits = statistic.limit(cell, seen.astype(_dtype(cell)))
    return jnp.maximum(limits, 0).astype(seen.dtype)


def _dtype(cell: Any) -> Any:
    """The dtype in which a statistic is kept, fixed by `init`."""
    dtypes = [field.dtype for field in cell]
    return next(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))


def _by_field(statistic: Statistic, cells: list[Any], magnitudes: PyTree) -> Any:
    """Turns a list of states, one for each array, into a state of arrays."""
    names = statistic.state._fields
    fields = ([c and getattr(c, name) for c in cells] for name in names)
    return statistic.state(*(_cells.stored(magnitudes, field) for field in fields))


def _cells_of(
    statistic: Statistic, state: Any, magnitudes: PyTree, who: str
) -> list[Any]:
    """Turns a state of arrays into a list of states, one for each array."""
    if not isinstance(state, statistic.state):
        raise ValueError(
            f"{who}: state must be a {statistic.state.__name__}, got "
            f"{type(state).__name__}. Pass the state that tx.init made."
        )
    fields = [_cells.restored(magnitudes, field, who) for field in state]
    return [
        None if cell[0] is None else statistic.state(*cell)
        for cell in zip(*fields, strict=True)
    ]


def _check_shapes(cell: Any, seen: Any, window: int, who: str) -> None:
    """Refuses a state of other updates, or of another window."""
    if seen is None:
        return
    for field in cell or [jnp.zeros(())]:
        stored = field.shape[: field.ndim - seen.ndim]
        other = bool(window and stored) and stored != (window,)
        if other or field.shape[len(stored) :] != seen.shape:
            raise ValueError(
                f"{who}: state must be that of these updates and arguments, got an "
                f"array of shape {field.shape} for magnitudes of shape {seen.shape}. "
                "Pass the state that tx.init made."
            )
