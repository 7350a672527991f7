import contextlib
import json
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip
from experiments import devices
from experiments.config import UsageError

# What chooses a number of CPU devices.
CHOOSE = "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"
COLLECTIVE = r"all-(gather|reduce|to-all)|collective-|reduce-scatter"


@pytest.mark.parametrize("runs", [3, 8, 11])
def test_every_run_is_made_once_and_alone_on_all_devices(runs):
    spread = devices.spread(runs)
    gradients = np.arange(6.0 * runs, dtype=np.float32).reshape(runs, 2, 3)

    def one(scale, gradient):
        clip = optaxclip.clip_by_global_norm(scale, axis_name=())
        return clip.update(gradient, None)[0]

    placed = spread.place(gradients)
    program = jax.jit(spread.map(one, shared=1)).lower(1.0, placed).compile()
    found = program(1.0, placed)
    assert found.sharding.device_set == set(jax.devices())
    clipped = spread.gather({"clipped": found})["clipped"]
    expected = [one(1.0, jnp.asarray(gradient)) for gradient in gradients]
    np.testing.assert_allclose(clipped, expected, rtol=1e-6)
    assert not re.search(COLLECTIVE, program.as_text())


def test_there_are_copies_of_the_last_run_on_devices_to_spare():
    placed = devices.spread(3).place((np.array([4, 5, 6]),))[0]
    assert placed.tolist() == [4, 5] + [6] * (jax.device_count() - 2)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, min(devices._cores(), 8)),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_there_is_a_cpu_device_per_core_if_nobody_says_otherwise(environment, count):
    program = (
        "import jax\n"
        "from experiments import devices\n"
        "with devices.use(devices.Machine()):\n"
        "    print(jax.device_count())"
    )
    known = {name: x for name, x in os.environ.items() if name not in CHOOSE}
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=known | environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (found.stdout, found.stderr) == (f"{count}\n", "")


def test_processes_that_were_told_something_else_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for other, agreed in ((0, True), (1, False)):
        both = lambda own, other=other: np.stack([own, own ^ np.uint8(other)])
        monkeypatch.setattr(devices.multihost_utils, "process_allgather", both)
        with contextlib.nullcontext() if agreed else pytest.raises(UsageError):
            devices.agree("the same")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


TINY = "run image_rows --hidden 4 --seeds 3 --updates 2 --lr 1 --clip none".split()


def test_two_processes_give_the_results_of_one_with_as_many_devices(tmp_path):
    def start(out, *options):
        command = [sys.executable, "-m", "experiments", *TINY, "--out", tmp_path / out]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, *options], **pipes)

    pair = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    running = [
        start("alone", "--devices", "4"),
        start("together", "--devices", "2", *pair, "--process-id", "0"),
        start("unused", "--devices", "2", *pair, "--process-id", "1"),
    ]
    try:
        ended = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0, 0], ended
    assert [str(tmp_path) in out for out, _ in ended] == [True, True, False]
    assert "image_rows" not in ended[2][0]
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "together"}

    def found(name):
        directory = tmp_path / name
        about = json.loads((directory / "config.json").read_text())
        lines = (directory / "results.jsonl").read_text().splitlines()
        rows = [json.loads(line) | {"seconds": None} for line in lines]
        assert about["command"].endswith(" --devices 4")
        return about["device"], about["processes"], rows

    (*alone, rows), (*together, same) = found("alone"), found("together")
    assert alone == ["4 x cpu", 1]
    assert together == ["4 x cpu", 2]
    assert len(rows) == 3
    assert same == rows
