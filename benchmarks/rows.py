"""What `python -m benchmarks compile` compiles: clips by name, and shapes of models."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import optax

import optaxclip
from optaxclip import bounds

Shape = tuple[int, ...]


class Row(NamedTuple):
    """What is compiled, and what it is compared with.

    Attributes:
      make: makes the transformation.
      peer: name of the row of optax's clip of the same cells: of elements, units,
        leaves, or the tree.
      has_adam: whether Adam is in it already.
    """

    make: Callable[[], optax.GradientTransformation]
    peer: str | None = None
    has_adam: bool = False


adam = optax.scale_by_adam

_TREE = "optax clip_by_global_norm"
_LEAF = "optax clip_by_block_rms"
_UNIT = "optax adaptive_grad_clip"
_SKIP = "optax apply_if_finite(adam)"
ROWS = {
    "adam": Row(adam, has_adam=True),
    _TREE: Row(lambda: optax.clip_by_global_norm(1.0)),
    "clip_by_global_norm": Row(lambda: optaxclip.clip_by_global_norm(1.0), _TREE),
    "optax clip": Row(lambda: optax.clip(1.0)),
    "clip": Row(lambda: optaxclip.clip(1.0), "optax clip"),
    _LEAF: Row(lambda: optax.clip_by_block_rms(1.0)),
    "clip_by_block_rms": Row(lambda: optaxclip.clip_by_block_rms(1.0), _LEAF),
    "clip_by_leaf_norm": Row(lambda: optaxclip.clip_by_leaf_norm(1.0), _LEAF),
    _UNIT: Row(lambda: optax.adaptive_grad_clip(0.01)),
    "adaptive_grad_clip": Row(lambda: optaxclip.adaptive_grad_clip(0.01), _UNIT),
    "clip_by_unit_norm": Row(lambda: optaxclip.clip_by_unit_norm(1.0), _UNIT),
    "autoclip": Row(lambda: optaxclip.autoclip(), _TREE),
    "zclip": Row(lambda: optaxclip.zclip(), _TREE),
    "adagc": Row(lambda: optaxclip.adagc(), _LEAF),
    "ema_clip": Row(lambda: optaxclip.ema_clip(2.0), _LEAF),
    "percentile by leaf": Row(
        lambda: optaxclip.clip_by_leaf_norm(bounds.percentile(10, window=100)), _LEAF
    ),
    "recorded global": Row(
        lambda: optaxclip.recorded(optaxclip.clip_by_global_norm(1.0)), _TREE
    ),
    "recorded leaf": Row(
        lambda: optaxclip.recorded(optaxclip.clip_by_leaf_norm(1.0)), _LEAF
    ),
    _SKIP: Row(lambda: optax.apply_if_finite(adam(), 5), has_adam=True),
    "skip_steps(adam)": Row(lambda: optaxclip.skip_steps(adam()), _SKIP, True),
}


def names(only: Sequence[str] | None = None) -> list[str]:
    """Returns the rows whose name contains one of the words; None: all of them."""
    return [n for n in ROWS if only is None or any(word in n for word in only)]


def model(count: int) -> list[Shape]:
    """Returns the shapes of the parameters of a model of so many leaves.

    12: an actor and a critic. 13, 148: a transformer of 124M parameters, its twelve
    layers scanned or not. Up to 4: matrices of 64 MiB. Any other: small matrices.
    """
    if count == 12:
        layers = [(17, 256), (256,), (256, 256), (256,)]
        return [*layers, (256, 6), (6,), *layers, (256, 1), (1,)]
    if count == 13:
        return _transformer(1, 1, 12)
    if count == 148:
        return _transformer(2, 12)
    if count <= 4:
        return [(4096, 4096)] * count
    return [(64, 32 + i % 7) for i in range(count)]


def _transformer(norm: int, layers: int, *stacked: int) -> list[Shape]:
    """Returns the shapes of GPT-2 small, of so many leaves a normalization."""
    d = 768
    attention = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    layer = [*norm * [(d,)], *attention, *norm * [(d,)], *mlp]
    stack = [(*stacked, *shape) for shape in layers * layer]
    return [(50_304, d), (1024, d), *stack, *norm * [(d,)]]
