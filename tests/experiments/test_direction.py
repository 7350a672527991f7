import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

from experiments import arms
from experiments.journal import Journal
from experiments.results import Results
from experiments.studies import cliff, direction

NAN, INF = math.nan, math.inf


def test_what_was_turned_is_summed_up_over_clipped_updates():
    cosine = np.array([[0.0, 0.2, NAN, 0.4, 1.0], [0.6, NAN, NAN, 0.8, NAN]])
    lengths = np.array([[1.0, 2.0, 3.0, 9.0, 5.0], [6.0, 7.0, 8.0, 4.0, 0.0]])
    assert direction.turned(cosine, lengths) == pytest.approx(
        {
            "clipped": 0.6,
            "cosine_min": 0.0,
            "cosine_low": 0.05,
            "cosine": 0.5,
            "cosine_high": 0.95,
            "longest": 9.0,
        }
    )


def test_without_a_clipped_update_there_is_no_cosine():
    found = direction.turned(np.full(3, NAN), np.array([1.0, NAN, 2.0]))
    assert found.pop("clipped") == 0
    assert found.pop("longest") == INF
    assert all(map(math.isnan, found.values()))
    assert np.isnan(direction.shares_of(np.full(3, NAN))).all()


def test_shares_of_cosines_have_bins_of_a_fiftieth():
    shares = direction.shares_of(np.array([[0.01, 0.03, NAN], [0.99, 1 + 1e-7, NAN]]))
    expected = np.zeros(50)
    expected[[0, 1, 49]] = 0.25, 0.25, 0.5
    np.testing.assert_array_equal(shares, expected)


def test_only_clipped_updates_have_a_cosine():
    move = cliff.Move(
        cliff.Point(jnp.zeros((1, 2)), jnp.zeros((1, 2))),
        kept_norm=jnp.array([[1.0, 2.0]]),
        cosine=jnp.array([[0.5, 1.0]]),
        clipped=jnp.array([[True, False]]),
    )
    found = direction._turns(move)
    np.testing.assert_array_equal(found["cosine"], [[0.5, NAN]])
    np.testing.assert_array_equal(found["kept_norm"], [[1.0, 2.0]])


@pytest.mark.parametrize(
    ("values", "successes", "found"),
    [
        ((1, 2, 3), (1, 2, 3), (3, 3)),
        ((1, 2, 3), (3, 2, 1), (0, 3)),
        ((1, 2, 3), (1, 3, 2), (2, 3)),
        ((1, 1, 2), (1, 2, 3), (2, 2)),
        ((-INF, -INF, -1), (0, 1, 2), (2, 2)),
    ],
)
def test_pairs_agree_that_are_ordered_alike(values, successes, found):
    points = [{"x": x, "success": y} for x, y in zip(values, successes)]
    pairs = list(itertools.combinations(points, 2))
    assert direction.agreement(pairs, lambda point: point["x"]) == found


CONFIG = dataclasses.replace(
    direction.SMOKE, clip=("none", "clip:0.05"), starts=2, cliff_updates=30
)


def test_on_the_cliff_clipped_steps_have_their_angle_and_length(tmp_path):
    grid = arms.grid((CONFIG.cliff_lr,), CONFIG.clip)
    rows, cosine = direction._descend(CONFIG, grid, Journal(tmp_path, Progress()))
    none, clip = rows
    assert cosine.shape == (2, 4, 30)
    assert (none["clipped"], none["runs"]) == (0, 4)
    assert 0 < clip["clipped"] == np.isfinite(cosine[1]).mean()
    # Two elements of at most 0.05: if both are cut, the step goes along a diagonal.
    assert 0.05 <= clip["longest"] <= 0.05 * math.sqrt(2) * (1 + 1e-5)
    assert math.sqrt(0.5) - 1e-6 <= clip["cosine_min"] < 1


def arm(place, name, success, cosine, longest, seed=0):
    return {
        "place": place,
        "lr": 0.1,
        "arm": name,
        "runs": 1 if place == "training" else 100,
        "clipped": 0.0 if math.isnan(cosine) else 0.5,
        "cosine_min": cosine,
        "cosine_low": cosine,
        "cosine": cosine,
        "cosine_high": cosine,
        "longest": longest,
        "success": success,
    }


def test_runs_are_joined_by_medians_and_the_smallest_cosine():
    runs = [arm("training", "clip:1", *x) for x in ((0.0, NAN, 8.0), (1.0, 0.9, 2.0))]
    (found,) = direction._arms([*runs, arm("training", "clip:1", 1.0, 0.7, 4.0)])
    assert found["success"] == pytest.approx(2 / 3)
    assert (found["runs"], found["longest"]) == (3, 4.0)
    assert (found["cosine"], found["cosine_min"]) == (pytest.approx(0.8), 0.7)


def test_the_table_has_shares_of_starts_and_wilson_intervals_of_runs():
    rows = [
        arm("cliff", "none", 0.25, NAN, 3e4),
        *(arm("training", "clip:1", success, 0.9, 2.0) for success in (1.0, 0.0)),
    ]
    cells = [list(column.cells) for column in direction.table(rows).columns]
    assert cells[4] == ["-", "0.900"]
    assert cells[5] == ["- -", "0.900 0.900"]
    assert cells[6] == ["3e+04", "2"]
    assert cells[7] == ["25.0%", "1/2 [0.09, 0.91]"]


@pytest.mark.parametrize(
    ("cosine", "said"),
    [(1 - 1e-7, "turn nothing but by rounding"), (0.99, "TURN: their smallest")],
)
def test_clips_by_global_norm_are_checked_not_to_turn(cosine, said):
    line, *_ = direction.verdict([arm("cliff", "clip_by_global_norm:1", 1, cosine, 1)])
    assert said in line


def test_clips_of_one_threshold_are_set_side_by_side():
    _, line, *_ = direction.verdict(
        [
            arm("cliff", "clip_by_global_norm:1.0", 0.97, 1.0, 1.0),
            arm("cliff", "clip:1", 0.22, 0.971, 1.4),
        ]
    )
    assert line == (
        "the cliff, lr 0.1: threshold 1: success with the elements cut 22.0% (median "
        "cosine 0.971, longest 1.4), with the norm cut 97.0% (median cosine 1.000, "
        "longest 1)"
    )


def test_elementwise_clips_are_compared_with_each_other():
    low, high = (
        arm("cliff", "clip:0.1", 0.1, 0.9, 1),
        arm("cliff", "clip:1", 0.7, 0.8, 2),
    )
    said, *_ = direction.verdict([low, high])
    assert "most successful is clip:1, 70.0%" in said
    assert "the least clip:0.1, 10.0%" in said
    said, _ = direction.verdict([low, high | {"success": 0.1}])
    assert said == (
        "the cliff, lr 0.1: all elementwise clips have the same success, 10.0%"
    )


def runs(name, solved, cosine, longest):
    """Runs of 8 seeds, of which the first are solved."""
    return [
        arm("training", name, float(seed < solved), cosine, longest)
        for seed in range(8)
    ]


def pairs_of(rows):
    return [line for line in direction.verdict(rows) if "pairs of" in line]


def test_pairs_are_counted_apart_within_a_kind_and_between_kinds():
    cosine, length = pairs_of(
        [
            *runs("none", 1, NAN, 90.0),
            *runs("clip_by_leaf_norm:1", 8, 0.9, 1.0),
            *runs("clip:0.1", 8, 0.5, 0.3),
            *runs("clip:1", 0, 0.8, 3.0),
        ]
    )
    # None is at cosine 1: both that turn more are ahead of it, and clip:1 is not
    # behind it by the test.
    assert cosine == (
        "temporal order, lr 0.1: at this one learning rate, of pairs of clips that "
        "differ in success (by McNemar's test, p < 0.05 for each pair), the one with "
        "the larger median cosine has the greater success in 0 of 1 within a kind of "
        "clip, and in 1 of 3 between kinds; clips are in several pairs, so this is no "
        "test"
    )
    assert "shorter longest step" in length
    assert "in 1 of 1 within a kind of clip, and in 3 of 3 between kinds" in length


@pytest.mark.parametrize(("ahead", "differ"), [(5, False), (6, True)])
def test_clips_differ_in_training_if_their_seeds_part(ahead, differ):
    # By McNemar's exact test 5 seeds to 0 have p = 2 / 32, and 6 to 0 have 2 / 64.
    rows = [*runs("none", 0, NAN, 9.0), *runs("clip:1", ahead, 0.9, 1.0)]
    assert (len(pairs_of(rows)) == 2) == differ
    *_, line = direction.verdict(rows)
    assert ("no two of 2 clips differ in success (by McNemar's" in line) != differ


@pytest.mark.parametrize(("share", "differ"), [(0.54, False), (0.56, True)])
def test_clips_differ_on_the_cliff_by_a_margin(share, differ):
    none = arm("cliff", "none", 0.5, NAN, 9.0)
    *_, line = direction.verdict([none, arm("cliff", "clip:1", share, 0.9, 1.0)])
    assert "(by 5% of the starts or more)" in line
    assert ("no two of 2 clips differ" in line) != differ
    assert ("in 0 of 0 within a kind of clip, and in 1 of 1" in line) == differ


def test_what_differs_by_rounding_does_not_differ():
    rows = [
        arm("cliff", f"zclip:{z}", z / 5, 1 - z * 1e-7, 1 + z * 1e-7)
        for z in range(1, 4)
    ]
    assert all("in 0 of 0 within a kind" in line for line in pairs_of(rows))
    rows[0] |= {"cosine": 0.5, "longest": 2.0}
    assert all("in 2 of 2 within a kind" in line for line in pairs_of(rows))


def test_nothing_is_said_of_a_clip_alone():
    assert direction.verdict([arm("cliff", "zclip:1", 0.5, 0.9, 1.0)]) == []


@pytest.fixture
def drawn(monkeypatch):
    found = []

    def save(figure, path, results, caption):
        found.append((figure, caption))
        return path

    monkeypatch.setattr(direction.plots, "save", save)
    return found


def test_every_learning_rate_has_a_row_of_its_own(drawn, tmp_path):
    names = "none", "clip:1", "clip_by_leaf_norm:1"
    rows = [
        arm("cliff", "none", 0.2, NAN, 9.0) | {"lr": 0.5},
        *(arm("cliff", name, 0.4, 0.9, 1.0) | {"lr": 0.5} for name in names[1:]),
        *(
            arm("training", name, float(lr == 0.3), NAN if name == "none" else 0.9, lr)
            | {"lr": lr}
            for lr in (0.1, 0.3)
            for name in names
        ),
    ]
    # In the histogram of arm i all cosines are in bin i.
    shares = np.eye(50)
    shares[[0, 3]] = NAN
    curves = {
        "cliff shares": shares[:3],
        "training shares": shares[:6],
        "bins": direction.BINS,
    }
    config = dataclasses.asdict(direction.SMOKE) | {
        "clip": names,
        "lr": (0.1, 0.3),
        "cliff_lr": 0.5,
    }
    direction.figures(Results({"config": config}, rows, curves), tmp_path)
    (cosines, caption), (success, _) = drawn
    titles = [axis.get_title() for axis in cosines.axes]
    assert titles[::2] == titles[1::2]
    assert titles[::2] == [
        "the cliff, lr 0.5",
        "temporal order, lr 0.1",
        "temporal order, lr 0.3",
    ]
    filled = [
        [int(np.nanargmax(patch.get_data().values)) for patch in axis.patches]
        for axis in cosines.axes
    ]
    assert filled == [[1], [2], [1], [2], [4], [5]]
    labels = [axis.get_ylabel() for axis in success.axes[::2]]
    assert labels == [f"{title}:\nshare that succeeds" for title in titles[::2]]
    heights = [
        {float(y) for line in axis.lines for y in line.get_ydata() if y in (0.0, 1.0)}
        for axis in success.axes[2:]
    ]
    assert "cliff: T = 50, lr 0.5, 8 x 8 starts, 1000 updates" in caption
    assert [0.0 in each for each in heights[:2]] == [True, True]
    assert all(1.0 in each for each in heights[2:])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"clip": ("none",)}, "clip must be more than none, got clip=('none',)."),
        ({"length": 9}, "length of torder must be >= 10, got length=9."),
        ({"cliff_lr": 0.0}, "lr must be finite and > 0, got lr=0.0."),
        ({"starts": 1}, "starts must be >= 2, got starts=1."),
        ({"cliff_updates": 0}, "cliff_updates must be >= 1, got cliff_updates=0."),
        ({"checks": 0}, "checks must be >= 1, got checks=0."),
        ({"updates": 0}, "updates must be >= 1, got updates=0."),
    ],
)
def test_impossible_values_are_refused(option, message):
    with pytest.raises(ValueError, match=r".") as refused:
        dataclasses.replace(direction.SMOKE, **option)
    assert message in str(refused.value)
