"""What every experiment is: a question, its sizes, and four steps."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from experiments.arms import Curves
from experiments.config import Config, Tier
from experiments.results import Results

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment.

    Attributes:
      about: one line for the list.
      tiers: its configs by name of the tier.
      facts: what else one needs to know to repeat it, for `config.json`.
      run: computes rows and curves from a config, and shows how far it is.
      table: what is printed, from the rows.
      verdict: what the numbers say, one sentence per line.
      figures: draws the results into a directory and returns the files.
    """

    about: str
    tiers: Mapping[Tier, Config]
    facts: Mapping[str, str]
    run: Callable[[Any, Progress], tuple[Rows, Curves]]
    table: Callable[[Rows], Table]
    verdict: Callable[[Rows], list[str]]
    figures: Callable[[Results, Path], list[Path]]
