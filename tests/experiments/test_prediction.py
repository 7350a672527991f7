import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments import train
from experiments.config import UsageError
from experiments.studies import char_lm, music, prediction
from experiments.tasks.data_sets import Split

NAN, INF = math.nan, math.inf
CLIP = "clip_by_global_norm:1.0"
SEEDS = 12
JUDGED: tuple[Split, ...] = ("valid", "test")
# Bits per character of what counting reaches.
COUNTING = [
    {"arm": name, "lr": NAN, "updates": 0, "valid_loss": valid, "test_loss": test}
    for name, valid, test in [("unigram", 4.0, 4.1), ("bigram", 3.0, 3.1)]
]


def runs(arm, lr, losses, failed=False):
    return [
        {
            "arm": arm,
            "lr": lr,
            "seed": seed,
            "updates": 5,
            "valid_loss": loss,
            "test_loss": loss + 0.25,
            "failed": failed,
            "clipped": 0.5,
            "grad_norm_median": 2.0,
        }
        for seed, loss in enumerate(losses)
    ]


def rows_of(*trained):
    return [
        {"experiment": "char_lm", "unit": "bits per character", **row}
        for part in (COUNTING, *trained)
        for row in part
    ]


def level(loss):
    """Losses of all seeds, which differ a little in the same way."""
    return [loss + seed / 1000 for seed in range(SEEDS)]


def test_clips_are_compared_at_their_own_rates_on_seeds_that_did_not_choose():
    # Three seeds choose; without a clip the others would choose the other rate.
    flips = level(2.5)[:3] + level(3.5)[3:]
    rows = rows_of(
        runs("none", 0.5, level(3.2)),
        runs("none", 1.0, flips),
        runs("none", 2.0, [NAN] * SEEDS, failed=True),
        runs(CLIP, 0.5, level(3.3)),
        runs(CLIP, 1.0, level(2.9)),
        runs(CLIP, 2.0, level(2.0)),
    )
    at_best, ranges = prediction.verdict(rows)
    assert at_best == (
        f"{CLIP} gains: test loss 2.26 [2.25, 2.26] at learning rate 2 (the largest "
        "tried); without a clip 3.76 [3.75, 3.76] at learning rate 1; the gap, seed by "
        "seed, is 1.50 [1.50, 1.50] bits per character"
    )
    # The median of the flips is (3.505 + 3.506) / 2, which is above 3.
    assert ranges == (
        f"{CLIP} beats bigram at 2/3 learning rates, and 0/36 of its runs fail; "
        "without a clip it is 0/3 learning rates, and 12/36 runs"
    )


@pytest.mark.parametrize(
    ("loss", "verb"), [(2.0, "gains"), (2.5, "makes no clear"), (2.6, "loses")]
)
def test_the_verdict_follows_from_the_losses(loss, verb):
    rows = rows_of(runs("none", 1.0, level(2.5)), runs(CLIP, 1.0, level(loss)))
    at_best, _ = prediction.verdict(rows)
    assert at_best.startswith(f"{CLIP} {verb}")


def test_there_is_no_verdict_without_runs_without_a_clip():
    assert prediction.verdict(rows_of(runs(CLIP, 1.0, level(2.0)))) == []


def test_the_table_has_a_line_per_clip_and_per_baseline():
    rows = rows_of(
        runs("none", 1.0, level(3.0)),
        runs("none", 2.0, [NAN] * SEEDS, failed=True),
        runs(CLIP, 1.0, level(2.0)),
        runs(CLIP, 2.0, level(1.0)),
    )
    columns = [list(column.cells) for column in prediction.table(rows).columns]
    lines = list(zip(*columns, strict=True))
    losses = "3.01 [3.00, 3.01]", "3.26 [3.25, 3.26]"
    clipped = "1.01 [1.00, 1.01]", "1.26 [1.25, 1.26]"
    gap = "2.00 [2.00, 2.00]"
    assert lines == [
        ("none", "1", *losses, "", "50%", "2", "12/24", "0/2"),
        (CLIP, "2", *clipped, gap, "50%", "2", "0/24", "2/2"),
        ("unigram", "", "4.00", "4.10", "", "", "", "", ""),
        ("bigram", "", "3.00", "3.10", "", "", "", "", ""),
    ]


def test_the_table_says_how_rates_were_chosen_only_if_they_were():
    one = runs("none", 1.0, level(3.0))
    several = prediction.table(rows_of(one, runs("none", 2.0, level(3.0))))
    chosen = "loss, chosen on the first 3 of 12 seeds and read off the others: median"
    assert chosen in str(several.caption)
    assert "chosen" not in str(prediction.table(rows_of(one)).caption)
    alone = [*runs("none", 1.0, [3.0]), *runs("none", 2.0, [3.0])]
    same = str(prediction.table(rows_of(alone)).caption)
    assert "loss, chosen by the same seed: median" in same


def test_a_rare_clip_is_not_rounded_to_none():
    rare = [{**run, "clipped": 0.004} for run in runs(CLIP, 1.0, level(3.0))]
    columns = prediction.table(rows_of(rare)).columns
    assert next(iter(columns[5].cells)) == "<1%"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Rows and curves of a run whose seeds end with 0.5, 4 and NaN nats on valid."""
    data = tmp_path / "text.txt"
    data.write_text("ab" * 250)
    config = dataclasses.replace(
        char_lm.SMOKE, data=data, lr=(1.0,), seeds=3, updates=4, checks=2, length=4
    )
    expected = []

    def compare(setup, grid, seeds, task, pieces, journal, final):
        assert [arm.clip.spec for arm in grid] == list(config.clip)
        assert seeds.tolist() == [0, 1, 2]
        assert pieces == [2, 2]
        valid, test = (char_lm.DATA_SET.load(config, split) for split in JUDGED)
        np.testing.assert_array_equal(task.judged_WxT1, valid.judged_WxT1)
        np.testing.assert_array_equal(final.judged_WxT1, test.judged_WxT1)
        log = {name: np.ones((2, 3, 2)) for name in train.Summary._fields}
        loss = np.array([[[3.0, 2.0, 0.5], [3.0, 3.0, 4.0], [3.0, NAN, NAN]]] * 2)
        return {
            **log,
            "test_loss": loss,
            "test_error": loss / 10,
            "final_loss": np.full((2, 3, 1), 2.5),
            "final_error": np.full((2, 3, 1), 0.25),
            "seconds": np.ones(2),
        }

    monkeypatch.setattr(train, "compare", compare)
    journal: Any = SimpleNamespace(expect=lambda *args: expected.append(args))
    found = char_lm.STUDY.run(config, journal)
    assert expected == [("char_lm", 4)]
    return found


def test_losses_are_named_by_their_split_and_are_in_bits(trained):
    rows, curves = trained
    row = rows[2]
    assert row["start_loss"] == pytest.approx(3 / math.log(2))
    assert row["valid_loss"] == pytest.approx(0.5 / math.log(2))
    assert row["test_loss"] == pytest.approx(2.5 / math.log(2))
    assert (row["valid_error"], row["test_error"]) == (0.05, 0.25)
    assert not any(name.startswith("final") for name in row)
    bits = np.array([3, 2, 0.5]) / math.log(2)
    np.testing.assert_allclose(curves["valid_loss"][0, 0], bits)
    assert curves["judged"].tolist() == [0, 2, 4]


def test_baselines_come_first_and_decide_which_runs_failed(trained):
    rows, _ = trained
    unigram, bigram = rows[:2]
    assert (unigram["arm"], bigram["arm"]) == ("unigram", "bigram")
    # As many a as b, which take turns.
    assert unigram["valid_loss"] == pytest.approx(1, abs=0.01)
    assert bigram["test_loss"] == pytest.approx(0, abs=0.01)
    assert {unigram["updates"], bigram["updates"]} == {0}
    assert [row["failed"] for row in rows[2:]] == [False, True, True] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length must be >= 1, got length=0."),
        ({"hidden": 0}, "hidden must be >= 1, got hidden=0."),
        ({"checks": 0}, "checks must be >= 1, got checks=0."),
        ({"cell": "lstm", "initial": "sigmoid"}, "initial must be one of .*=sigmoid."),
        ({"lr": (1.0, -1.0)}, "lr must be finite and > 0, got lr=-1.0."),
    ],
)
def test_impossible_options_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(music.SMOKE, **changes)


@pytest.mark.parametrize("study", [music, char_lm])
def test_a_file_that_is_missing_is_refused_before_anything_is_made(study, tmp_path):
    config = dataclasses.replace(study.SMOKE, data=tmp_path / "none.npz")
    with pytest.raises(UsageError, match="cannot be read"):
        study.STUDY.facts(config)


def test_facts_name_the_data_the_loss_and_the_initial_values():
    facts = music.STUDY.facts(dataclasses.replace(music.SMOKE, initial="sigmoid"))
    assert facts["data"].startswith("generated rolls")
    assert "sum over the keys, mean over batch and steps" in facts["loss"]
    assert facts["initial_values"].startswith("sigmoid")
