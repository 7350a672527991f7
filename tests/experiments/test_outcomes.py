import math

import numpy as np
import pytest

from experiments import arms, outcomes

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("error", "at"),
    [
        ([0.75, 0.5, 0.009, 0.0], 20),
        ([0.75, 0.009, 0.5, 0.75], 10),
        ([0.75, 0.5, 0.01, 0.02], NAN),
        ([0.75, NAN, NAN, NAN], NAN),
        ([0.0, 0.5, 0.5, 0.5], 0),
    ],
)
def test_a_run_is_solved_when_it_is_first_below_the_error(error, at):
    found = outcomes.solved(np.array([error]), np.array([0, 10, 20, 30]), 0.01)
    np.testing.assert_array_equal(found, [at])


def rows_of(lr, losses, arm="none"):
    return [
        {"arm": arm, "lr": lr, "seed": seed, "loss": loss}
        for seed, loss in enumerate(losses)
    ]


def test_a_learning_rate_is_chosen_on_other_seeds_than_it_is_judged_on():
    # 0.1 is better on seeds 0 and 1, and worse on 2 and 3.
    low, high = rows_of(0.1, (1.0, 1.0, 9.0, 8.0)), rows_of(1.0, (2.0, 2.0, 1.0, 1.0))
    lr, runs = outcomes.tuned([*low, *high], outcomes.median("loss"))
    assert lr == 0.1
    assert [row["loss"] for row in runs] == [9.0, 8.0]


@pytest.mark.parametrize(
    ("seeds", "choose"), [(2, 1), (3, 1), (4, 2), (8, 2), (12, 3), (20, 5), (50, 5)]
)
def test_few_seeds_choose_and_the_others_judge(seeds, choose):
    # 0.1 is better on the seeds that choose, and worse on all others.
    low = rows_of(0.1, [1.0] * choose + [9.0] * (seeds - choose))
    high = rows_of(1.0, [2.0] * choose + [1.0] * (seeds - choose))
    lr, runs = outcomes.tuned([*high, *low], outcomes.median("loss"))
    assert (lr, len(runs)) == (0.1, seeds - choose)
    assert {row["loss"] for row in runs} == {9.0}
    assert outcomes.choice([*high, *low]) == (
        f", chosen on the first {choose} of {seeds} seeds and read off the others"
    )


def test_nothing_is_said_of_a_choice_where_there_is_none():
    assert outcomes.choice(rows_of(0.1, (1.0, 2.0))) == ""
    one = [*rows_of(0.1, (1.0,)), *rows_of(1.0, (2.0,))]
    assert outcomes.choice(one) == ", chosen by the same seed"


def test_a_learning_rate_that_diverges_is_not_chosen():
    low, high = rows_of(0.1, (3.0,) * 4), rows_of(1.0, (NAN,) * 4)
    assert outcomes.tuned([*high, *low], outcomes.median("loss")).lr == 0.1
    mean = lambda rows: float(np.mean([row["loss"] for row in rows]))
    assert outcomes.tuned([*high, *low], mean).lr == 0.1


def test_without_a_choice_all_seeds_are_judged():
    rows = rows_of(0.1, (1.0, 2.0, 3.0))
    assert outcomes.tuned(rows, outcomes.median("loss")) == (0.1, rows)
    one = [*rows_of(0.1, (1.0,)), *rows_of(1.0, (2.0,))]
    assert outcomes.tuned(one, outcomes.median("loss")) == (0.1, one[:1])


def test_rows_say_how_each_run_ended():
    grid, seeds = arms.grid((0.1,), ("none", "clip:1")), np.array([5, 6])
    points = np.arange(4.0).reshape(2, 2, 1)
    ends = {
        (0, 0): ([2.0, 1.0], False),
        (0, 1): ([2.0, 3.0], True),
        (1, 0): ([2.0, NAN], True),
        (1, 1): ([2.0, 2.0], False),
    }
    loss = np.array([[ends[i, j][0] for j in range(2)] for i in range(2)])
    same = ("test_error", "final_loss", "final_error", "clipped", "cosine")
    norms = ("grad_norm_median", "grad_norm_max", "weight_norm", "spectral_radius")
    curves = {name: points for name in (*same, *norms)}
    nonfinite = np.array([[[-1, -1], [-1, 7]], [[3, -1], [-1, -1]]])
    curves |= {"test_loss": loss, "nonfinite": nonfinite}
    curves["seconds"] = np.array([4.0, 6.0])
    rows = outcomes.rows("name", grid, seeds, 100, curves, task="torder")
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("none", 5),
        ("none", 6),
        ("clip:1", 5),
        ("clip:1", 6),
    ]
    assert [row["diverged"] for row in rows] == [d for _, d in ends.values()]
    np.testing.assert_equal([row["nonfinite"] for row in rows], [NAN, 7, 3, NAN])
    assert [row["seconds"] for row in rows] == [2, 2, 3, 3]
    assert [row["final_error"] for row in rows] == [0, 1, 2, 3]
    assert {row["task"] for row in rows} == {"torder"}
    assert outcomes.by(rows, "arm", "seed").keys() == {
        (row["arm"], row["seed"]) for row in rows
    }


def test_gaps_pair_runs_by_seed_and_put_what_is_not_finite_last():
    none = rows_of(1.0, [3.0, NAN, 2.0, NAN, INF])
    clip = rows_of(1.0, [2.5, 2.0, NAN, NAN, NAN])[::-1]
    assert outcomes.gaps(clip, none, "loss") == [0.0, 0.0, -INF, INF, 0.5]


@pytest.mark.parametrize(
    ("gaps", "found"),
    [
        ([INF] * 3 + [-INF] * 3, (-INF, -INF, INF)),
        ([0.3, 0.1, 0.2], (0.2, 0.1, 0.3)),
        ([0.4, 0.1, 0.3, 0.2], (0.2, 0.1, 0.4)),
    ],
)
def test_the_middle_of_gaps_is_one_of_them(gaps, found):
    none = rows_of(1.0, [max(gap, 0.0) for gap in gaps])
    clip = rows_of(1.0, [max(-gap, 0.0) for gap in gaps])
    assert outcomes.gap(clip, none, "loss") == found


@pytest.mark.parametrize(
    ("gaps", "verb"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, INF], "gains"),
        ([0.1, 0.2, 0.3, 0.4, 0.5, -0.1], "makes no clear difference"),
        ([-0.1, -0.2, -0.3, -0.4, 0.5, -0.1], "makes no clear difference"),
        ([0.0, 0.2, 0.3, 0.4, 0.5, 0.6], "makes no clear difference"),
        ([-0.1, -0.2, -0.3, -0.4, -0.5, -INF], "loses"),
        # One of nine may be on the other side: 2 (1 + 9) / 2^9 < 5 %.
        ([-0.1, *[0.2] * 8], "gains"),
        ([0.2] * 5, "cannot be judged from fewer than 6 seeds"),
    ],
)
def test_the_whole_interval_of_the_gap_decides(gaps, verb):
    # Seeds differ by more than the clip does.
    none = [100.0 * seed for seed in range(len(gaps))]
    clip = [loss - gap for loss, gap in zip(none, gaps)]
    found = outcomes.effect(rows_of(1.0, clip), rows_of(1.0, none), "loss")
    assert found == verb


def test_losses_are_named_by_the_split_they_are_of():
    row = {"arm": "none", "start_loss": 3.0, "test_loss": 2.0, "test_error": 0.5}
    named = outcomes.by_split(row | {"final_loss": 1.0, "final_error": 0.25}, 2.0)
    assert named == {
        "arm": "none",
        "start_loss": 6.0,
        "valid_loss": 4.0,
        "valid_error": 0.5,
        "test_loss": 2.0,
        "test_error": 0.25,
    }
