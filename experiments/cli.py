"""The command line: `python -m experiments list | run | plot | demo`.

What cannot be done ends with one line on stderr and exit code 2.
"""

import contextlib
import dataclasses
import functools
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments import devices, progress, results
from experiments.config import Config, Tier, UsageError
from experiments.devices import Machine
from experiments.results import Results
from experiments.studies import STUDIES
from experiments.studies.study import Study

PROG = "python -m experiments"
# Accelerators round products to fewer bits than float32 has unless told otherwise.
PRECISION = "highest"


@dataclasses.dataclass(frozen=True)
class List:
    """List the experiments."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Run an experiment: a table, what it says, and figures."""

    config: Config
    tier: Tier = "smoke"
    """Size of the run; the defaults of the other options are those of the tier."""
    out: Path | None = None
    """Directory for what comes out, empty or new. Default: the next runs/NAME-1."""
    machine: Machine = dataclasses.field(default_factory=Machine)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Redraw all figures from stored results."""

    directory: tyro.conf.Positional[Path]
    """A run directory, or one that holds run directories."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Run all experiments, one after another."""

    tier: Tier = "smoke"
    """Size of the runs."""
    out: Path | None = None
    """Directory for what comes out, empty or new. Default: the next runs/demo-1."""
    machine: Machine = dataclasses.field(default_factory=Machine)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads and runs a command."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        match _read(sys.argv[1:] if arguments is None else arguments):
            case List():
                list_studies(console)
            case Run(config, _, out, machine):
                with devices.use(machine):
                    devices.agree(config)
                    run(config, _create(out, config.experiment), console)
            case Plot(directory):
                plot(directory, console)
            case Demo(tier, out, machine):
                with devices.use(machine):
                    devices.agree(tier)
                    directory = _create(out, "demo")
                    for name, study in STUDIES.items():
                        part = _create(directory / name, name)
                        run(study.tiers[tier], part, console)
    except UsageError as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{error.filename}: {error.strerror}.")


def list_studies(console: Console) -> None:
    """Lists the experiments."""
    table = Table("name", "what it is", "sizes", box=SIMPLE)
    for name, study in STUDIES.items():
        table.add_row(name, study.about, ", ".join(study.tiers))
    console.print(table)


def run(config: Config, directory: Path, console: Console) -> None:
    """Runs an experiment into an empty directory; several processes work together."""
    study = STUDIES[config.experiment]
    facts = {**study.facts, "matmul_precision": PRECISION}
    if devices.is_first():
        results.begin(directory, config, facts)
    with progress.bar(console) as shown, jax.default_matmul_precision(PRECISION):
        rows, curves = study.run(config, shown)
    if not devices.is_first():
        return
    results.finish(directory, rows, curves)
    found = results.load(directory)
    console.print(study.table(found.rows))
    for line in study.verdict(found.rows):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"results and figures: {directory}", soft_wrap=True, highlight=False)
    _draw(study, found, directory, console)


def plot(directory: Path, console: Console) -> None:
    """Draws the figures of all runs in a directory, from what is stored there."""
    runs = sorted(path.parent for path in directory.rglob("config.json"))
    if not runs:
        raise UsageError(f"{directory} holds no run: there is no config.json.")
    for path in runs:
        found = results.load(path)
        name = found.about.get("config", {}).get("experiment")
        if name not in STUDIES:
            raise UsageError(f"{path} holds no run of {', '.join(STUDIES)}.")
        _draw(STUDIES[name], found, path, console)


def _create(out: Path | None, name: str) -> Path:
    """Makes a run directory, the same for all processes."""
    return devices.from_first(functools.partial(results.create, out, name))


def _draw(study: Study, found: Results, directory: Path, console: Console) -> None:
    for path in study.figures(found, directory):
        console.print(str(path), soft_wrap=True, highlight=False)


def _read(arguments: Sequence[str]) -> Any:
    """Turns arguments into a command; the tier decides about other defaults."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            tier, _ = tyro.cli(
                _tier, args=arguments, return_unknown_args=True, add_help=False
            )
            return tyro.extras.subcommand_cli_from_dict(
                {"list": List, "run": _run_of(tier), "plot": Plot, "demo": Demo},
                prog=PROG,
                args=arguments,
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.CascadeSubcommandArgs,
                    tyro.conf.FlagCreatePairsOff,
                ),
            )
    except SystemExit:
        if messages.getvalue():
            _refuse(_one_line(messages.getvalue()))
        raise


def _tier(tier: Tier = "smoke") -> Tier:
    return tier


def _run_of(tier: Tier) -> type[Run]:
    """Returns `Run` with a subcommand per experiment and the defaults of a tier."""
    config = tyro.extras.subcommand_type_from_defaults(
        {name: study.tiers[tier] for name, study in STUDIES.items()},
        {name: study.about for name, study in STUDIES.items()},
    )
    return dataclasses.make_dataclass(
        "Run",
        [("config", config), ("tier", Tier, tier)],
        bases=(Run,),
        namespace={"__doc__": Run.__doc__},
        frozen=True,
    )


def _one_line(message: str) -> str:
    """Takes what went wrong, and what there is instead, out of a box with more."""
    lines = [line.strip("│ ") for line in message.splitlines()[1:-1]]
    found, *others = re.split(r"─+", " ".join(lines))
    choices = [part for part in others if part.startswith(" Available")]
    reason = re.sub(r"^Error parsing (config|\S*machine): ", "", found).rstrip()
    return "".join([reason, *choices])


def _refuse(message: str) -> NoReturn:
    print(f"{PROG}: {message}", file=sys.stderr)
    sys.exit(2)
