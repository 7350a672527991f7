"""What a figure is, and how one is taken: from the compiler, or from the clock."""

import dataclasses
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import optax

import optaxclip
from benchmarks import hlo

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number, beside what it is to be compared with.

    Attributes:
      what: what was measured, with its size.
      value: the number.
      unit: what it counts.
      target: the largest value that is good enough; None: only for orientation.
      peers: the same, or what the value is a ratio of, by contestant.
      quartiles: of the rounds, if the value is the median of several.
    """

    what: str
    value: float
    unit: str
    target: float | None = None
    peers: dict[str, float] = dataclasses.field(default_factory=dict)
    quartiles: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or `unclear` if a target lies within the noise."""
        if self.target is None:
            return "-"
        if self.value <= self.target:
            return "met"
        if self.quartiles and self.quartiles[0] <= self.target:
            return "unclear"
        return "missed"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the compiler says that a function costs, without running it.

    Attributes:
      passes: bytes that the kernels read and write, divided by the bytes of the
        parameters; of a conditional, those of the cheapest branch: that which sums
        large arrays again runs only where float32 could not hold their squares.
      temp: bytes held besides arguments and results, divided likewise.
      aliased: bytes of results that take the place of donated arguments, likewise.
      hlo: the optimized program.
    """

    passes: float
    temp: float
    aliased: float
    hlo: str


def cost(function: Callable, *args: PyTree, size: int, donate: Sequence[int]) -> Cost:
    """Compiles a function from shapes alone and reads its costs.

    Args:
      function: what to compile.
      *args: pytrees of `jax.ShapeDtypeStruct`.
      size: bytes of the parameters.
      donate: positions of the arguments whose memory may be used again.

    Raises:
      RuntimeError: if the compiler of this backend does not tell.
    """
    compiled = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError(
            f"cost: {jax.default_backend()} does not tell what it costs."
        )
    return Cost(
        passes=hlo.count(hlo.parse(text)).nbytes / size,
        temp=memory.temp_size_in_bytes / size,
        aliased=memory.alias_size_in_bytes / size,
        hlo=text,
    )


def side_by_side(
    contestants: dict[str, Callable[[], float]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Runs every contestant once a round, in an order drawn anew each round.

    Args:
      contestants: functions that do the work and return its seconds, by name.
      rounds: number of rounds that count.
      warmup: rounds before these, which do not.

    Returns:
      The seconds of every round, by contestant.
    """
    order = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    draw = random.Random(0)
    gc.collect()
    for _ in range(warmup + rounds):
        draw.shuffle(order)
        for name in order:
            seconds[name].append(contestants[name]())
    return {name: taken[warmup:] for name, taken in seconds.items()}


def ratio(
    what: str, seconds: dict[str, list[float]], ours: str, peer: str, target: float
) -> Figure:
    """Compares two contestants by the median of their ratios in the same rounds."""
    ratios = [a / b for a, b in zip(seconds[ours], seconds[peer], strict=True)]
    middle = statistics.median(ratios)
    low, _, high = (
        statistics.quantiles(ratios, n=4, method="inclusive")
        if len(ratios) > 1
        else (middle, middle, middle)
    )
    taken = {f"{n} ms": 1e3 * statistics.median(seconds[n]) for n in (ours, peer)}
    return Figure(what, middle, f"x {peer}", target, taken, (low, high))


def clock(function: Callable, *args: PyTree, calls: int = 1) -> float:
    """Returns the seconds that one of several calls takes, results waited for."""
    result = None
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def machine() -> dict[str, Any]:
    """Describes what the figures were measured on."""
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "device": f"{device.platform}: {device.device_kind}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "optax": optax.__version__,
        "optaxclip": optaxclip.__version__,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def busy() -> bool:
    """Whether others use the machine so much that times mean little."""
    return os.getloadavg()[0] > 2 * (os.cpu_count() or 1)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
