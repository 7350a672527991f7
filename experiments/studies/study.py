"""What every experiment is: a question, its sizes, and four steps."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.arms import Curves
from experiments.config import Config, Tier
from experiments.journal import Journal
from experiments.results import Results, Rows


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment.

    Attributes:
      about: one line for the list.
      tiers: its configs by name of the tier.
      facts: what else one needs to know to repeat a config, for `config.json`; it also
        reads the data, and so refuses what cannot be read before anything is made.
      run: computes rows and curves from a config, and shows and keeps in the journal
        how far it is.
      table: what is printed, from the rows.
      verdict: what the numbers say, one sentence per line.
      figures: draws the results into a directory and returns the files.
    """

    about: str
    tiers: Mapping[Tier, Config]
    facts: Callable[[Any], Mapping[str, Any]]
    run: Callable[[Any, Journal], tuple[Rows, Curves]]
    table: Callable[[Rows], Table]
    verdict: Callable[[Rows], list[str]]
    figures: Callable[[Results, Path], list[Path]]
