"""Run directories.

| file | what it holds |
|---|---|
| `config.json` | all that is needed to repeat the run, and where it ran |
| `results.jsonl` | a line per run (cliff: per arm); null: not a finite number |
| `curves.npz` | what the figures show |
| `*.png` | the figures |
"""

import dataclasses
import itertools
import json
import math
import platform
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax
import sklearn

import optaxclip
from experiments.config import Config, UsageError

PACKAGES = (optaxclip, jax, jaxlib, flax, optax, np, sklearn)


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run directory holds.

    Attributes:
      about: `config.json`.
      rows: `results.jsonl`.
      curves: `curves.npz`.
    """

    about: dict[str, Any]
    rows: list[dict[str, Any]]
    curves: Mapping[str, np.ndarray]


def create(directory: Path | None, name: str) -> Path:
    """Makes a run directory: the one asked for, or the next `runs/NAME-1`, `-2`, ..."""
    if directory is None:
        numbered = (Path("runs") / f"{name}-{i}" for i in itertools.count(1))
        directory = next(path for path in numbered if not path.exists())
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is not a directory. Choose another --out.")
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty. Choose another --out.")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def begin(directory: Path, config: Config, facts: Mapping[str, str]) -> None:
    """Writes `config.json`: the config, other facts of the experiment, the machine."""
    about = {
        "config": dataclasses.asdict(config),
        **facts,
        "commit": _commit(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "versions": {package.__name__: package.__version__ for package in PACKAGES},
    }
    (directory / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def finish(
    directory: Path, rows: list[dict[str, Any]], curves: Mapping[str, np.ndarray]
) -> None:
    """Writes what came out."""
    np.savez_compressed(directory / "curves.npz", allow_pickle=False, **curves)
    lines = [json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows]
    (directory / "results.jsonl").write_text("".join(lines))


def load(directory: Path) -> Results:
    """Reads a run directory; numbers that were not finite are NaN."""
    for name in ("config.json", "results.jsonl", "curves.npz"):
        if not (directory / name).is_file():
            raise UsageError(f"{directory / name} is missing: no finished run is here.")
    try:
        about = json.loads((directory / "config.json").read_text())
        lines = (directory / "results.jsonl").read_text().splitlines()
        rows = [
            {key: math.nan if value is None else value for key, value in row.items()}
            for row in map(json.loads, lines)
        ]
        with np.load(directory / "curves.npz") as curves:
            return Results(about, rows, dict(curves))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{directory} cannot be read: {error}.") from error


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


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
