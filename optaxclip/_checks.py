"""Checks of arguments that hold at construction, in one wording.

`who` is always "function: argument", as in "clip_by_global_norm: max_norm".
"""

import math
import numbers
from collections.abc import Callable, Sequence
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


def check_that(
    value: Any, who: str, rule: str, holds: Callable[[float], bool], fix: str
) -> None:
    """Refuses what is not a single number, or one for which a rule does not hold.

    Of a JAX array, which may be traced, only dtype and shape are checked.

    Raises:
      TypeError: for what is not a real number.
      ValueError: if the rule does not hold; NaN breaks every rule.
    """
    single = _is_real(value) and jnp.ndim(value) == 0
    if single and (isinstance(value, jax.Array) or holds(float(value))):
        return
    if not single:
        rule, fix = "a single real number", "Pass one number, traced or not."
    function, argument = who.split(": ")
    raise (ValueError if single else TypeError)(
        f"{function}: {argument} must be {rule}, got {argument}={value!r}. {fix}"
    )


def check_least_zero(value: Any, who: str) -> None:
    """Refuses what is not a single number >= 0."""
    check_that(value, who, ">= 0", lambda v: v >= 0, "Pass a number >= 0.")


def check_decay(value: Any, who: str) -> None:
    """Refuses what is no share of a running average that is kept at every step."""
    check_that(
        value,
        who,
        "in [0, 1)",
        lambda decay: 0 <= decay < 1,
        "Pass the share of the average that is kept at every step, such as 0.98.",
    )


def check_count(value: Any, who: str) -> None:
    """Refuses what is no number of observations; it may be traced."""
    check_that(
        value,
        who,
        "a whole number >= 0 and below 2^31",
        lambda count: 0 <= count < 2**31 and count == math.floor(count),
        "Pass a number of updates.",
    )


def check_window(value: Any, who: str) -> int:
    """Returns a number of stored magnitudes, or refuses it; it is static."""
    function, argument = who.split(": ")
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{function}: {argument} must be a Python int, for it is the size of an "
            "array, got a JAX array. With inject_hyperparams, name it in static_args="
            f"{argument!r}."
        )
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        rule, error = "must be a Python int", TypeError
    elif value < 1:
        rule, error = "must be >= 1", ValueError
    else:
        return int(value)
    raise error(
        f"{function}: {argument} {rule}, got {argument}={value!r}. Pass the number of "
        "updates to remember, such as 1000."
    )


def check_choice(value: Any, who: str, choices: Sequence[str]) -> None:
    """Refuses what is not one of a few words."""
    if not isinstance(value, str) or value not in choices:
        function, argument = who.split(": ")
        raise ValueError(
            f"{function}: {argument} must be one of {', '.join(map(repr, choices))}, "
            f"got {argument}={value!r}. Pass one of these."
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
