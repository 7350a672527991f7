"""The command line: `python -m experiments list | run | resume | plot | suite`.

What cannot be done ends with one line on stderr and exit code 2; what was stopped, with
exit code 130 and the command that goes on.
"""

import contextlib
import dataclasses
import functools
import io
import json
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

from experiments import board, devices, journal, progress, report, results
from experiments.config import Config, Tier, UsageError, check_different
from experiments.devices import Machine
from experiments.journal import Journal, Stopped, stopping
from experiments.studies import STUDIES
from experiments.studies.study import Study

PROG = "python -m experiments"
# Accelerators round products to fewer bits than float32 has unless told otherwise.
PRECISION = "highest"
# The exit code of a shell for a program that Ctrl-C ended.
STOPPED = 130


@dataclasses.dataclass(frozen=True)
class List:
    """List the experiments."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Run an experiment: a table, what it says, figures, and a page of all of it."""

    config: Config
    tier: Tier = "smoke"
    """Size of the run; the defaults of the other options are those of the tier."""
    out: Path | None = None
    """Directory for what comes out, empty or new. Default: the next runs/NAME-1."""
    tensorboard: bool = False
    """Also write logs of training for TensorBoard (needs the package tensorboardX;
    explode, cliff, smoothness, limits and data_parallel have none)."""
    machine: Machine = dataclasses.field(default_factory=Machine)


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with what was stopped, bit for bit as if it had not been."""

    directory: tyro.conf.Positional[Path]
    """A run directory, or one that holds run directories."""
    machine: Machine = dataclasses.field(default_factory=Machine)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Redraw all figures and pages from stored results."""

    directory: tyro.conf.Positional[Path]
    """A run directory, or one that holds run directories."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Run several experiments, one after another."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of experiments. Default: all."""
    tier: Tier = "smoke"
    """Size of the runs."""
    out: Path | None = None
    """Directory for what comes out, empty or new. Default: the next runs/suite-1."""
    machine: Machine = dataclasses.field(default_factory=Machine)

    def __post_init__(self) -> None:
        """Refuses what is no experiment."""
        for name in self.names:
            if name not in STUDIES:
                raise ValueError(
                    f"names must be of {', '.join(STUDIES)}, got names={name}."
                )
        if self.names:
            check_different("names", self.names)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads and runs a command."""
    # Without markup: [inf, inf] is an interval.
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False)
    try:
        match _read(sys.argv[1:] if arguments is None else arguments):
            case List():
                list_studies(console)
            case Run(config, _, out, tensorboard, machine):
                with devices.use(machine):
                    devices.agree(config)
                    run([config], out, config.experiment, console, tensorboard)
            case Suite(names, tier, out, machine):
                with devices.use(machine):
                    devices.agree((names, tier))
                    configs = [STUDIES[name].tiers[tier] for name in names or STUDIES]
                    run(configs, out, "suite", console)
            case Resume(directory, machine):
                with devices.use(machine):
                    resume(directory, console)
            case Plot(directory):
                plot(directory, console)
    except UsageError as error:
        _refuse(str(error))
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        _refuse(f"{where}{error.strerror or error}.")
    except KeyboardInterrupt:
        print(f"{PROG}: stopped.", file=sys.stderr)
        sys.exit(STOPPED)


def list_studies(console: Console) -> None:
    """Lists the experiments."""
    table = Table("name", "what it is", "sizes", box=SIMPLE)
    for name, study in STUDIES.items():
        table.add_row(name, study.about, ", ".join(study.tiers))
    console.print(table)


def run(
    configs: Sequence[Config],
    out: Path | None,
    name: str,
    console: Console,
    tensorboard: bool = False,
) -> None:
    """Runs experiments into an empty directory, one in it, several below it.

    All data are read, and all configs stored, before the first experiment begins: what
    cannot be read is refused at once, and what is stopped can be resumed as a whole.
    """
    if tensorboard:
        board.require()
    facts = [STUDIES[config.experiment].facts(config) for config in configs]
    top = devices.from_first(functools.partial(results.create, out, name))
    places = [top if name != "suite" else top / each.experiment for each in configs]
    if devices.is_first():
        for place, config, fact in zip(places, configs, facts, strict=True):
            place.mkdir(exist_ok=True)
            facts_of_run = {**fact, "matmul_precision": PRECISION}
            results.begin(place, config, facts_of_run, tensorboard)
    for place, config in zip(places, configs, strict=True):
        work(place, config, top, tensorboard, console)


def resume(directory: Path, console: Console) -> None:
    """Goes on with all runs in a directory that are not finished."""
    for path in devices.from_first(lambda: _runs(directory)):
        if devices.from_first(lambda path=path: results.is_finished(path)):
            console.print(f"{path} is finished", soft_wrap=True, highlight=False)
            if devices.is_first():
                journal.remove(path)
                if not (path / report.NAME).is_file():
                    show(path, console)
            continue
        about = devices.from_first(lambda path=path: results.read_about(path))
        study = _study(path, about)
        config = results.read_config(about, type(study.tiers["smoke"]))
        _check_same(path, about, study.facts(config))
        if about["tensorboard"]:
            board.require()
        work(path, config, directory, about["tensorboard"], console)


def work(
    directory: Path, config: Config, top: Path, tensorboard: bool, console: Console
) -> None:
    """Does, or goes on with, an experiment, and shows its results."""
    study = STUDIES[config.experiment]
    log = board.open_board(directory / "tensorboard") if tensorboard else None
    with progress.bar(console) as bar, jax.default_matmul_precision(PRECISION):
        kept = Journal(directory, bar, log)
        try:
            with stopping(kept):
                rows, curves = study.run(config, kept)
        except Stopped:
            bar.stop()
            _stop(top)
        except (jax.errors.JaxRuntimeError, AssertionError) as error:
            # Too little memory; or what --check has found.
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"{config.experiment} cannot go on: {reason}") from error
    kept.keep()
    if devices.is_first():
        results.finish(directory, rows, curves)
        kept.finish()
        show(directory, console)
    if devices.any_of(kept.stopping):
        _stop(top)


def plot(directory: Path, console: Console) -> None:
    """Shows all runs in a directory that are finished, and names the others."""
    finished = {path: results.is_finished(path) for path in _runs(directory)}
    for path in (path for path, is_finished in finished.items() if is_finished):
        show(path, console)
    unfinished = [
        str(path) for path, is_finished in finished.items() if not is_finished
    ]
    if len(unfinished) == len(finished):
        raise UsageError(f"no finished run is in {', '.join(unfinished)}: see resume.")
    for name in unfinished:
        console.print(f"{name} is not finished", soft_wrap=True, highlight=False)


def show(directory: Path, console: Console) -> None:
    """Prints and draws what is stored in a run directory, and makes a page of it."""
    found = results.load(directory)
    study = _study(directory, found.about)
    try:
        table, verdict = study.table(found.rows), study.verdict(found.rows)
    except KeyError as error:
        raise UsageError(
            f"{directory} was made by another version, without {error}. Run it again: "
            f"{found.about['command']}"
        ) from error
    console.print(table)
    for line in verdict:
        console.print(line, soft_wrap=True, highlight=False)
    drawn = study.figures(found, directory)
    page = report.write_page(directory, found.about, study.about, table, verdict, drawn)
    for path in (*drawn, page):
        console.print(str(path), soft_wrap=True, highlight=False)


def _runs(directory: Path) -> list[Path]:
    """Returns the run directories in a directory, itself or below it."""
    runs = sorted(path.parent for path in directory.rglob("config.json"))
    if not runs:
        raise UsageError(f"{directory} holds no run: there is no config.json.")
    return runs


def _check_same(directory: Path, about: dict[str, Any], facts: Any) -> None:
    """Refuses to go on with other data, or elsewhere: the bits would differ."""
    now = json.loads(json.dumps({**facts, **results.surroundings()}, default=str))
    for name, value in now.items():
        if about.get(name) != value:
            raise UsageError(
                f"{directory} was begun with {name} {about.get(name)}, and here it is "
                f"{value}.{_hint(name, about)} To run it again: {about['command']}"
            )


def _hint(name: str, about: dict[str, Any]) -> str:
    """Says how to get as many CPU devices as a run was begun on."""
    count, _, kind = str(about.get(name)).partition(" x ")
    if name != "device" or kind != "cpu":
        return ""
    return f" To go on, pass --devices {int(count) // about.get('processes', 1)}."


def _stop(top: Path) -> NoReturn:
    if devices.is_first():
        told = "stopped, what is done is kept. To go on"
        option = results.devices_option(jax.local_device_count())
        print(f"{PROG}: {told}: {PROG} resume {top}{option}", file=sys.stderr)
    sys.exit(STOPPED)


def _study(directory: Path, about: dict[str, Any]) -> Study:
    name = about["config"].get("experiment")
    if not isinstance(name, str) or name not in STUDIES:
        raise UsageError(f"{directory} holds no run of {', '.join(STUDIES)}.")
    return STUDIES[name]


def _read(arguments: Sequence[str]) -> Any:
    """Turns arguments into a command; the tier decides about other defaults."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            tier, _ = tyro.cli(
                _tier, args=arguments, return_unknown_args=True, add_help=False
            )
            return tyro.extras.subcommand_cli_from_dict(
                {
                    "list": List,
                    "run": _run_of(tier),
                    "resume": Resume,
                    "plot": Plot,
                    "suite": Suite,
                },
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
