"""What a study works with: it shows how far a run is, and keeps what it has so far.

A study is carried on in parts, such as one kind of clip at one length. A part is a
state which goes through pieces of work, each of which leaves records. From time to
time, and when the user or the system asks to stop, the state and all records so far are
written to the run directory; a run which is resumed takes them up, skips what is
finished, and goes on bit for bit as if it had never been stopped.
"""

import contextlib
import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.progress import Progress

from experiments import devices
from experiments.config import UsageError

Records = dict[str, np.ndarray]
Board = Callable[[str, int, Mapping[str, Mapping[str, float]]], None]
CHECKPOINTS, DIGESTS = "checkpoints", "digests.json"
# Seconds between two checkpoints: what a kill without warning can cost.
INTERVAL = 20.0
SIGNALS = signal.SIGINT, signal.SIGTERM


class Stopped(Exception):
    """The user or the system asked to stop, and what is done has been kept."""


class Kept(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      finished: the records of the parts that are finished.
      part: the part that was worked on; None: none.
      done: how many of its pieces were done.
      state: the leaves of its state after these.
      records: what they left.
    """

    finished: dict[str, Records]
    part: str | None
    done: int
    state: list[Any]
    records: Records


class Journal:
    """A progress bar and a store for one run.

    Several processes keep one journal: all come to the same point, the first writes.

    Attributes:
      stopping: whether the user or the system has asked to stop.
      board: shows numbers elsewhere while they are made: takes the name of a part, the
        number of updates, and the numbers by arm and name. None: nobody looks.
    """

    def __init__(
        self, directory: Path, progress: Progress, board: Board | None = None
    ) -> None:
        """Takes up what is kept in the run directory, if anything is."""
        self.board = board
        self._progress = progress
        self._bar = progress.add_task("", total=None, best="")
        self._directory = directory / CHECKPOINTS
        self._parts: set[str] = set()
        self.stopping = False
        self._saved = time.monotonic()
        self._kept = devices.from_first(lambda: _restore(self._directory))

    def expect(self, name: str, updates: int) -> None:
        """Says what is worked on, and how many updates it is in all."""
        self._progress.update(self._bar, description=name, total=updates)

    def advance(self, updates: int, best: str = "") -> None:
        """Says that updates are done, and what is best so far.

        Raises:
          Stopped: if the user asked to stop.
        """
        self._progress.update(self._bar, advance=updates, best=best)
        if devices.any_of(self.stopping):
            raise Stopped

    def carry(
        self,
        part: str,
        begin: Callable[[], tuple[Any, Records]],
        pieces: list[int],
        advance: Callable[[Any, int], tuple[Any, Records]],
        end: Callable[[Any], Records],
        pack: Callable[[Any], Any] = lambda state: state,
        unpack: Callable[[Any], Any] = lambda state: state,
        best: Callable[[Records], str] = lambda records: "",
    ) -> Records:
        """Carries a state through pieces of work, from where it was left.

        Args:
          part: its name, different for every part of a run.
          begin: makes the state, and what is recorded of it.
          pieces: numbers of updates.
          advance: takes the state and a number of updates, and returns the next state
            and what is recorded: arrays whose last axis is time.
          end: returns what is recorded of the last state.
          pack: turns the state into NumPy arrays, the same in all processes.
          unpack: turns these into a state again.
          best: says in a few words what is best in the records of a piece.

        Returns:
          The records of all pieces, one after another along the last axis, and
          `seconds`, the time they took.

        Raises:
          Stopped: if the user asked to stop; what is done is kept.
        """
        if part in self._parts:
            raise ValueError(f"part must be a new name, got part={part!r}.")
        self._parts.add(part)
        finished = self._kept.finished
        if part in finished:
            self.advance(sum(pieces))
            return finished[part]
        began, done = time.perf_counter(), 0
        state, first = begin()
        records = [first]
        if self._kept.part == part:
            structure = jax.tree.structure(pack(state))
            state = unpack(jax.tree.unflatten(structure, self._kept.state))
            records, done = [self._kept.records], self._kept.done
            self.advance(sum(pieces[:done]))
        for piece in pieces[done:]:
            state, found = advance(state, piece)
            seconds = time.perf_counter() - began
            records.append(found | {"seconds": np.array([seconds])})
            done += 1
            if devices.any_of(self._is_due()):
                leaves = jax.tree.leaves(pack(state))
                self._keep(Kept(finished, part, done, leaves, _joined(records)))
            self.advance(piece, best(found))
            began = time.perf_counter()
        records.append(end(state))
        finished[part] = _joined(records)
        return finished[part]

    def keep(self) -> None:
        """Keeps the records of all parts, which are finished."""
        if self._kept.finished:
            self._keep(Kept(self._kept.finished, None, 0, [], {}))

    def finish(self) -> None:
        """Throws away what is kept: the results are written."""
        if devices.is_first():
            remove(self._directory.parent)

    def stop(self) -> None:
        """Asks to stop when the piece that is worked on is done."""
        self.stopping = True

    def _is_due(self) -> bool:
        return self.stopping or time.monotonic() - self._saved > INTERVAL

    def _keep(self, kept: Kept) -> None:
        if devices.is_first():
            _save(self._directory, kept)
        self._saved = time.monotonic()


def remove(directory: Path) -> None:
    """Throws away what is kept in a run directory."""
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)


@contextlib.contextmanager
def stopping(journal: Journal) -> Iterator[None]:
    """Lets Ctrl-C and the system stop a run in good order; a second Ctrl-C at once."""

    def stop(number: int, frame: Any) -> None:
        journal.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _joined(records: list[Records]) -> Records:
    names = dict.fromkeys(name for found in records for name in found)
    return {
        name: np.concatenate([x[name] for x in records if name in x], axis=-1)
        for name in names
    }


def _manager(directory: Path) -> ocp.CheckpointManager:
    """Returns what writes one checkpoint and then removes the one before it."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
    )
    return ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=1,
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=alone,
        ),
    )


def _save(directory: Path, kept: Kept) -> None:
    about = {"part": kept.part, "done": kept.done}
    try:
        directory.mkdir(exist_ok=True)
        with _manager(directory) as manager:
            arrays = ocp.args.StandardSave(
                {
                    "finished": kept.finished,
                    "state": kept.state,
                    "records": kept.records,
                }
            )
            args = ocp.args.Composite(arrays=arrays, about=ocp.args.JsonSave(about))
            step = (manager.latest_step() or 0) + 1
            manager.save(step, args=args)
        (directory / DIGESTS).write_text(
            json.dumps({step: _digests(directory / str(step))})
        )
    # A full disk shows itself in many ways.
    except Exception as error:
        raise UsageError(
            f"{directory} cannot be written: {_first_line(error)} What was kept before "
            "is still there: make room, then resume."
        ) from error


def _restore(directory: Path) -> Kept:
    nothing = Kept({}, None, 0, [], {})
    if not directory.is_dir():
        return nothing
    try:
        with _manager(directory) as manager:
            step = manager.latest_step()
            if step is None:
                return nothing
            _check_digests(directory, step)
            args = ocp.args.Composite(
                arrays=ocp.args.StandardRestore(), about=ocp.args.JsonRestore()
            )
            found = manager.restore(step, args=args)
    # So does a damaged file.
    except Exception as error:
        raise UsageError(
            f"{directory} cannot be read: {_first_line(error)} Remove it to start "
            "again."
        ) from error
    return Kept(**found.arrays, **found.about)


def _check_digests(directory: Path, step: int) -> None:
    """Refuses files that have changed: orbax does not notice all of that."""
    path = directory / DIGESTS
    stored = json.loads(path.read_text()) if path.is_file() else {}
    # None: a kill came between the checkpoint and its digests.
    digests = stored.get(str(step))
    if digests is not None and digests != _digests(directory / str(step)):
        raise ValueError("its files have changed")


def _digests(directory: Path) -> dict[str, str]:
    """Returns a digest of every file of the checkpoint."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") + "."
