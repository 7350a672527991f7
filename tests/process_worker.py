"""One of several processes that clip together, and what each of them runs."""

import faulthandler
import os
import pickle
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import labels

import optaxclip

# Small, so that on any number of devices a sum has lost little.
LEAVES = {
    "kernel": ((4, 6), P("d", "t")),
    "bias": ((6,), P("t")),
    "conv": ((2, 2, 4, 3), P(None, None, "d", None)),
    "scale": ((5,), P()),
}
SPECS = {name: spec for name, (_, spec) in LEAVES.items()}
BY_SHAPE = dict(LEAVES.values())

# What learns sees a spike, a NaN and both ends of float32, and goes on.
SCALES = (1.0, 2.0, 0.5, 30.0, np.nan, 1.5, 1e25, 1e-30)

CASES = {
    "global": optaxclip.clip_by_global_norm(0.5),
    "leaf": optaxclip.clip_by_leaf_norm(0.5),
    "unit": optaxclip.sharded(optaxclip.adaptive_grad_clip(0.1), SPECS),
    "group": optaxclip.clip_by_group_norm(0.5, labels),
    "element": optaxclip.clip(0.5),
    "autoclip": optaxclip.autoclip(50.0, window=4),
    "zclip": optaxclip.zclip(2.0, decay=0.9, warmup=2, max_norm=np.inf),
    "recorded": optaxclip.recorded(optaxclip.normalize_by_global_norm()),
    "skip": optaxclip.skip_steps(optax.sgd(0.1, momentum=0.9)),
}
# Those that are run inside `shard_map` too.
MAPPED = ("global", "leaf", "unit", "zclip", "recorded", "skip")

# What each device holds of an array: which part, and its values.
Shards = list[tuple[tuple[slice, ...], np.ndarray]]


def battery(devices: Sequence[Any], mapped: bool) -> dict[str, Shards]:
    """Runs the cases on a mesh; gives what this process can address of the results."""
    grid = np.array(devices).reshape(min(len(devices), 2), -1)
    mesh = Mesh(grid, ("d", "t"))
    found = {}
    for name in MAPPED if mapped else CASES:
        for scale, path, x in _steps(CASES[name], mesh, mapped):
            shards = [(s.index, np.asarray(s.data)) for s in x.addressable_shards]
            found[f"{name} x {scale:g} {jax.tree_util.keystr(path)}"] = shards
    return found


def _steps(tx, mesh, mapped):
    """Yields every array of the updates and states: its scale, path and value."""
    params = _normal(seed=1)
    state = jax.tree.map(np.asarray, tx.init(params))
    update = tx.update
    if mapped:
        parts = _specs(params), _specs(state), _specs(params)
        update = jax.shard_map(
            update, mesh=mesh, in_specs=parts, out_specs=parts[:2], check_vma=True
        )
    update = jax.jit(update)
    state, params = _placed(state, mesh), _placed(params, mesh)
    for scale in SCALES:
        updates = _placed(_scaled(_normal(seed=0), scale), mesh)
        updates, state = update(updates, state, params)
        for path, x in jax.tree.leaves_with_path((updates, state)):
            yield scale, path, x


def _normal(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).astype(np.float32) for n, (s, _) in LEAVES.items()}


def _scaled(updates, scale):
    """Scales all elements; by NaN, one on the last device only."""
    if np.isnan(scale):
        updates["kernel"][-1, -1] = np.nan
        return updates
    return {name: u * np.float32(scale) for name, u in updates.items()}


def _specs(tree):
    """The specs of leaves, and of their slots in a state, which have their shapes."""
    return jax.tree.map(lambda x: BY_SHAPE.get(x.shape, P()), tree)


def _placed(tree, mesh):
    def place(x, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, _specs(tree))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # if it hangs, the log says where
    address, count, rank, path = sys.argv[1:]
    jax.distributed.initialize(
        address,
        int(count),
        int(rank),
        initialization_timeout=60,
        coordinator_bind_address=address,
    )
    try:
        found = [battery(jax.devices(), mapped) for mapped in (False, True)]
        Path(path).write_bytes(pickle.dumps(found))
    except Exception:
        traceback.print_exc()
        os._exit(1)  # a normal exit waits for the others, which wait for this one
    jax.distributed.shutdown()
