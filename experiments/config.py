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
    """Clips: none, NAME or NAME:ARGUMENTS, as in autoclip:10,window=500."""
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
        _check_lrs(self.lr)
        _check_clips(self.clip)
        _check_seed(self.seed)
        for name in ("hidden", "seeds", "updates", "batch"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class CliffConfig:
    """Gradient descent on the error of one recurrent unit, from a grid of starts."""

    experiment: tyro.conf.Suppress[str]
    lr: tuple[float, ...]
    """Learning rates; every clip is run at each."""
    clip: tuple[str, ...]
    """Clips: none, NAME or NAME:ARGUMENTS, as in autoclip:10,window=500."""
    starts: int = 24
    """Starts per side of the square grid."""
    updates: int = 1000
    """Updates from each start."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _check_lrs(self.lr)
        _check_clips(self.clip)
        _require(self.starts >= 2, "starts", ">= 2", self.starts)
        _require(self.updates >= 1, "updates", ">= 1", self.updates)


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """Norms that are fed to clips, whose limits are compared; nothing is trained."""

    experiment: tyro.conf.Suppress[str]
    clip: tuple[str, ...]
    """Clips: none, NAME or NAME:ARGUMENTS, as in autoclip:10,window=500."""
    seed: int = 0
    """Seed of the norms; every clip sees the same ones."""
    updates: int = 400
    """Number of norms; what happens to them happens at fixed shares of it."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _check_clips(self.clip)
        _check_seed(self.seed)
        _require(self.updates >= 100, "updates", ">= 100", self.updates)


@dataclasses.dataclass(frozen=True)
class DataParallelConfig:
    """Training of one larger LSTM on many devices at once, compared with one device."""

    experiment: tyro.conf.Suppress[str]
    hidden: int
    """Units of the LSTM."""
    lr: tuple[float, ...]
    """Learning rates of Adam; every clip is run at each."""
    clip: tuple[str, ...]
    """Clips: none, NAME or NAME:ARGUMENTS, as in autoclip:10,window=500."""
    batch: int
    """Images per update, drawn with replacement and shared out to the devices."""
    seed: int = 0
    """It decides initial values and batches."""
    updates: int = 100
    """Updates of each run."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _check_lrs(self.lr)
        _check_clips(self.clip)
        _check_seed(self.seed)
        for name in ("hidden", "updates", "batch"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))


Config = RowsConfig | CliffConfig | LimitsConfig | DataParallelConfig


def _check_lrs(lrs: tuple[float, ...]) -> None:
    _check_different("lr", lrs)
    for lr in lrs:
        _require(0 < lr < math.inf, "lr", "finite and > 0", lr)


def _check_clips(specs: tuple[str, ...]) -> None:
    _check_different("clip", specs)
    for spec in specs:
        clips.parse(spec)


def _check_seed(seed: int) -> None:
    _require(0 <= seed < 2**31, "seed", "in [0, 2**31)", seed)


def _check_different(name: str, values: tuple[object, ...]) -> None:
    once = len(values) == len(set(values)) > 0
    _require(once, name, "one or more different values", values)


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {name}={value}.")
