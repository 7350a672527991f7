"""Clips by name: `clip_by_global_norm:1.0` becomes a factory and a threshold.

What is written is `none`, or NAME, or NAME: and arguments with commas between them.

| what is written | what it is |
|---|---|
| `none` | no clip, that is the global norm with threshold inf |
| `zclip` | a named method with its defaults |
| `clip_by_leaf_norm:1` | with another threshold: its first argument |
| `autoclip:10,window=500` | and with other options |
| `zclip:beyond=mean` | with the default threshold |
| `adaclip:0.9,rescale=false` | an option that is true or false |

The threshold is what the method is tuned by: a norm, but also a percentile, a z-score,
a decay. The names are those of the library, and `median_mad`.
"""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

import optaxclip


def median_mad(
    k: jax.typing.ArrayLike = 3.0, *, window: int = 1000, warmup: int = 25
) -> optaxclip.Clip:
    """Clips by global norm at the median plus k robust deviations of the last norms."""
    bound = optaxclip.bounds.median_mad(
        k, window=window, warmup=warmup, who="median_mad"
    )
    return optaxclip.clip_by_global_norm(bound)


FACTORIES = {
    factory.__name__: factory
    for factory in (
        optaxclip.adaclip,
        optaxclip.adagc,
        optaxclip.adagn,
        optaxclip.adanorm,
        optaxclip.adaptive_grad_clip,
        optaxclip.adopt_clip,
        optaxclip.autoclip,
        optaxclip.clip,
        optaxclip.clip_by_block_rms,
        optaxclip.clip_by_global_norm,
        optaxclip.clip_by_leaf_norm,
        optaxclip.clip_by_trust_ratio,
        optaxclip.clip_by_unit_norm,
        optaxclip.ema_clip,
        optaxclip.mean_clip,
        optaxclip.median_clip,
        median_mad,
        optaxclip.norm_growth_clip,
        optaxclip.normalize_by_global_norm,
        optaxclip.normalize_by_leaf_norm,
        optaxclip.normalize_by_trust_ratio,
        optaxclip.percentile_clip,
        optaxclip.quantile_clip,
        optaxclip.spam_clip,
        optaxclip.zclip,
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

    def make(self, threshold: jax.typing.ArrayLike) -> optaxclip.Clip:
        """Makes the clip, recorded, for a threshold of shape (), traced or not.

        Where runs are spread over devices, each run is all on one.
        """
        clip = FACTORIES[self.name](threshold, **dict(self.options))
        return optaxclip.sharded(optaxclip.recorded(clip), ())


@functools.cache
def parse(spec: str) -> Clip:
    """Reads a clip.

    Args:
      spec: what is written, as in the table above.

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
            f"clip {spec!r} is not known: pass none or one of {', '.join(FACTORIES)}."
        )
    words = [word.partition("=") for word in text.split(",") if word]
    positional = [_value(key) for key, equals, _ in words if not equals]
    named = {key: _value(value) for key, equals, value in words if equals}
    try:
        call = inspect.signature(FACTORIES[name]).bind(*positional, **named)
        call.apply_defaults()
        (_, threshold), *options = call.arguments.items()
        _check_bools(call)
        clip = Clip(spec, name, threshold, tuple(options))
        jax.eval_shape(functools.partial(_clip_a_matrix, clip))
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"clip {spec!r} is not possible: {reason}") from error
    return clip


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def _check_bools(call: inspect.BoundArguments) -> None:
    """Refuses another word where the method takes true or false."""
    for name, value in call.arguments.items():
        default = call.signature.parameters[name].default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {name}={value}.")


def _clip_a_matrix(clip: Clip) -> None:
    """Lets the clip refuse its arguments."""
    params = {"kernel": jnp.ones((2, 2))}
    transformation = clip.make(clip.threshold)
    transformation.update(params, transformation.init(params), params)
