"""What a compiled program of XLA consists of, read from its text.

Text in, numbers out: nothing is compiled here and no accelerator is needed. The text is
that of `jax.stages.Compiled.as_text`, for a CPU, a GPU or a TPU.
"""

import collections
import dataclasses
import re

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    }
)
_MEMORY_TRANSFERS = frozenset({"copy-start", "slice-start", "dynamic-slice-start"})
# No work of their own: names, constants, and the ends of what was started before.
_FREE = frozenset(
    {
        "add-dependency",
        "after-all",
        "async-update",
        "bitcast",
        "broadcast",
        "constant",
        "get-tuple-element",
        "iota",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
    }
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: name of its result.
      shape: shape of its result, layouts included; of a tuple, those of all parts.
      opcode: what it does.
      operands: names of what it reads.
      attributes: the rest of the line, with the computations that it calls.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, *keys: str) -> list[str]:
        """Returns the names of the computations that attributes of these names list."""
        listed = rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%[\w.\-]+)"
        return _NAME.findall(" ".join(re.findall(listed, self.attributes)))


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program by name, and the name of the first to run."""

    computations: dict[str, list[Instruction]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much of what a computation does, if it takes its cheapest branches.

    Attributes:
      kernels: instructions that run, fusions being one each; a loop's body runs once.
      copies: copies among them, and those between the memories of a TPU.
      loops: loops, each of which waits for a predicate.
      conditionals: choices between branches, each of which waits likewise.
      nbytes: bytes that these read from and write to main memory.
    """

    kernels: int = 0
    copies: int = 0
    loops: int = 0
    conditionals: int = 0
    nbytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Counts both."""
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(a + b for a, b in both))


def parse(text: str) -> Program:
    """Reads a program.

    Raises:
      ValueError: if there is no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = None
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, shape, opcode, rest = found.groups()
            operands, attributes = _arguments(rest)
            current.append(Instruction(name, shape, opcode, operands, attributes))
    if entry is None:
        raise ValueError("parse: a compiled program must have an ENTRY, found none.")
    return Program(computations, entry)


def count(program: Program, computation: str | None = None) -> Counts:
    """Counts what a computation does; None: the whole program."""
    instructions = program.computations[computation or program.entry]
    shapes = {each.name: each.shape for each in instructions}
    counts = (_count_one(program, each, shapes) for each in instructions)
    return sum(counts, start=Counts())


def collectives(program: Program) -> dict[str, int]:
    """Counts the communication between devices by kind, that of all branches."""
    everything = [each for body in program.computations.values() for each in body]
    started = {  # what `x-start` calls is the same communication once more
        name
        for each in everything
        if each.opcode.endswith("-start")
        for name in each.called("calls", "to_apply")
    }
    kinds = (
        each.opcode.removesuffix("-start")
        for name, body in program.computations.items()
        if name not in started
        for each in body
    )
    return dict(collections.Counter(kind for kind in kinds if kind in COLLECTIVES))


def cycles(text: str) -> int:
    """Adds the estimates of a TPU's compiler; 0 where it makes none."""
    return sum(int(number) for number in _CYCLES.findall(text))


def nbytes(shape: str, *, everywhere: bool = False) -> int:
    """Returns the bytes in main memory of an array or of all arrays of a tuple.

    Args:
      shape: as the program writes it, such as `f32[64,32]{1,0:T(8,128)}`.
      everywhere: whether arrays in other memories count too: `S(1)` in a layout is the
        vector memory of a TPU.
    """
    total = 0
    for _, bits, sizes, layout in _ARRAY.findall(shape):
        if everywhere or "S(" not in layout:
            elements = 1
            for size in filter(None, sizes.split(",")):
                elements *= int(size)
            total += -(-elements * int(bits or 8) // 8)
    return total


def _arguments(rest: str) -> tuple[tuple[str, ...], str]:
    """Splits what follows `opcode(` into operands and attributes."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return tuple(_NAME.findall(rest[:place])), rest[place + 1 :]
    return (), rest


def _count_one(program: Program, one: Instruction, shapes: dict[str, str]) -> Counts:
    """Counts an instruction, given the shapes of what it may read."""
    opcode = one.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return Counts()
    if opcode in _MEMORY_TRANSFERS:
        return Counts(copies=opcode == "copy-start", nbytes=_transferred(one.shape))
    if opcode == "while":
        (body,) = one.called("body")
        return Counts(loops=1) + count(program, body)
    if opcode == "conditional":
        keys = ("branch_computations", "true_computation", "false_computation")
        branches = [count(program, name) for name in one.called(*keys)]
        cheapest = min(branches, key=lambda each: (each.nbytes, each.kernels))
        return Counts(conditionals=1) + cheapest
    started = opcode.endswith("-start") and opcode[:-6] not in COLLECTIVES
    if opcode == "call" or started:
        callees = one.called("to_apply", "calls")
        return sum((count(program, name) for name in callees), start=Counts())
    moved = nbytes(one.shape) + sum(nbytes(shapes.get(o, "")) for o in one.operands)
    return Counts(kernels=1, copies=opcode == "copy", nbytes=moved)


def _transferred(shape: str) -> int:
    """Returns the bytes that go between main memory and another, read or written once.

    The shape is that of source, destination and a scalar to wait for.
    """
    arrays = [found[0] for found in _ARRAY.finditer(shape) if found[3]]
    return min((nbytes(each, everywhere=True) for each in arrays), default=0)
