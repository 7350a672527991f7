"""Run directories.

| file | what it holds |
|---|---|
| `config.json` | all that is needed to repeat the run, and where it ran |
| `checkpoints/` | how far it is, until it is finished |
| `results.jsonl` | a line per run (cliff: per arm); null: not a finite number |
| `curves.npz` | what the figures show |
| `*.png` | the figures |
| `report.html` | all of it on one page |

A run is finished when `results.jsonl` is there: that is written last, and as a whole.
"""

import contextlib
import dataclasses
import io
import json
import math
import platform
import shlex
import subprocess
import typing
import zipfile
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

import optaxclip
from experiments.config import Config, UsageError

# What results depend on, besides optaxclip.
PACKAGES = "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn"
# What `config.json` always has.
ABOUT = {"config", "command", "tensorboard", "commit", "device", "python", "versions"}
Rows = list[dict[str, Any]]
# What reading a damaged file can raise.
DAMAGE = ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error
C = TypeVar("C", bound=Config)


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run directory holds.

    Attributes:
      about: `config.json`.
      rows: `results.jsonl`.
      curves: `curves.npz`.
    """

    about: dict[str, Any]
    rows: Rows
    curves: Mapping[str, np.ndarray]


def create(directory: Path | None, name: str) -> Path:
    """Makes a run directory: the one asked for, or the next `runs/NAME-1`, `-2`, ..."""
    if directory is None:
        return _create_next(Path("runs"), name)
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is not a directory. Choose another --out.")
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty. Choose another --out.")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _create_next(top: Path, name: str) -> Path:
    """Makes the first numbered directory that nobody else has made."""
    top.mkdir(exist_ok=True)
    number = 1
    while True:
        directory = top / f"{name}-{number}"
        try:
            directory.mkdir()
        except FileExistsError:
            number += 1
        else:
            return directory


def begin(
    directory: Path, config: Config, facts: Mapping[str, Any], tensorboard: bool = False
) -> None:
    """Writes `config.json`: the config, other facts of the experiment, the machine."""
    about = {
        "config": dataclasses.asdict(config),
        **facts,
        "command": command(config),
        "tensorboard": tensorboard,
        **surroundings(),
    }
    write(directory / "config.json", json.dumps(about, indent=2, default=str) + "\n")


def finish(directory: Path, rows: Rows, curves: Mapping[str, np.ndarray]) -> None:
    """Writes what came out."""
    with io.BytesIO() as buffer:
        np.savez_compressed(buffer, allow_pickle=False, **curves)
        write(directory / "curves.npz", buffer.getvalue())
    lines = [json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows]
    write(directory / "results.jsonl", "".join(lines))


def is_finished(directory: Path) -> bool:
    """Whether a run directory has its results."""
    return (directory / "results.jsonl").is_file()


def surroundings() -> dict[str, Any]:
    """Returns what a result depends on, to the last bit, besides its config."""
    return {
        "commit": _commit(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "versions": {
            "optaxclip": optaxclip.__version__,
            **{package: metadata.version(package) for package in PACKAGES},
        },
    }


def command(config: Config) -> str:
    """Returns the command that repeats a run, on CPUs with as many devices."""
    words = [f"python -m experiments run {config.experiment}"]
    for name, value in dataclasses.asdict(config).items():
        option = f"--{name.replace('_', '-')}"
        if name == "experiment" or value is None or value is False:
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [option] if value is True else [option, *map(_word, values)]
    return " ".join(words) + devices_option(jax.device_count())


def devices_option(count: int) -> str:
    """Returns the option for a number of devices, where that can be chosen."""
    return f" --devices {count}" if jax.default_backend() == "cpu" else ""


def read_about(directory: Path) -> dict[str, Any]:
    """Reads `config.json`."""
    try:
        about = json.loads((directory / "config.json").read_text())
    except (ValueError, OSError) as error:
        raise UsageError(f"{directory} cannot be read: {error}.") from error
    known = isinstance(about, dict) and about.keys() >= ABOUT
    if not known or not isinstance(about["config"], dict):
        raise UsageError(f"{directory / 'config.json'} is not that of a run.")
    return about


def read_config(about: dict[str, Any], kind: type[C]) -> C:
    """Returns the config of a run, of the class that its study has."""
    hints = typing.get_type_hints(kind)

    def value(name: str, found: Any) -> Any:
        if isinstance(found, list):
            return tuple(found)
        return Path(found) if found and hints.get(name) == Path | None else found

    try:
        return kind(**{key: value(key, x) for key, x in about["config"].items()})
    except (TypeError, ValueError) as error:
        raise UsageError(f"the config of the run is not possible: {error}") from error


def load(directory: Path) -> Results:
    """Reads a run directory; numbers that were not finite are NaN."""
    for name in ("config.json", "results.jsonl", "curves.npz"):
        if not (directory / name).is_file():
            raise UsageError(f"{directory / name} is missing: no finished run is here.")
    about = read_about(directory)
    try:
        lines = (directory / "results.jsonl").read_text().splitlines()
        rows = [
            {key: math.nan if value is None else value for key, value in row.items()}
            for row in map(json.loads, lines)
        ]
        with np.load(directory / "curves.npz") as curves:
            found = Results(about, rows, dict(curves))
    except DAMAGE as error:
        raise UsageError(f"{directory} cannot be read: {error}.") from error
    if not rows:
        raise UsageError(f"{directory} cannot be read: results.jsonl is empty.")
    return found


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _word(value: object) -> str:
    return shlex.quote(str(value))


def write(path: Path, content: str | bytes) -> None:
    """Writes a file as a whole, or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def _commit() -> str | None:
    """Returns the commit of this checkout, marked if it was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return None
    return run.stdout.strip() or None
