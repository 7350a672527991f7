"""Several processes: what one process with as many devices gives."""

import functools
import os
import pickle
import socket
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import jax
import numpy as np
import pytest
from process_worker import battery

WORKER = Path(__file__).with_name("process_worker.py")
SECONDS = 120


# Two devices add in one order; for four, that of the platform's all-reduce is open.
@pytest.mark.parametrize(
    "processes, devices, maxulp", [(2, 1, 0), (2, 2, 4), (4, 1, 4)]
)
def test_equal_to_one_process(processes, devices, maxulp, tmp_path):
    results = run_processes(processes, devices, tmp_path)
    alone = one_process(1, mapped=False)
    for mapped, parts in zip((False, True), zip(*results)):
        together = one_process(processes * devices, mapped)
        for name, expected in together.items():
            shards = [shard for part in parts for shard in part[name]]
            check(shards, expected, alone[name], maxulp, f"{name} {mapped=}")


@functools.cache
def one_process(devices, mapped):
    return battery(jax.devices("cpu")[:devices], mapped)


def check(shards, expected, alone, maxulp, name):
    """On every device as in one process, near one device, and the same as its peers."""
    ((_, whole),) = alone
    for (index, x), (place, y) in zip(shards, expected, strict=True):
        assert index == place, name
        assert ulps(x, y) <= maxulp, f"{name}: {x}, in one process {y}"
        one = whole[index]
        assert ulps(x, one) <= 8, f"{name}: {x}, on one device {one}"
    for (index, x), (other, y) in combinations(shards, 2):
        assert index != other or ulps(x, y) == 0, f"{name}: {x} and {y} on two devices"


def ulps(x, y):
    """How many floats lie between, at most; NaN is near NaN only, -0 is not 0."""
    if x.dtype != np.float32 or (np.isnan(x) != np.isnan(y)).any():
        return 0 if np.array_equal(x, y) else np.inf
    bits = [np.int64(a[~np.isnan(a)].view(np.int32)) for a in (x, y)]
    places = [np.where(b < 0, -(2**31) - b - 1, b) for b in bits]
    return np.abs(places[0] - places[1]).max(initial=0)


def run_processes(processes, devices, path):
    """Runs the battery in processes that make one mesh; what each of them found."""
    for attempt in ("first", "second"):
        logs = [path / f"{attempt}{rank}.log" for rank in range(processes)]
        found = [log.with_suffix(".pickle") for log in logs]
        failure = _failure(devices, logs, found)
        if not failure:
            return [pickle.loads(file.read_bytes()) for file in found]
        tails = [log.read_text()[-2000:] for log in logs]
        if "Failed to add port" not in tails[0]:  # another program was faster
            break
    pytest.fail("\n".join([failure, *tails]))


def _failure(devices, logs, found):
    """Why the processes did not all end well, or nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # A proxy would be asked for the loopback.
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    flags = env.get("XLA_FLAGS", "").split()
    env |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": " ".join(flag for flag in flags if "device_count" not in flag),
    }
    running = []
    try:
        for rank, (log, file) in enumerate(zip(logs, found)):
            command = [sys.executable, WORKER, address, str(len(logs)), str(rank), file]
            with log.open("wb") as sink:
                running.append(
                    subprocess.Popen(command, env=env, stdout=sink, stderr=sink)
                )
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            codes = [process.poll() for process in running]
            if any(codes):
                return f"exit codes {codes}"
            if None not in codes:
                return ""
            time.sleep(0.05)
        return f"still running after {SECONDS} s"
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()
