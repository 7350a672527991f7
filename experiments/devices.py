"""Devices and processes: where runs are computed, and how they are spread over devices.

Several processes run the same program side by side, and each sees the devices of all.
The first alone prints and writes files.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import UsageError

T = TypeVar("T")


# What jax has for a number of CPU devices that nobody has chosen.
UNSET = -1
# Most virtual CPU devices if nobody asks for more: runs would not fill them.
MOST = 8


def _coordinator() -> str | None:
    return os.environ.get("JAX_COORDINATOR_ADDRESS") or None


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a command runs on; None: what is there."""

    devices: int | None = None
    """Run on this many virtual CPU devices, in each process, and on no accelerator.
    Default: accelerators; where there are none, a CPU device per core, at most 8."""
    coordinator: str | None = dataclasses.field(default_factory=_coordinator)
    """HOST:PORT of process 0, if several processes work together. Default:
    JAX_COORDINATOR_ADDRESS, or as Slurm, Open MPI, ... say."""
    processes: int | None = None
    """Number of these processes. Default: as Slurm, Open MPI, ... say."""
    process_id: int | None = None
    """Which of them this one is, from 0. Default: as Slurm, Open MPI, ... say."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("devices", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={value}.")
        if self.coordinator and not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise ValueError(
                f"coordinator must be HOST:PORT, got coordinator={self.coordinator}."
            )
        last = math.inf if self.processes is None else self.processes - 1
        if self.process_id is not None and not 0 <= self.process_id <= last:
            raise ValueError(
                "process_id must be >= 0 and less than processes, got "
                f"process_id={self.process_id}, processes={self.processes}."
            )


@contextlib.contextmanager
def use(machine: Machine) -> Iterator[None]:
    """Sets up devices, and joins other processes for as long as all goes well.

    On CPUs small arrays keep one core busy: runs are spread over a device per core.

    Only the first process has a standard output then.

    Raises:
      UsageError: if jax has other devices already, or processes cannot be joined.
    """
    if machine.devices is not None:
        try:
            jax.config.update("jax_num_cpu_devices", machine.devices)
            jax.config.update("jax_platforms", "cpu")
        except RuntimeError as error:
            raise UsageError(
                f"devices={machine.devices} comes too late: jax has been used already."
            ) from error
    elif jax.config.values["jax_num_cpu_devices"] == UNSET and not _is_forced():
        # Too late is not wrong: then jax has the devices it has.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(_cores(), MOST))
    _join(machine)
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    yield
    # After an error the others may be waiting for what does not come: jax lets go of
    # them when Python ends.
    jax.distributed.shutdown()


def _cores() -> int:
    """Returns the number of cores which this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_forced() -> bool:
    """Whether XLA has been told how many CPU devices there are."""
    return "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")


def _join(machine: Machine) -> None:
    """Joins the other processes, if the user or what started this names any."""
    named = machine.coordinator, machine.processes, machine.process_id
    if None not in named:
        print(f"joining {named[1]} processes at {named[0]} ...", file=sys.stderr)
    try:
        jax.distributed.initialize(*named)
    except (ValueError, RuntimeError) as error:
        failed = isinstance(error, jax.errors.JaxRuntimeError)
        if not failed and named == (None, None, None):
            return
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(
            f"processes cannot be joined: {reason}. Where Slurm, Open MPI, ... do not "
            "say it, pass --coordinator, --processes and --process-id, got "
            f"coordinator={named[0]}, processes={named[1]}, process_id={named[2]}."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that prints and writes files."""
    return jax.process_index() == 0


def from_first(make: Callable[[], T]) -> T:
    """Returns what the first process makes; if it fails, the others end too."""
    if jax.process_count() == 1:
        return make()
    payload, failure = b"", None
    if is_first():
        try:
            payload = pickle.dumps(make())
        except (UsageError, OSError) as error:
            failure = error
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(payload))))
    buffer = np.zeros(size, np.uint8)
    if is_first():
        buffer[:] = np.frombuffer(payload, np.uint8)
    payload = multihost_utils.broadcast_one_to_all(buffer).tobytes()
    if failure is not None:
        raise failure
    if not payload:
        sys.exit(2)
    return pickle.loads(payload)


def any_of(here: bool) -> bool:
    """Whether something holds in any process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).any())


def agree(what: Any) -> None:
    """Refuses to go on if processes were not told the same.

    Raises:
      UsageError: in all of them.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(repr(what).encode()).digest()
    told = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (told != told[:1]).any():
        raise UsageError(
            "processes were started with different options. Give all of them the same, "
            "but for --process-id."
        )


@dataclasses.dataclass(frozen=True)
class Spread:
    """Runs which know nothing of each other, spread over devices.

    Arrays have shape (runs, ...), filled up with copies of the last run to a multiple
    of the number of devices.

    Attributes:
      runs: number of runs.
      mesh: the devices, along one axis.
    """

    runs: int
    mesh: Mesh

    @property
    def whole(self) -> NamedSharding:
        """What every device has all of."""
        return NamedSharding(self.mesh, P())

    def place(self, tree: Any) -> Any:
        """Puts NumPy arrays of shape (runs, ...) on the devices."""
        copies = -self.runs % self.mesh.size
        split = NamedSharding(self.mesh, P("runs"))

        def place(leaf):
            filled = np.concatenate([leaf, np.repeat(leaf[-1:], copies, axis=0)])
            return jax.device_put(filled, split)

        return jax.tree.map(place, tree)

    def map(self, function: Callable, shared: int) -> Callable:
        """Maps a function of one run over all runs, without a word between devices.

        Args:
          function: takes arguments that all runs share, then arguments of the run. Its
            norms need `axis_name=()`: each device has all of its runs.
          shared: number of arguments that are shared.

        Returns:
          A function of the shared arguments, and of those of all runs.
        """

        def on_a_device(shared, own):
            return jax.vmap(functools.partial(function, *shared))(*own)

        mapped = jax.shard_map(
            on_a_device,
            mesh=self.mesh,
            in_specs=(P(), P("runs")),
            out_specs=P("runs"),
            check_vma=False,
        )
        return lambda *arguments: mapped(arguments[:shared], arguments[shared:])

    def gather(self, tree: Any) -> Any:
        """Returns NumPy arrays of shape (runs, ...), the same in all processes."""
        if jax.process_count() == 1:
            gathered = jax.device_get(tree)
        else:
            gathered = multihost_utils.process_allgather(tree, tiled=True)
        return jax.tree.map(lambda leaf: leaf[: self.runs], gathered)


def spread(runs: int, one_device: bool = False) -> Spread:
    """Spreads runs over all devices of all processes.

    Args:
      runs: number of runs.
      one_device: instead, each process computes all of them on its first device.
    """
    devices = jax.local_devices()[:1] if one_device else jax.devices()
    mesh = jax.make_mesh((len(devices),), ("runs",), (AxisType.Auto,), devices=devices)
    return Spread(runs, mesh)
