"""Records: what they say, and that a clip can be measured without clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip import bounds, clip_by, scopes, shapes

TREE = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.6, 0.8])}


def after(tx, *updates, params=None):
    state = tx.init(updates[0])
    update = jax.jit(tx.update)
    for u in updates:
        _, state = update(u, state, params)
    (record,) = optaxclip.records(state)
    return record


def test_global_norm():
    bad = {**TREE, "a": jnp.array([jnp.nan, 0.0])}
    record = after(optaxclip.clip_by_global_norm(bounds.recorded(2.0)), TREE, bad, TREE)
    np.testing.assert_allclose(record.norm, math.sqrt(26), rtol=1e-6)
    np.testing.assert_allclose(record.scale, 2 / math.sqrt(26), rtol=1e-6)
    assert float(record.limit) == 2 and float(record.clipped) == 1
    counts = record.steps, record.clipped_steps, record.nonfinite_steps
    assert tuple(map(int, counts)) == (3, 2, 1)


def test_per_leaf_norms_limits_and_share():
    limits = {"a": 1.0, "b": 7.0}
    record = after(optaxclip.clip_by_leaf_norm(bounds.recorded(limits)), TREE)
    norm, limit = (optaxclip.by_name(v, TREE) for v in (record.norm, record.limit))
    np.testing.assert_allclose(norm["a"], 5.0)
    np.testing.assert_allclose(norm["b"], 1.0, rtol=1e-6)
    assert float(limit["a"]) == 1 and float(limit["b"]) == 7
    assert float(record.clipped) == 0.5
    np.testing.assert_allclose(record.scale, 0.2, rtol=1e-6)


def test_units_give_the_largest_and_its_limit():
    updates = jnp.array([[3.0, 0.1], [4.0, 0.0]])
    params = jnp.array([[10.0, 1.0], [0.0, 0.0]])
    tx = clip_by(scopes.unit(), bounds.recorded(bounds.relative(0.1)))
    record = after(tx, updates, params=params)
    np.testing.assert_allclose(record.norm, 5.0)
    np.testing.assert_allclose(record.limit, 1.0, rtol=1e-6)
    assert float(record.clipped) == 0.5


def test_elements_count_what_was_cut():
    record = after(optaxclip.clip(bounds.recorded(3.5)), TREE)
    norm = optaxclip.by_name(record.norm, TREE)
    assert float(norm["a"]) == 4 and float(record.clipped) == 0.25


def test_recording_inf_measures_and_never_clips():
    tx = optaxclip.clip_by_global_norm(bounds.recorded(math.inf))
    out, state = tx.update(TREE, tx.init(TREE))
    assert np.asarray(out["a"]).tobytes() == np.asarray(TREE["a"]).tobytes()
    (record,) = optaxclip.records(state)
    np.testing.assert_allclose(record.norm, math.sqrt(26), rtol=1e-6)
    assert int(record.clipped_steps) == 0 and float(record.scale) == 1


def test_recording_changes_no_bit_of_the_updates():
    plain, _ = optaxclip.clip_by_global_norm(1.0).update(TREE, None)
    tx = optaxclip.clip_by_global_norm(bounds.recorded(1.0))
    recorded, _ = tx.update(TREE, tx.init(TREE))
    jax.tree.map(np.testing.assert_array_equal, recorded, plain)


def test_a_soft_shape_clips_every_cell():
    tx = optaxclip.clip_by_leaf_norm(bounds.recorded(1.0))
    soft = clip_by(scopes.leaf(), bounds.recorded(1.0), shapes.rational)
    assert float(after(tx, TREE).clipped) < float(after(soft, TREE).clipped) == 1


def test_the_schedule_goes_on_inside_a_record():
    tx = optaxclip.clip_by_global_norm(bounds.recorded(lambda step: 1.0 + step))
    record = after(tx, TREE, TREE)
    assert float(record.limit) == 2 and int(record.bound.step) == 2


def test_no_record_no_result():
    assert optaxclip.records(optax.adam(1e-3).init(TREE)) == []


def test_a_missing_gradient_leaves_its_part_of_the_record():
    tx = optaxclip.recorded(optaxclip.ema_clip(2.0))
    _, state = tx.update(TREE, tx.init(TREE))
    out, after = tx.update({**TREE, "b": None}, state)
    assert out["b"] is None
    assert jax.tree.structure(after) == jax.tree.structure(state)
    now, before = (optaxclip.by_name(s.norm, TREE) for s in (after, state))
    assert float(now["b"]) == float(before["b"])
    assert int(after.steps) == 2
