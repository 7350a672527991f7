"""Clips by name: `clip_by_global_norm:1.0` becomes a factory and a threshold.

| what is written | example |
|---|---|
| `none`: no clip, that is the global norm with threshold inf | `none` |
| `NAME:THRESHOLD` | `clip_by_leaf_norm:1` |
| `NAME:THRESHOLD,OPTION=VALUE,...` | `clip_by_global_norm:10,ord=1` |
"""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optaxclip

FACTORIES = {
    factory.__name__: factory
    for factory in (
        optaxclip.adaptive_grad_clip,
        optaxclip.clip,
        optaxclip.clip_by_block_rms,
        optaxclip.clip_by_global_norm,
        optaxclip.clip_by_leaf_norm,
        optaxclip.clip_by_unit_norm,
        optaxclip.normalize_by_global_norm,
        optaxclip.normalize_by_leaf_norm,
    )
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A named clip.

    Attributes:
      spec: what the user wrote.
      name: a key of `FACTORIES`.
      threshold: the first argument of the factory.
      options: its other arguments, which are static.
    """

    spec: str
    name: str
    threshold: float
    options: tuple[tuple[str, Any], ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What clips that differ only in their threshold have in common."""
        return self.name, self.options

    def make(
        self, threshold: jax.typing.ArrayLike
    ) -> optax.GradientTransformationExtraArgs:
        """Makes the clip, recorded, for a threshold of shape (), traced or not."""
        bound = optaxclip.recorded(threshold)
        return FACTORIES[self.name](bound, **dict(self.options))


def parse(spec: str) -> Clip:
    """Reads a clip.

    Args:
      spec: `none` or `NAME:THRESHOLD[,OPTION=VALUE...]`.

    Returns:
      The clip.

    Raises:
      ValueError: if there is no such clip, or it refuses its arguments.
    """
    if spec == "none":
        return dataclasses.replace(parse("clip_by_global_norm:inf"), spec=spec)
    name, _, text = spec.partition(":")
    if name not in FACTORIES:
        raise ValueError(
            f"clip must be none or one of {', '.join(FACTORIES)}, got {spec!r}."
        )
    words = [word.partition("=") for word in text.split(",") if word]
    positional = [_value(key) for key, equals, _ in words if not equals]
    named = {key: _value(value) for key, equals, value in words if equals}
    try:
        call = inspect.signature(FACTORIES[name]).bind(*positional, **named)
        call.apply_defaults()
        (_, threshold), *options = call.arguments.items()
        clip = Clip(spec, name, threshold, tuple(options))
        jax.eval_shape(functools.partial(_clip_a_matrix, clip))
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"clip {spec!r} is not possible: {reason}") from error
    return clip


def _value(text: str) -> int | float | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def _clip_a_matrix(clip: Clip) -> None:
    """Lets the clip refuse its arguments."""
    params = {"kernel": jnp.ones((2, 2))}
    transformation = clip.make(clip.threshold)
    transformation.update(params, transformation.init(params), params)
