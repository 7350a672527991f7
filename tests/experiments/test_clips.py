import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip
from experiments import arms, clips

GRADIENT = {"w": jnp.array([[3.0], [0.0]]), "b": jnp.array([4.0])}


def clipped(clip, threshold):
    transformation = clip.make(threshold)
    return transformation.update(GRADIENT, transformation.init(GRADIENT), GRADIENT)


@pytest.mark.parametrize(
    ("spec", "w", "b"),
    [
        ("none", 3.0, 4.0),
        ("clip:0.5", 0.5, 0.5),
        ("clip_by_global_norm:1.0", 0.6, 0.8),
        ("clip_by_global_norm:max_norm=1", 0.6, 0.8),
        ("clip_by_global_norm:7,ord=1", 3.0, 4.0),
        ("clip_by_global_norm:2,ord=inf", 1.5, 2.0),
        ("clip_by_leaf_norm:2", 2.0, 2.0),
        ("normalize_by_global_norm", 0.6, 0.8),
        ("zclip", 0.6, 0.8),
        ("zclip:beyond=mean,max_norm=2", 1.2, 1.6),
        ("adagc:max_norm=inf", 3.0, 4.0),
        ("adaclip:0.9,rescale=false", 3.0, 4.0),
        ("quantile_clip:initial=2.5", 1.5, 2.0),
        ("median_mad:0,window=2,warmup=0", 3.0, 4.0),
    ],
)
def test_a_spec_becomes_the_clip_it_names(spec, w, b):
    clip = clips.parse(spec)
    updates, state = clipped(clip, clip.threshold)
    np.testing.assert_allclose(updates["w"][0, 0], w, rtol=1e-6)
    np.testing.assert_allclose(updates["b"][0], b, rtol=1e-6)
    assert len(optaxclip.records(state)) == 1


def test_every_clip_takes_a_traced_threshold(clip):
    jax.eval_shape(lambda threshold: clipped(clip, threshold), clip.threshold)
    array, _ = clipped(clip, jnp.float32(clip.threshold))
    known, _ = clipped(clip, clip.threshold)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), array, known)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("clip_by_globl_norm:1", "none or one of adaclip, adagc, "),
        ("", "none or one of adaclip, adagc, "),
        ("none:1", "none or one of adaclip, adagc, "),
        ("zclip,beyond=mean", "none or one of adaclip, adagc, "),
        ("clip_by_global_norm", "missing a required argument: 'max_norm'"),
        ("clip_by_global_norm:-1", "must be >= 0"),
        ("clip_by_global_norm:nan", "must not be NaN"),
        ("clip_by_global_norm:much", "must be a real number"),
        ("clip_by_global_norm:1,order=1", "unexpected keyword argument 'order'"),
        ("clip_by_global_norm:1,ord=0", "ord must be"),
        ("clip_by_unit_norm:1,axis=7", "axis"),
        ("clip:1,2", "too many positional arguments"),
        ("mean_clip", "missing a required argument: 'ratio'"),
        ("zclip:-1", "z must be > 0"),
        ("zclip:2.5,z=3", "multiple values for argument 'z'"),
        ("zclip:2.5,beyond=median", "beyond must be one of"),
        ("autoclip:101", "percentile must be in [0, 100]"),
        ("autoclip:10,window=0", "window must be >= 1"),
        ("autoclip:10,window=2.5", "window must be a Python int"),
        ("median_mad:3,window=9", "warmup must be at most window=9"),
        ("adaclip:0.9,rescale=no", "rescale must be true or false"),
        ("adaclip:true", "decay must be a single real number"),
    ],
)
def test_an_impossible_spec_is_refused_in_one_line(spec, reason):
    with pytest.raises(ValueError) as caught:
        clips.parse(spec)
    message = str(caught.value)
    assert reason in message
    assert repr(spec) in message
    assert "\n" not in message


def test_clips_that_differ_in_the_threshold_only_run_side_by_side():
    specs = (
        "none",
        "clip:1",
        "clip_by_global_norm:1",
        "clip_by_global_norm:1,ord=1",
        "clip:2",
        "zclip",
        "zclip:3,warmup=25",
        "zclip:3,warmup=5",
    )
    grid = arms.grid((0.1, 0.2), specs)
    assert [arm.clip.spec for arm in grid] == [*specs, *specs]
    assert [arm.lr for arm in grid] == [0.1] * 8 + [0.2] * 8
    kinds = [[0, 2, 8, 10], [1, 4, 9, 12], [3, 11], [5, 6, 13, 14], [7, 15]]
    assert arms.by_kind(grid) == kinds


def test_results_come_back_in_the_order_of_the_arms():
    grid = arms.grid((0.5, 2.0), ("clip:1", "none", "clip:3"))

    def run_kind(clip, knobs):
        return {"product": np.asarray(knobs.lr * knobs.threshold)}

    curves = arms.run(grid, run_kind)
    assert curves["product"].tolist() == [0.5, np.inf, 1.5, 2.0, np.inf, 6.0]
