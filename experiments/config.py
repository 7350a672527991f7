"""What an experiment runs: frozen dataclasses, whose fields are its options.

A config and a commit are all that is needed to repeat a run: data, batches and initial
values follow from it. Every study has a class of its own, with configs named by tier;
the command line overrides single fields.
"""

import dataclasses
import math
from typing import Literal

import tyro

from experiments import clips

Tier = Literal["smoke", "standard", "full"]


class UsageError(Exception):
    """A request that cannot be met; the message is one line for the user."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every experiment has."""

    experiment: tyro.conf.Suppress[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Training with every clip at every learning rate, on the same seeds."""

    lr: tuple[float, ...]
    """Learning rates; every clip is run at each."""
    clip: tuple[str, ...]
    """Clips: none, NAME or NAME:ARGUMENTS, as in autoclip:10,window=500."""
    seed: int = 0
    """First seed; it decides initial values and batches."""
    seeds: int
    """Number of seeds; every clip sees the same ones."""
    updates: int
    """Updates of each run."""
    batch: int
    """Examples per update."""
    check: bool = False
    """Also check values while running: hidden states, and the law of the clip."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        check_lrs(self.lr)
        check_clips(self.clip)
        check_seeds(self.seed, self.seeds)
        check_counts(updates=self.updates, batch=self.batch)


def check_lrs(lrs: tuple[float, ...]) -> None:
    """Refuses what are no learning rates."""
    check_different("lr", lrs)
    for lr in lrs:
        require(0 < lr < math.inf, "lr", "finite and > 0", lr)


def check_clips(specs: tuple[str, ...]) -> None:
    """Refuses clips that do not exist, or refuse their arguments."""
    found = {(clip.kind, clip.threshold) for clip in map(clips.parse, specs)}
    once = len(found) == len(specs) > 0
    require(once, "clip", "one or more different values", specs)


def check_seeds(seed: int, seeds: int = 1) -> None:
    """Refuses a first seed and a number of seeds that go out of range."""
    require(0 <= seed < 2**31, "seed", "in [0, 2**31)", seed)
    check_counts(seeds=seeds)
    require(seed + seeds <= 2**31, "seeds", f"<= 2**31 - {seed} (seed)", seeds)


def check_counts(**counts: int) -> None:
    """Refuses numbers below 1."""
    for name, count in counts.items():
        require(count >= 1, name, ">= 1", count)


def check_different(name: str, values: tuple[object, ...]) -> None:
    """Refuses no values, and the same value twice."""
    once = len(values) == len(set(values)) > 0
    require(once, name, "one or more different values", values)


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Refuses a value that breaks a rule, in one line."""
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {name}={value}.")
