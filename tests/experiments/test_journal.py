import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from rich.progress import Progress

from experiments.config import UsageError
from experiments.journal import CHECKPOINTS, Journal, Stopped, stopping

PIECES = [3, 3, 2]


class Part:
    """A part whose state is a random number generator's, and can stop after a piece."""

    def __init__(self, journal, stop_after=None, start=1.0):
        self.journal, self.stop_after, self.worked = journal, stop_after, 0
        self.start = start

    def begin(self):
        return {"x": np.float32(self.start), "n": np.int32(0)}, {
            "test": np.ones((2, 1))
        }

    def advance(self, state, updates):
        self.worked += 1
        if self.worked == self.stop_after:
            self.journal.stop()
        numbers = np.float32(state["x"] + np.arange(1, updates + 1) / np.float32(3))
        following = {"x": np.sqrt(numbers[-1]), "n": np.int32(state["n"] + updates)}
        found = {"log": np.tile(numbers, (2, 1)), "test": np.full((2, 1), numbers[0])}
        return following, found

    def end(self, state):
        return {"final": np.array([state["x"]])}

    def carry(self, name="a"):
        return self.journal.carry(name, self.begin, PIECES, self.advance, self.end)


def without_seconds(records):
    return {name: array for name, array in records.items() if name != "seconds"}


def uninterrupted(tmp_path):
    return without_seconds(Part(Journal(tmp_path / "whole", Progress())).carry())


def test_records_of_the_pieces_follow_each_other(tmp_path):
    found = Part(Journal(tmp_path, Progress())).carry()
    assert found["log"].shape == (2, 8)
    assert found["test"].shape == (2, 4)
    assert found["seconds"].shape == (3,)
    x = np.float32(1)
    expected = []
    for updates in PIECES:
        numbers = np.float32(x + np.arange(1, updates + 1) / np.float32(3))
        expected.extend(numbers)
        x = np.sqrt(numbers[-1])
    np.testing.assert_array_equal(found["log"], [expected] * 2)
    assert found["final"] == [x]
    assert not (tmp_path / CHECKPOINTS).exists()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_what_is_stopped_goes_on_bit_for_bit(tmp_path, stop_after):
    with pytest.raises(Stopped):
        Part(Journal(tmp_path, Progress()), stop_after).carry()
    part = Part(Journal(tmp_path, Progress()))
    np.testing.assert_equal(without_seconds(part.carry()), uninterrupted(tmp_path))
    assert part.worked == len(PIECES) - stop_after


def test_a_part_needs_a_name_of_its_own(tmp_path):
    journal = Journal(tmp_path, Progress())
    Part(journal).carry("a")
    with pytest.raises(ValueError, match="part must be a new name, got part='a'"):
        Part(journal).carry("a")


def test_all_finished_parts_are_kept_at_the_end(tmp_path):
    journal = Journal(tmp_path, Progress())
    found = Part(journal).carry("a")
    journal.keep()
    part = Part(Journal(tmp_path, Progress()))
    np.testing.assert_equal(part.carry("a"), found)
    assert part.worked == 0


def test_parts_that_are_finished_are_not_worked_on_again(tmp_path):
    journal = Journal(tmp_path, Progress())
    whole = Part(journal, start=2.0).carry("a")
    with pytest.raises(Stopped):
        Part(journal, stop_after=1).carry("b")
    journal = Journal(tmp_path, Progress())
    first, second = Part(journal, start=2.0), Part(journal)
    np.testing.assert_equal(first.carry("a"), whole)
    other = without_seconds(second.carry("b"))
    np.testing.assert_equal(other, uninterrupted(tmp_path))
    assert (other["log"] != whole["log"]).any()
    assert (first.worked, second.worked) == (0, 2)
    journal.finish()
    assert not (tmp_path / CHECKPOINTS).exists()


def flip_a_bit(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [lambda content: b"", flip_a_bit])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage):
    with pytest.raises(Stopped):
        Part(Journal(tmp_path, Progress()), stop_after=1).carry()
    (arrays,) = (tmp_path / CHECKPOINTS).glob("*/arrays")
    files = [path for path in arrays.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match="cannot be read") as caught:
        Journal(tmp_path, Progress())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_piece_and_keeps_it(tmp_path, number):
    journal = Journal(tmp_path, Progress())
    part = Part(journal)

    def interrupted(state, updates):
        os.kill(os.getpid(), number)
        return Part.advance(part, state, updates)

    before = signal.getsignal(number)
    part.advance = interrupted
    with pytest.raises(Stopped), stopping(journal):
        part.carry()
    assert signal.getsignal(number) is before
    assert part.worked == 1
    assert (tmp_path / CHECKPOINTS).is_dir()


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt), stopping(Journal(tmp_path, Progress())):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from rich.progress import Progress
from experiments.journal import Journal, Stopped
from test_journal import Part
directory = Path({directory!r})
for stop_after in (1, 1):
    try:
        Part(Journal(directory, Progress()), stop_after).carry()
    except Stopped:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
"""


def test_a_full_disk_loses_nothing(tmp_path):
    code = FULL_DISK.format(tests=os.path.dirname(__file__), directory=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UsageError" in run.stderr.splitlines()[-1]
    assert "cannot be written" in run.stderr.splitlines()[-1]
    part = Part(Journal(tmp_path, Progress()))
    np.testing.assert_equal(without_seconds(part.carry()), uninterrupted(tmp_path))
    assert part.worked == 2
