"""The command line: `python -m benchmarks list | run [NAME ...] | compile`."""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import compiled, gates, measure, timed
from benchmarks.measure import Figure

CASES = gates.CASES | timed.CASES
DEFAULT = [name for name in CASES if name not in timed.SLOW]
_COLOURS = {"met": "green", "missed": "red", "unclear": "yellow", "busy": "yellow"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 if the compiler, not the clock, misses a target."""
    args = _parse(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    if args.command == "list":
        console.print(_list())
        return 0
    if args.command == "compile":
        compiled.run(args, console)
        return 0
    rows: list[dict[str, Any]] = []
    machine = measure.machine()
    console.print(", ".join(f"{k} {v}" for k, v in machine.items()), markup=False)
    for name in args.names:
        load, start = os.getloadavg()[0], time.perf_counter()
        found = list(_judged(name))
        seconds = time.perf_counter() - start
        console.print(_table(f"{name} ({seconds:.0f} s, load {load:.1f})", found))
        rows += [{"load": load, **as_row(name, *judged)} for judged in found]
    if args.json:
        report = {"machine": machine, "figures": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    missed = {row["case"] for row in rows if row["verdict"] == "missed"}
    return 1 if missed & set(gates.CASES) else 0


def as_row(name: str, figure: Figure, verdict: str) -> dict[str, Any]:
    """Returns a figure as it is written to a file: JSON has no inf."""
    row = {"case": name, **dataclasses.asdict(figure), "verdict": verdict}
    row["peers"] = {
        peer: value if math.isfinite(value) else str(value)
        for peer, value in figure.peers.items()
    }
    return row


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show the cases")
    run = commands.add_parser("run", help="measure, and print a table per case")
    run.add_argument(
        "names", nargs="*", metavar="NAME", help="cases; none: all but the slow ones"
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    compiler = commands.add_parser(
        "compile", help="show what a compiler makes of clips"
    )
    compiled.add_options(compiler)
    args = parser.parse_args(argv)
    if args.command == "compile":
        compiled.check(compiler, args)
    if args.command == "run":
        unknown = [name for name in args.names if name not in CASES]
        if unknown:
            run.error(f"no case {unknown[0]!r}; there are: {', '.join(CASES)}")
        if args.json and not args.json.absolute().parent.is_dir():
            run.error(f"--json: no directory {args.json.absolute().parent}")
        args.names = args.names or DEFAULT
    return args


def _judged(name: str) -> Iterator[tuple[Figure, str]]:
    """Yields the figures of a case; times of a busy machine are not judged."""
    busy = name in timed.CASES and measure.busy()
    for figure in CASES[name]():
        noisy = busy and figure.quartiles is not None
        yield figure, "busy" if noisy else figure.verdict


def _list() -> Table:
    table = Table("case", "judged by", "what", box=box.SIMPLE_HEAD)
    for name, case in CASES.items():
        by = "compiler" if name in gates.CASES else "clock"
        slow = ", only by name" if name in timed.SLOW else ""
        table.add_row(name, by + slow, (case.__doc__ or "").splitlines()[0])
    return table


def _table(title: str, found: list[tuple[Figure, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("what", no_wrap=True)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("quartiles")
    table.add_column("target", no_wrap=True)
    table.add_column("peers")
    table.add_column("verdict", no_wrap=True)
    for figure, verdict in found:
        table.add_row(
            figure.what,
            _number(figure.value),
            figure.unit,
            " .. ".join(map(_number, figure.quartiles or ())),
            "" if figure.target is None else f"<= {_number(figure.target)}",
            ", ".join(
                f"{peer} {_number(value)}" for peer, value in figure.peers.items()
            ),
            f"[{_COLOURS.get(verdict, 'default')}]{verdict}",
        )
    return table


def _number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.0e}"


if __name__ == "__main__":
    sys.exit(main())
