"""Logs for TensorBoard, made while an experiment runs."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from experiments import devices
from experiments.config import UsageError
from experiments.journal import Board

PACKAGE = "tensorboardX"


def require() -> None:
    """Refuses to begin what could not be logged."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UsageError(f"--tensorboard needs {PACKAGE}: pip install {PACKAGE}.")


def open_board(directory: Path) -> Board:
    """Returns what writes numbers into a directory, a run of TensorBoard per arm.

    Of several processes the first writes.
    """
    from tensorboardX import SummaryWriter

    writers: dict[Path, SummaryWriter] = {}

    def write(part: str, step: int, numbers: Mapping[str, Mapping[str, float]]) -> None:
        for arm, values in numbers.items() if devices.is_first() else ():
            place = directory / f"{part} {arm}".replace("/", "-")
            if place not in writers:
                writers[place] = SummaryWriter(str(place))
            for name, value in values.items():
                writers[place].add_scalar(name, value, step)
            writers[place].flush()

    return write
