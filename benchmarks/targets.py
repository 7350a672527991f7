"""Devices to compile for: an H100 and a TPU v5e, described, and the CPU that is here.

XLA needs a description of a device, not the device. It does need the compiler, which
comes in packages of its own: best in an environment of their own, for with them plain
JAX looks for devices that are not there.
"""

import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

COUNT = 4

_JAXLIB = importlib.metadata.version("jaxlib")
_PACKAGES = {
    "h100": (
        f"jax-cuda12-plugin=={_JAXLIB}",
        f"jax-cuda12-pjrt=={_JAXLIB}",
        "nvidia-cuda-nvcc-cu12",
        "nvidia-nvjitlink-cu12",
        "nvidia-cuda-nvrtc-cu12",
        "nvidia-cuda-runtime-cu12",
        "nvidia-cuda-cupti-cu12",
    ),
    "v5e": ("libtpu",),
    "cpu": (),
}
NAMES = tuple(_PACKAGES)
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def missing(target: str) -> str:
    """Says in one line what to install to compile for a target; empty: nothing."""
    lacking = [name for name in _PACKAGES[target] if not _installed(name)]
    if not lacking:
        return ""
    what = f'"jax[tpu]=={jax.__version__}"'
    if target == "h100":
        what = f"--no-deps {' '.join(lacking)}"
    return f"in an environment of its own there must be: pip install {what}"


def compilers(target: str) -> dict[str, str]:
    """Returns the versions of the packages that hold the compiler of a target."""
    names = [package.split("==")[0] for package in _PACKAGES[target]]
    return {name: importlib.metadata.version(name) for name in names}


def devices(target: str, count: int = 1) -> Sequence[Any]:
    """Describes one device of a target or a few, or takes CPU devices as they are.

    Call it before anything starts a backend of JAX: accelerators that are here are left
    alone, and there are several CPU devices only if JAX is told so in time.
    """
    jax.config.update("jax_platforms", "cpu")
    if target == "cpu":
        if jax.config.values["jax_num_cpu_devices"] < count > 1:
            jax.config.update("jax_num_cpu_devices", count)
        return jax.devices("cpu")[:count]
    jax.devices()  # finds the plugin of CUDA
    if target == "v5e":
        os.environ.update(_TPU)
        described = topologies.get_topology_desc("v5e:2x2", "tpu")
    else:
        described = topologies.get_topology_desc(
            f"h100:{COUNT}", "cuda", target_config=_H100, topology=f"1x1x{COUNT}"
        )
    return described.devices[:count]


def _installed(package: str) -> bool:
    """Whether there is a package, in the version that is asked for, if one is."""
    name, _, version = package.partition("==")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return not version or found == version
