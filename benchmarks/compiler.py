"""Compiles clips for a target and says what came of it; nothing is run."""

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from benchmarks import hlo, rows
from benchmarks.gates import nbytes

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a row; the figures are those that `compiled` explains.

    Attributes:
      peer: name of the row that the ratios compare with, if it was compiled before.
      ratios: some of the figures, over those of that row.
      text: the optimized program.
    """

    leaves: int
    name: str
    kernels: int
    copies: int
    loops: int
    conditionals: int
    passes: float
    temp: float
    trace_seconds: float
    compile_seconds: float
    cycles: int | None
    collectives: dict[str, int]
    text: str = dataclasses.field(repr=False)
    peer: str | None = None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        """Returns the figures as they are written to a file, without the program."""
        row = dataclasses.asdict(self)
        del row["text"]
        return row

    def beside(self, peer: "Compiled") -> "Compiled":
        """Returns the same with its ratios to a peer, where the peer has any."""
        ratios = {
            figure: getattr(self, figure) / getattr(peer, figure)
            for figure in ("kernels", "compile_seconds", "cycles")
            if getattr(peer, figure)
        }
        return dataclasses.replace(self, peer=peer.name, ratios=ratios)


class Placement(NamedTuple):
    """Where arrays are: what every device has whole, and what is split, if anything."""

    whole: Sharding
    part: Sharding


def placement(devices: Sequence[Any]) -> Placement:
    """Places everything on a single device, or splits leaves over several.

    Split means that a leaf is split along its first axis if that can be done evenly;
    other leaves, and what is learned, every device has whole.
    """
    if len(devices) == 1:
        return Placement(*[SingleDeviceSharding(devices[0])] * 2)
    mesh = Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
    return Placement(
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("devices")),
    )


def compile_rows(
    names: Sequence[str], leaves: int, place: Placement, *, adam: bool = False
) -> Iterator[Compiled]:
    """Compiles rows for a model of so many leaves.

    Args:
      names: of the rows; a row is compared with optax's if that comes before it.
      leaves: number of leaves, as `rows.model` takes it.
      place: for which devices, and how the leaves lie on them.
      adam: whether `optax.scale_by_adam` follows each clip.

    Yields:
      What the compiler made of each.
    """
    # The compiler starts before the clock, and is not to read what it made another day.
    jax.config.update("jax_enable_compilation_cache", False)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=place.whole)
    jax.jit(lambda x: x + 1).lower(scalar).compile()
    done: dict[str, Compiled] = {}
    for name in names:
        row = rows.ROWS[name]
        tx = row.make()
        if adam and not row.has_adam:
            tx = optax.chain(tx, rows.adam())
        made = _compile(name, tx, leaves, place)
        done[name] = made.beside(done[row.peer]) if row.peer in done else made
        yield done[name]


def _compile(
    name: str, tx: optax.GradientTransformation, leaves: int, place: Placement
) -> Compiled:
    """Compiles an update of a model."""
    params, state = _abstract(tx, leaves, place)
    update = jax.jit(lambda u, s, p: tx.update(u, s, p), donate_argnums=(0, 1))
    jax.clear_caches()  # no row is to find traced what the one before it traced
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not every donated array can be used again
        start = time.perf_counter()
        lowered = update.lower(params, state, params)
        traced = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise RuntimeError(f"compile_rows: the compiler does not tell about {name}.")
    program = hlo.parse(text)
    counts = hlo.count(program)
    return Compiled(
        leaves=leaves,
        name=name,
        kernels=counts.kernels,
        copies=counts.copies,
        loops=counts.loops,
        conditionals=counts.conditionals,
        passes=counts.nbytes / nbytes(params),
        temp=memory.temp_size_in_bytes / nbytes(params),
        trace_seconds=traced - start,
        compile_seconds=end - traced,
        cycles=hlo.cycles(text) or None,
        collectives=hlo.collectives(program),
        text=text,
    )


def _abstract(
    tx: optax.GradientTransformation, leaves: int, place: Placement
) -> tuple[PyTree, PyTree]:
    """Describes parameters and state; what has the shape of a leaf lies like it."""
    shapes = rows.model(leaves)
    splits = {
        shape: place.part if shape[0] % place.part.num_devices == 0 else place.whole
        for shape in shapes
    }

    def placed(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = splits.get(array.shape, place.whole)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    params = [placed(jax.ShapeDtypeStruct(s, jnp.float32)) for s in shapes]
    return params, jax.tree.map(placed, jax.eval_shape(tx.init, params))
