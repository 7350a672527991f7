import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments import clips, train
from experiments.arms import Knobs
from experiments.config import UsageError
from experiments.models import Recurrent
from experiments.studies import data_parallel
from experiments.tasks import image_rows

CONFIG = data_parallel.SMOKE


@pytest.mark.parametrize(
    ("batch", "hidden", "shapes"),
    [
        (48, 192, [(1, 1), (8, 1), (4, 2), (2, 4)]),
        (48, 6, [(1, 1), (8, 1), (4, 2)]),
        (20, 192, [(1, 1), (5, 1)]),
    ],
)
def test_meshes_have_all_devices_that_can_share_a_batch(batch, hidden, shapes):
    config = dataclasses.replace(CONFIG, batch=batch, hidden=hidden)
    meshes = data_parallel.meshes(config)
    assert [mesh.devices.shape for mesh in meshes] == shapes
    assert {mesh.axis_names for mesh in meshes} == {("data", "model")}


def test_a_batch_that_devices_cannot_share_is_refused():
    config = dataclasses.replace(CONFIG, batch=17)
    with pytest.raises(UsageError, match=r"batch=17 cannot be shared .* such as 8"):
        data_parallel.meshes(config)


@pytest.mark.parametrize("spec", CONFIG.clip)
def test_batch_parameters_and_optimizer_state_are_split(spec):
    *_, mesh = data_parallel.meshes(CONFIG)
    task = data_parallel.SplitBatches(image_rows.load(None), mesh)
    x_BxTxF, _, label_B = jax.jit(task.sample, static_argnums=1)(jax.random.key(0), 48)
    assert {shard.data.shape for shard in x_BxTxF.addressable_shards} == {(24, 8, 8)}
    assert {shard.data.shape for shard in label_B.addressable_shards} == {(24,)}

    model = Recurrent("lstm", CONFIG.hidden, task.task.outputs)
    setup, clip = train.Setup(model, "adam", 48), clips.parse(spec)
    knobs = Knobs(jnp.float32(0.1), jnp.float32(clip.threshold))
    start = jax.eval_shape(functools.partial(train.init, model, task), 0)
    begin = functools.partial(train.begin, setup, clip)
    state = jax.eval_shape(begin, knobs, start)
    places = data_parallel.layout(mesh, setup, knobs, state)
    specs = {place.spec for place in jax.tree.leaves(places.params)}
    assert specs == {P("model"), P(None, "model"), P()}
    adam, _ = places.opt_state
    assert adam.mu == adam.nu == places.params
    assert {place.spec for place in jax.tree.leaves(places.clip_state)} == {P()}


def row(mesh, **changed):
    same = {"lr": 0.1, "arm": "none", "compared": 5, "moved": 0.1, "factor": 0.5}
    near = {"difference": 1e-6, "factor_difference": 1e-6, "test_accuracy": 0.9}
    return {**same, "mesh": mesh, **near, **changed}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "the same result on 2x1, 1x2 as"),
        ({"difference": 0.01}, "ANOTHER result"),
        ({"difference": float("nan")}, "ANOTHER result"),
        ({"test_accuracy": 0.8}, "ANOTHER result"),
        ({"factor_difference": 0.5}, "ANOTHER result"),
        ({"factor_difference": float("nan")}, "ANOTHER result"),
    ],
)
def test_the_verdict_compares_with_one_device(changed, words):
    rows = [row("1x1"), row("2x1"), row("1x2", **changed)]
    (line,) = data_parallel.verdict(rows)
    assert words in line


def test_one_device_alone_is_told_how_to_have_more():
    (line,) = data_parallel.verdict([row("1x1"), row("1x1", arm="clip:1")])
    assert "--devices 8" in line
