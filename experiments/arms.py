"""Arms: what an experiment compares, pairs of a learning rate and a clip.

Arms whose clips are of one kind, differing in the threshold only, run side by side in
one compiled program, in which learning rate and threshold are arrays. "No clip" is a
threshold of inf, and so runs beside the clips by global norm.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import clips

Curves = Mapping[str, np.ndarray]


class Arm(NamedTuple):
    """A learning rate and a clip."""

    lr: float
    clip: clips.Clip


class Knobs(NamedTuple):
    """In what arms of one kind differ: shape () in a run, (arms,) side by side."""

    lr: jax.Array
    threshold: jax.Array


def grid(lrs: Sequence[float], specs: Sequence[str]) -> list[Arm]:
    """Returns every pair of a learning rate and a clip."""
    return [Arm(lr, clips.parse(spec)) for lr in lrs for spec in specs]


def by_kind(arms: Sequence[Arm]) -> list[list[int]]:
    """Returns the positions of arms that can run side by side, kind by kind."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for position, arm in enumerate(arms):
        kinds.setdefault(arm.clip.kind, []).append(position)
    return list(kinds.values())


def run(arms: Sequence[Arm], run_kind: Callable[[clips.Clip, Knobs], Curves]) -> Curves:
    """Runs all arms, kind after kind.

    Args:
      arms: what is compared.
      run_kind: takes a clip of the kind and knobs of shape (arms,), and returns arrays
        of shape (arms, ...).

    Returns:
      The arrays for all arms, in their order.
    """
    found: dict[int, Curves] = {}
    for positions in by_kind(arms):
        kind = [arms[i] for i in positions]
        knobs = Knobs(
            lr=jnp.asarray([arm.lr for arm in kind], jnp.float32),
            threshold=jnp.asarray([arm.clip.threshold for arm in kind], jnp.float32),
        )
        curves = jax.device_get(run_kind(kind[0].clip, knobs))
        for place, i in enumerate(positions):
            found[i] = {name: curve[place] for name, curve in curves.items()}
    return {
        name: np.stack([found[i][name] for i in range(len(arms))]) for name in found[0]
    }
