"""What the compiler makes of a clip, for an H100, a TPU v5e or a CPU.

XLA compiles for a described device, which need not be there. Nothing is run, so these
are facts of the compiled program, not times. In a table, for each number of leaves:

* kernels: what runs if every conditional takes its cheapest branch (where a step may be
  skipped, that is the skipped one), a loop's body once;
* copies: those among them, and those between the memories of a TPU;
* loops, conds: `while` and `conditional`; at each a GPU waits for a predicate;
* passes: bytes that these kernels read and write in main memory, over those of the
  parameters; with --split, those of one device over all parameters;
* temp: bytes held besides arguments and results, vector memory too, over the same;
* trace, compile: seconds on this machine, which others may use as well;
* cycles: what the compiler for TPUs expects; of fusions and reductions only, not of
  scalar instructions and copies; every loop's body once, every branch;
* collectives: communication between devices, of every branch, with --split;
* x optax: the number before it, over that of optax's clip of the same cells.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import compiler, measure, rows, targets
from benchmarks.compiler import Compiled

LEAVES = (2, 12, 13, 100)
WHAT = "what the compiler makes of it; nothing was run"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    option = parser.add_argument
    option("--for", dest="target", required=True, choices=targets.NAMES)
    option(
        "--leaves",
        type=int,
        nargs="+",
        metavar="N",
        default=LEAVES,
        help="how many leaves; 2: of 64 MiB, 12: an actor and a critic, 13: a scanned "
        "transformer, 148: one that is not, others: small matrices; "
        f"{' '.join(map(str, LEAVES))} if not given",
    )
    option("--adam", action="store_true", help="with scale_by_adam behind each clip")
    option("--split", action="store_true", help="leaves split over four devices")
    option("--only", nargs="+", metavar="NAME", help="rows with NAME in their name")
    option("--json", type=Path, metavar="FILE", help="write the rows here")
    option("--dump", type=Path, metavar="DIR", help="write the compiled programs here")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the process with code 2 if an option is wrong or a package is missing."""
    for count in args.leaves:
        if count < 1:
            parser.error(f"--leaves: must be >= 1, got {count}")
    for word in args.only or ():
        if not rows.names([word]):
            known = ", ".join(rows.ROWS)
            parser.error(f"--only: no row has {word!r} in its name; there are: {known}")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        parser.error(f"--json: cannot write a file {args.json.absolute()}")
    if args.dump and args.dump.exists() and not args.dump.is_dir():
        parser.error(f"--dump: {args.dump} is no directory")
    if line := targets.missing(args.target):
        parser.exit(2, f"{parser.prog}: error: --for {args.target}: {line}\n")


def run(args: argparse.Namespace, console: Console) -> None:
    """Compiles, prints a table for each number of leaves, and writes the files."""
    console.width = max(console.width, 160)  # wrapped figures can be read, cut ones not
    devices = targets.devices(args.target, targets.COUNT if args.split else 1)
    place = compiler.placement(devices)
    machine = measure.machine() | targets.compilers(args.target)
    console.print(", ".join(f"{k} {v}" for k, v in machine.items()), markup=False)
    label = args.target + ", Adam behind" * args.adam + ", split" * args.split
    names = rows.names(args.only)
    every: list[Compiled] = []
    for leaves in args.leaves:
        made = []
        for each in compiler.compile_rows(names, leaves, place, adam=args.adam):
            made.append(each)
            if args.dump:
                args.dump.mkdir(parents=True, exist_ok=True)
                file = re.sub(r"\W+", "_", f"{label} {leaves} {each.name}").strip("_")
                (args.dump / f"{file}.txt").write_text(each.text)
        mib = sum(4 * math.prod(shape) for shape in rows.model(leaves)) / 2**20
        console.print(_table(f"{label}, {leaves} leaves, {mib:.1f} MiB: {WHAT}", made))
        every += made
    if args.json:
        report = {"what": WHAT, "machine": machine, "target": args.target}
        report |= {"adam": args.adam, "split": args.split}
        report["rows"] = [each.as_row() for each in every]
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def _table(title: str, made: Sequence[Compiled]) -> Table:
    """Shows rows; there are columns of cycles and collectives if any row has some."""
    columns: list[tuple[str, list[str]]] = [
        ("what", [each.name for each in made]),
        ("kernels", [str(each.kernels) for each in made]),
        ("x optax", _ratios(made, "kernels")),
        ("copies", [str(each.copies) for each in made]),
        ("loops", [str(each.loops) for each in made]),
        ("conds", [str(each.conditionals) for each in made]),
        ("passes", [f"{each.passes:.2f}" for each in made]),
        ("temp", [f"{each.temp:.3f}" for each in made]),
        ("trace s", [f"{each.trace_seconds:.2f}" for each in made]),
        ("compile s", [f"{each.compile_seconds:.2f}" for each in made]),
        ("x optax", _ratios(made, "compile_seconds")),
    ]
    if any(each.cycles for each in made):
        columns.append(("cycles", [str(each.cycles or "") for each in made]))
        columns.append(("x optax", _ratios(made, "cycles")))
    if any(each.collectives for each in made):
        columns.append(("collectives", [_listed(each.collectives) for each in made]))
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    shown.pad_edge, shown.padding = False, (0, 1, 0, 0)
    for name, _ in columns:
        left = name in ("what", "collectives")
        shown.add_column(name, justify="left" if left else "right", no_wrap=True)
    for cells in zip(*[cells for _, cells in columns], strict=True):
        shown.add_row(*cells)
    return shown


def _ratios(made: Sequence[Compiled], figure: str) -> list[str]:
    """Writes what there is of the ratios of one figure."""
    found = [each.ratios.get(figure) for each in made]
    return ["" if ratio is None else f"{ratio:.2f}" for ratio in found]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in counts.items())
