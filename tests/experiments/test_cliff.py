import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

from experiments import arms, clips
from experiments.journal import Journal, Stopped
from experiments.results import Results
from experiments.studies import cliff
from experiments.studies.cliff import Point

NAN = math.nan
PLAIN = Point(5.2, -3.5)


def oracle(w, b, length=50):
    """E and its gradient, differentiated by hand step by step, in float64."""
    x, dw, db = 0.5, 0.0, 0.0
    for _ in range(length):
        value = 1 / (1 + np.exp(-x))
        slope = value * (1 - value)
        x, dw, db = w * value + b, value + w * slope * dw, 1 + w * slope * db
    value = 1 / (1 + np.exp(-x))
    outer = 2 * (value - 0.7) * value * (1 - value)
    return (value - 0.7) ** 2, np.array([outer * dw, outer * db])


@pytest.mark.parametrize("length", [1, 50])
def test_the_error_is_that_of_one_unit_after_so_many_steps(length):
    for point in (PLAIN, Point(4.5, -2.1)):
        found = cliff.error(length, jax.tree.map(jnp.float32, point))
        assert found == pytest.approx(oracle(*point, length)[0], rel=1e-5)


def cut_elements(grad, threshold):
    return np.clip(grad, -threshold, threshold)


def cut_norm(grad, threshold):
    return grad * min(1, threshold / np.linalg.norm(grad))


@pytest.mark.parametrize(
    ("spec", "cut"),
    [
        ("clip:0.01", cut_elements),
        ("clip_by_global_norm:0.01", cut_norm),
        ("clip_by_global_norm:5", cut_norm),
        ("none", cut_norm),
    ],
)
def test_a_step_goes_against_the_clipped_gradient(spec, cut):
    point, lr = Point(4.5, -2.1), 0.25
    _, grad = oracle(*point)
    assert 0.01 < abs(grad[0]) < abs(grad[1]) < 5
    clip = clips.parse(spec)
    knobs = arms.Knobs(jnp.float32(lr), jnp.float32(clip.threshold))
    start = cliff.begin(clip, knobs, Point(*map(jnp.float32, point)))
    descent, move = jax.jit(cliff.step, static_argnums=(0, 1))(clip, 50, knobs, start)
    kept = cut(grad, clip.threshold)
    np.testing.assert_allclose(descent.point, np.array(point) - lr * kept, rtol=1e-6)
    np.testing.assert_array_equal(move.point, np.array(point, np.float32))
    assert descent.steepest == pytest.approx(np.linalg.norm(grad), rel=1e-4)
    assert descent.lowest == pytest.approx(oracle(*point)[0], rel=1e-5)
    assert move.clipped == (np.linalg.norm(kept) < np.linalg.norm(grad))
    cosine = grad @ kept / np.linalg.norm(grad) / np.linalg.norm(kept)
    assert move.cosine == pytest.approx(cosine, abs=1e-6)
    assert move.kept_norm == pytest.approx(np.linalg.norm(kept), rel=1e-4)


@pytest.mark.parametrize(
    ("before", "at", "after"),
    [(1e-4, 5.2, 1e-4), (0.5, NAN, 0.5), (0.5, 5.2, oracle(*PLAIN, 2)[0])],
)
def test_the_steepest_gradient_and_the_lowest_error_are_remembered(before, at, after):
    clip = clips.parse("none")
    knobs = arms.Knobs(jnp.float32(0.1), jnp.float32(math.inf))
    start = cliff.begin(clip, knobs, Point(*map(jnp.float32, (at, PLAIN.b))))
    met = start._replace(steepest=jnp.float32(9), lowest=jnp.float32(before))
    descent, _ = cliff.step(clip, 2, knobs, met)
    np.testing.assert_equal(float(descent.steepest), NAN if math.isnan(at) else 9.0)
    assert descent.lowest == pytest.approx(after, rel=1e-5)


def test_the_plane_has_b_along_the_first_axis():
    plane = cliff.plane((4, 7), (-4, -2), 4)
    np.testing.assert_array_equal(plane.w, [[4, 5, 6, 7]] * 4)
    np.testing.assert_allclose(plane.b[:, 0], [-4, -10 / 3, -8 / 3, -2], rtol=1e-6)
    assert (plane.b == plane.b[:, :1]).all()


@pytest.mark.parametrize(
    ("error", "steepest", "lowest", "shares"),
    [
        ([1e-4, 1e-2, 0, 1e-3], [1, 1, 11, 20], [0, 0, 0, 1e-3], (0.5, 0.75, 0.5, 0.5)),
        (
            [1e-4, 1e-2, NAN, NAN],
            [NAN, NAN, 1, math.inf],
            [1e-4, 1e-2, 1e-4, NAN],
            (0.25, 0.5, 0.75, 1 / 3),
        ),
        ([1e-4, 1e-2], [1, 10], [1e-4, 1e-2], (0.5, 0.5, 0.0, NAN)),
    ],
)
def test_shares_are_of_all_starts_and_of_those_that_met_the_wall(
    error, steepest, lowest, shares
):
    found = cliff.metrics(*map(np.array, (error, steepest, lowest)))
    np.testing.assert_allclose(list(found.values()), shares)


CONFIG = dataclasses.replace(
    cliff.SMOKE,
    lr=(0.1, 0.3),
    clip=("none", "zclip:warmup=2"),
    length=(2, 5),
    starts=2,
    updates=20,
)


def run(directory):
    rows, curves = cliff.run(CONFIG, Journal(directory, Progress()))
    return [{**row, "seconds": 0} for row in rows], curves


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    rows, curves = run(tmp_path / "whole")
    journal = Journal(tmp_path, Progress())
    journal.stop()
    with pytest.raises(Stopped):
        cliff.run(CONFIG, journal)
    resumed = run(tmp_path)
    np.testing.assert_equal(resumed, (rows, curves))
    assert [(row["length"], row["lr"], row["arm"]) for row in rows] == [
        (length, lr, arm)
        for length in (2, 5)
        for lr in (0.1, 0.3)
        for arm in CONFIG.clip
    ]
    assert all(row["ever_reached"] >= row["reached"] for row in rows)
    paths = np.stack([curves[f"5 path_{x}"] for x in "wb"], axis=-1)
    assert paths.shape == (4, 9, 20, 2)
    for path, lr in zip(paths, (0.1, 0.1, 0.3, 0.3)):
        start = cliff.PATHS_W[0], cliff.PATHS_B[-1]
        np.testing.assert_allclose(path[6, 0], start, rtol=1e-6)
        moved = path[6, 1] - path[6, 0]
        np.testing.assert_allclose(moved, -lr * oracle(*start, length=5)[1], rtol=1e-2)
    assert curves["5 error"].shape == (4, 2, 2)
    for b, w in np.ndindex(2, 2):
        point = np.array([cliff.STARTS_W[w], cliff.STARTS_B[b]])
        for _ in range(20):
            point = point - 0.3 * oracle(*point, length=5)[1]
        end = curves["5 error"][2, b, w]
        assert end == pytest.approx(oracle(*point, length=5)[0], rel=1e-3)
    far = oracle(cliff.SURFACE_W[1], cliff.SURFACE_B[0], length=5)[0]
    assert curves["5 surface"][0, -1] == pytest.approx(far, rel=1e-4)


def rows_of(arm, shares, length=50):
    return [
        {
            "length": length,
            "arm": arm,
            "lr": lr,
            "reached": share,
            "ever_reached": 1 - (1 - share) / 2,
        }
        for lr, share in shares.items()
    ]


NONE = rows_of("none", {0.1: 0.3, 1.0: 0.6})


@pytest.mark.parametrize(
    ("share", "at_best", "at_rate"),
    [
        (0.9, "from more starts than none (lr 1), 90.0%", "more starts than that"),
        (0.6, "from as many starts as none (lr 1), 60.0%", "as many starts as that"),
        (0.2, "from fewer starts than none (lr 1), 30.0%", "fewer starts than that"),
    ],
)
def test_every_clip_is_compared_with_none_at_its_best_and_at_each_rate(
    share, at_best, at_rate
):
    best, low, high = cliff.verdict([*NONE, *rows_of("zclip", {0.1: 0.3, 1.0: share})])
    assert best.startswith("length 50, each at its best lr: zclip (lr ")
    assert at_best in best
    assert "lr 0.1: none reaches the target from 30.0%; from as many starts" in low
    assert f"60.0%; from {at_rate}: zclip {share:.1%}" in high


def test_cutting_elements_is_compared_with_cutting_the_norm_where_it_matters_most():
    norm = rows_of("clip_by_global_norm:1", {0.1: 0.97, 1.0: 0.9})
    element = rows_of("clip:1.0", {0.1: 0.22, 1.0: 1.0})
    *_, line = cliff.verdict([*NONE, *norm, *element, *rows_of("clip:0.1", {0.1: 0})])
    assert line.startswith("length 50, threshold 1, at lr 0.1, where it matters most")
    assert "from fewer starts than cutting the norm" in line
    assert "22.0% against 97.0%, and from fewer starts than none, 30.0%" in line
    *_, line = cliff.verdict([*norm, *rows_of("clip:1", {0.1: 0.97, 1.0: 1.0})])
    assert line.endswith(
        "than cutting the norm, which does not, 100.0% against 90.0%; ever on the way: "
        "100.0% against 95.0%"
    )


def test_nothing_is_said_without_something_to_compare():
    assert cliff.verdict(NONE) == []
    assert cliff.verdict(rows_of("zclip", {0.1: 0.3, 1.0: 0.6})) == []


@pytest.mark.parametrize(
    ("rows", "lr"),
    [
        ([*NONE, *rows_of("zclip", {0.1: 0.7, 1.0: 0.9})], 0.1),
        ([*NONE, *rows_of("zclip", {0.1: 0.1, 1.0: 0.5})], 1.0),
        (rows_of("zclip", {0.1: 0.7, 1.0: 0.9}), 1.0),
        (NONE, 1.0),
    ],
)
def test_paths_are_shown_where_a_clip_is_farthest_ahead(rows, lr):
    assert cliff._telling(rows) == lr


@pytest.fixture
def drawn(monkeypatch):
    found = []

    def save(figure, path, results, runs):
        found.append((figure, runs))
        return path

    monkeypatch.setattr(cliff.plots, "save", save)
    return found


def results_of(lengths, arms_of):
    """What a run leaves, with shares by length, clip and learning rate."""
    config = {"length": lengths, "clip": list(arms_of[lengths[0]]), "lr": [0.1, 1.0]}
    rows, curves, shape = [], {}, (2 * len(config["clip"]), 9, 3)
    for length, shares in arms_of.items():
        for arm, by_lr in shares.items():
            rows += rows_of(arm, dict(zip(config["lr"], by_lr)), length)
        curves |= {f"{length} path_{x}": np.full(shape, 0.5) for x in ("w", "b")}
        curves[f"{length} path_error"] = np.full(shape, 0.5)
        curves[f"{length} surface"] = np.ones((2, 2))
        curves |= {f"{length} surface_{x}": np.arange(2) for x in "wb"}
    return Results({"config": config | {"updates": 3, "starts": 7}}, rows, curves)


def test_every_length_has_paths_at_its_own_learning_rate(drawn, tmp_path):
    # Added up over lengths, none would be far ahead at 0.1.
    shares = {
        5: {"none": (0.2, 0.4), "zclip": (0.9, 0.5)},
        50: {"none": (0.9, 0.1), "zclip": (0.9, 0.8)},
    }
    cliff._draw_paths(results_of([5, 50], shares), tmp_path)
    ((figure, caption),) = drawn
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert [x for x in labels if "T = " in x] == [
        "T = 5, lr 0.1\nb",
        "T = 50, lr 1\nb",
    ]
    assert "at the lr where most reach the target, less those with none;" in caption
    assert "what ends below the grey line" in caption


def test_paths_without_none_are_not_said_to_be_ahead_of_it(drawn, tmp_path):
    cliff._draw_paths(results_of([5], {5: {"zclip": (0.9, 0.5)}}), tmp_path)
    ((_, caption),) = drawn
    assert "none" not in caption
    assert "7 x 7 starts, 3 updates, at the lr where most reach the target;" in caption


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"starts": 1}, "starts must be >= 2, got starts=1."),
        ({"length": (50, 0)}, "length must be >= 1, got length=0."),
        ({"length": ()}, "length must be one or more different values"),
        ({"updates": 0}, "updates must be >= 1, got updates=0."),
        ({"lr": (-1.0,)}, "lr must be finite and > 0, got lr=-1.0."),
    ],
)
def test_impossible_values_are_refused(option, message):
    with pytest.raises(ValueError, match=r".") as refused:
        dataclasses.replace(cliff.SMOKE, **option)
    assert message in str(refused.value)
