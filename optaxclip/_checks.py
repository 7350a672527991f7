"""Checks of arguments that hold at construction, in one wording.

`who` is always "function: argument", as in "clip_by_global_norm: max_norm".
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _trees


def check_number(value: Any, who: str, *, nan_allowed: bool = False) -> None:
    """Refuses what is not a number, or is negative or NaN, before anything runs.

    Python and NumPy numbers are checked here; JAX arrays may be traced, so only their
    dtype is, and limits made of them are clamped at 0.

    Raises:
      TypeError: for a bool, a string, None or anything else that is not a real number.
      ValueError: for a negative number or NaN.
    """
    function, argument = who.split(": ")
    if not _is_real(value):
        rule, error = "must be a real number", TypeError
    elif isinstance(value, jax.Array):
        return
    else:
        values = _listed(value)
        if any(map(math.isnan, values)) and not nan_allowed:
            rule, error = "must not be NaN", ValueError
        elif any(v < 0 for v in values):
            rule, error = "must be >= 0", ValueError
        else:
            return
    raise error(
        f"{function}: {argument} {rule}, got {argument}={value!r}. Pass a number >= 0; "
        "inf means no limit."
    )


def is_static_number(value: Any) -> bool:
    """Whether a value is a Python or NumPy number, known while tracing."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def negated(value: Any, who: str) -> Any:
    """Returns the magnitude of a lower end: -value, for a number or a schedule.

    Raises:
      TypeError: if the value is neither.
      ValueError: for a positive number or NaN.
    """
    if _trees.is_function(value):
        return lambda step: -value(step)
    function, argument = who.split(": ")
    if not _is_real(value):
        raise TypeError(
            f"{function}: {argument} must be a real number, got {argument}={value!r}. "
            "Pass a number <= 0; -inf means no limit."
        )
    if not isinstance(value, jax.Array) and not all(v <= 0 for v in _listed(value)):
        raise ValueError(
            f"{function}: {argument} must be <= 0, got {argument}={value!r}. The range "
            "must hold 0, or small updates would change sign."
        )
    return jnp.negative(value) if isinstance(value, jax.Array) else -value


def _listed(value: Any) -> list[Any]:
    return [value] if is_static_number(value) else value.ravel().tolist()


def _is_real(value: Any) -> bool:
    if is_static_number(value):
        return True
    dtype = getattr(value, "dtype", None)
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
    )
