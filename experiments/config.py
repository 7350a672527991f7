"""What an experiment runs: frozen dataclasses, whose fields are its options.

A config and a commit are all that is needed to repeat a run: data, batches and initial
values follow from it. `tiers` of an experiment (see `experiments.studies`) are named
configs; the command line overrides single fields.
"""

import dataclasses
import math
from typing import Literal

import tyro

from experiments import clips

Tier = Literal["smoke", "standard"]


class UsageError(Exception):
    """A request that cannot be met; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """Training of a recurrent classifier which reads an image row by row."""

    experiment: tyro.conf.Suppress[str]
    cell: tyro.conf.Suppress[Literal["rnn", "lstm"]]
    hidden: int
    """Units of the recurrent cell."""
    optimizer: Literal["sgd", "adam"]
    """What follows the clip."""
    lr: tuple[float, ...]
    """Learning rates; every clip is run at each."""
    clip: tuple[str, ...]
    """Clips: none, or NAME:THRESHOLD[,OPTION=VALUE...]."""
    seed: int = 0
    """First seed; it decides initial values and batches."""
    seeds: int = 5
    """Number of seeds; every clip sees the same ones."""
    updates: int = 1000
    """Updates of each run."""
    batch: int = 32
    """Images per update, drawn with replacement."""
    check: bool = False
    """Also check values while running: hidden states, and the law of the clip."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _check_grid(self.lr, self.clip)
        _require(0 <= self.seed < 2**31, "seed", "in [0, 2**31)", self.seed)
        for name in ("hidden", "seeds", "updates", "batch"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class CliffConfig:
    """Gradient descent on the error of one recurrent unit, from a grid of starts."""

    experiment: tyro.conf.Suppress[str]
    lr: tuple[float, ...]
    """Learning rates; every clip is run at each."""
    clip: tuple[str, ...]
    """Clips: none, or NAME:THRESHOLD[,OPTION=VALUE...]."""
    starts: int = 24
    """Starts per side of the square grid."""
    updates: int = 1000
    """Updates from each start."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _check_grid(self.lr, self.clip)
        _require(self.starts >= 2, "starts", ">= 2", self.starts)
        _require(self.updates >= 1, "updates", ">= 1", self.updates)


Config = RowsConfig | CliffConfig


def _check_grid(lrs: tuple[float, ...], specs: tuple[str, ...]) -> None:
    for name, values in (("lr", lrs), ("clip", specs)):
        once = len(values) == len(set(values)) > 0
        _require(once, name, "one or more different values", values)
    for lr in lrs:
        _require(0 < lr < math.inf, "lr", "finite and > 0", lr)
    for spec in specs:
        clips.parse(spec)


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {name}={value}.")
