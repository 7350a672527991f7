import math
import re

import numpy as np
import pytest
from rich.progress import Progress

from experiments import arms, train
from experiments.journal import Journal
from experiments.results import Results
from experiments.studies import lr_window
from experiments.studies.lr_window import LrWindowConfig, Window

CLIP = "clip_by_global_norm:1.0"
NAN, INF = math.nan, math.inf


def rows_of(arm, losses, task="digits", errors=None, optimizer="sgd"):
    """Rows by learning rate: a loss per seed, or one loss for all of eight seeds."""
    return [
        {
            "experiment": "lr_window",
            "task": task,
            "cell": "rnn",
            "optimizer": optimizer,
            "arm": arm,
            "lr": lr,
            "seed": seed,
            "start_loss": 2.0,
            "final_loss": loss,
            "final_error": (errors or {}).get(lr, 0.5),
            "diverged": not loss <= 2.0,
            "clipped": 0.25,
        }
        for lr, each in losses.items()
        for seed, loss in enumerate([each] * 8 if isinstance(each, float) else each)
    ]


@pytest.mark.parametrize(
    ("losses", "lrs", "ends", "width"),
    [
        ((2.0, 0.5, 0.4, 0.5, 2.0), (0.1, 1.0, 10.0), True, 2.0),
        ((2.0, 2.0, 0.5, 0.4, 2.0), (1.0, 10.0), True, 1.0),
        ((2.0, 2.0, 0.4, 2.0, 2.0), (1.0,), True, 0.0),
        # A learning rate beyond a gap works, but is not in the window.
        ((0.5, 2.0, 0.4, 0.5, 2.0), (1.0, 10.0), True, 1.0),
        # What ends with the grid may be wider.
        ((0.5, 0.4, 2.0, 2.0, 2.0), (0.01, 0.1), False, 1.0),
        ((2.0, 2.0, 2.0, 0.5, 0.4), (10.0, 100.0), False, 1.0),
        ((0.5, 0.5, 0.5, 0.5, 0.5), (0.01, 0.1, 1.0, 10.0, 100.0), False, 4.0),
        ((0.7, 0.6, 0.5, 0.6, 0.61), (0.1, 1.0, 10.0), True, 2.0),
        ((INF, INF, 0.6, INF, INF), (1.0,), True, 0.0),
        ((2.0, 2.0, 0.7, 2.0, INF), (), True, -INF),
        ((INF,) * 5, (), True, -INF),
    ],
)
def test_a_window_is_the_best_rate_and_those_around_it_that_work(
    losses, lrs, ends, width
):
    found = lr_window.window((0.01, 0.1, 1.0, 10.0, 100.0), losses, 0.6)
    assert found == (lrs, ends)
    assert found.width == pytest.approx(width)


def test_a_window_with_one_rate_of_the_grid_at_its_end_may_be_wider():
    assert lr_window.window((1.0,), (0.5,), 0.6) == ((1.0,), False)


def test_a_window_is_written_with_a_sign_if_it_may_be_wider():
    assert str(Window((0.1, 0.3), ends=True)) == "0.48"
    assert str(Window((0.1, 1.0), ends=False)) == ">=1.00"
    assert str(Window((), ends=True)) == "-"


def test_a_rate_works_with_four_fifths_of_what_the_best_arm_gains():
    none = rows_of("none", {0.1: 1.5, 1.0: NAN})
    # The median of these is 0.5: 2 - 0.8 * (2 - 0.5) = 0.8.
    clip = rows_of(CLIP, {0.1: [0.1, 0.1, 0.5, 0.5, 0.5, NAN, NAN], 1.0: 0.6})
    assert lr_window.limit([*none, *clip]) == pytest.approx(0.8)


@pytest.mark.parametrize("end", [2.0, 2.5, NAN])
def test_where_nothing_gains_no_rate_works(end):
    rows = rows_of("none", {0.1: end})
    assert lr_window.limit(rows) == -INF
    (line, _) = lr_window.verdict([*rows, *rows_of(CLIP, {0.1: end})])
    assert "works over no learning rate, none over no learning rate: wider" in line
    assert line.endswith("wider for 0 of 8 seeds, narrower for 0, sign test p = 1")


NARROW = {0.01: 1.9, 0.1: 0.1, 1.0: NAN, 10.0: NAN}
WIDE = {0.01: 1.9, 0.1: 0.1, 1.0: 0.2, 10.0: NAN}


def test_the_verdict_compares_windows_and_what_their_largest_rate_gives():
    none = rows_of("none", NARROW, errors={1.0: 0.9})
    clip = rows_of(CLIP, WIDE, errors={1.0: 0.05})
    assert lr_window.verdict([*none, *clip])[0] == (
        f"digits-rnn-sgd: {CLIP} works over 1.00 decades (0.1 to 1), none over 0.00 "
        "decades (0.1): wider for 8 of 8 seeds, narrower for 0, sign test "
        "p = 0.008; at 1, its largest, 95.0% right, without it 10.0%"
    )
    assert (
        "wider for 0 of 8 seeds, narrower for 8"
        in lr_window.verdict([*rows_of("none", WIDE), *rows_of(CLIP, NARROW)])[0]
    )


def test_the_order_of_the_learning_rates_does_not_matter():
    none, wide = dict(reversed(NARROW.items())), dict(reversed(WIDE.items()))
    assert lr_window.verdict([*rows_of("none", none), *rows_of(CLIP, wide)]) == (
        lr_window.verdict([*rows_of("none", NARROW), *rows_of(CLIP, WIDE)])
    )


def test_seeds_have_windows_of_their_own():
    half = [0.2] * 5 + [NAN] * 3
    none, clip = rows_of("none", NARROW), rows_of(CLIP, {**WIDE, 1.0: half})
    assert (
        "wider for 5 of 8 seeds, narrower for 0, sign test p = 0.06;"
        in (lr_window.verdict([*none, *clip])[0])
    )


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ((0.05, 0.05, 0.06, 0.06), "gains"),
        ((0.05, 0.05, 0.06, 0.10), "makes no clear difference"),
        ((0.2, 0.2, 0.3, NAN), "loses"),
    ],
)
def test_the_verdict_compares_each_at_its_best_rate_on_seeds_that_did_not_choose_it(
    losses, found
):
    none = rows_of("none", {0.1: 1.9, 1.0: [0.01] * 4 + [0.10, 0.11, 0.11, 0.12]})
    clip = rows_of(CLIP, {0.1: [0.01] * 4 + list(losses), 1.0: 1.9})
    line = lr_window.verdict([*none, *clip])[1]
    assert f": at its best learning rate {CLIP} {found}: loss" in line
    assert "at 0.1, where it clips 25% of the updates; none 0.11 [0.1, 0.12] at 1" in (
        line
    )


def test_losses_of_a_text_are_shown_in_bits():
    ends = {0.1: math.log(2)}
    rows = [
        *rows_of("none", ends, task="text"),
        *rows_of(CLIP, ends, task="text"),
    ]
    assert "loss 1 [1, 1] at 0.1" in lr_window.verdict(rows)[1]


def test_each_setting_is_judged_by_its_own_best_arm_and_against_its_own_none():
    good = [*rows_of("none", NARROW), *rows_of(CLIP, WIDE)]
    bad = [
        *rows_of("none", {0.1: 1.0}, optimizer="adam"),
        *rows_of(CLIP, {0.1: 1.0}, optimizer="adam"),
    ]
    lines = lr_window.verdict([*good, *bad])
    assert len(lines) == 4
    assert lines[2].startswith(
        f"digits-rnn-adam: {CLIP} works over >=0.00 decades (0.1), none over "
        ">=0.00 decades (0.1)"
    )
    assert lr_window.verdict(rows_of(CLIP, WIDE)) == []


def test_the_table_gives_windows_and_their_difference():
    rows = [*rows_of("none", NARROW), *rows_of(CLIP, WIDE)]
    table = lr_window.table(rows)
    cells = {column.header: list(column.cells)[1:] for column in table.columns}
    assert cells["clip"] == ["none", CLIP]
    assert cells["window"] == ["0.1", "0.1 to 1"]
    assert cells["width"] == ["0.00", "1.00"]
    assert cells["wider"] == ["", "+1.00"]
    assert cells["diverged"] == ["16/32", "8/32"]
    nowhere = lr_window.table([*rows_of("none", NARROW), *rows_of(CLIP, {0.1: NAN})])
    assert [list(column.cells)[-1] for column in nowhere.columns][4:7] == (
        ["none works", "-", ""]
    )


def test_figures_show_runs_that_all_diverged(tmp_path):
    runs = [
        *rows_of("none", {0.1: NAN, 1.0: NAN}),
        *rows_of(CLIP, {0.1: 9.0, 1.0: NAN}),
    ]
    about = {
        "config": {
            "experiment": "lr_window",
            "clip": ["none", CLIP],
            "lr": [0.1, 1.0],
            "seeds": 8,
            "updates": 1,
            "batch": 1,
            "hidden": 1,
        },
        "baselines": {"digits": {"guessing": 2.3}},
        "commit": None,
        "device": "",
        "versions": {"jax": ""},
    }
    drawn = lr_window.figures(Results(about, runs, {}), tmp_path)
    assert [path.name for path in drawn] == ["losses.png", "maps.png"]
    assert all(path.is_file() for path in drawn)


def config_of(**options):
    return LrWindowConfig(
        **{
            "experiment": "lr_window",
            "setting": ("digits-rnn-sgd",),
            "lr": (0.1, 1.0),
            "clip": ("none", CLIP),
            "seeds": 2,
            "updates": 5,
            "batch": 3,
            **options,
        }
    )


def test_optimizers_get_their_share_of_the_rates_of_sgd(tmp_path, monkeypatch):
    seen = {}

    def compare(setup, grid, seeds, task, pieces, journal, part):
        seen[part] = setup, grid
        shape = len(grid), len(seeds)
        names = {*train.Summary._fields, "test_loss", "test_error"}
        names |= {"final_loss", "final_error"}
        curves = {name: np.ones((*shape, len(pieces))) for name in names}
        return {**curves, "seconds": np.ones(shape[0])}

    monkeypatch.setattr(train, "compare", compare)
    config = config_of(
        setting=("digits-rnn-sgd", "digits-lstm-momentum", "text-gru-adam")
    )
    with Progress() as progress:
        rows, _ = lr_window.run(config, Journal(tmp_path, progress))
    assert list(seen) == list(config.setting)
    lrs = [sorted({arm.lr for arm in grid}) for _, grid in seen.values()]
    np.testing.assert_allclose(lrs, [[0.1, 1], [0.01, 0.1], [0.001, 0.01]])
    models = [(setup.model.cell, setup.optimizer) for setup, _ in seen.values()]
    assert models == [("rnn", "sgd"), ("lstm", "momentum"), ("gru", "adam")]
    assert all(len(arms.by_kind(grid)) == 1 for _, grid in seen.values())
    assert len(rows) == 3 * 2 * 2 * 2
    labels = {(row["task"], row["cell"], row["optimizer"]) for row in rows}
    assert labels == {tuple(setting.split("-")) for setting in config.setting}


def test_facts_name_what_is_trained_on_and_what_it_takes_to_beat_it():
    digits = lr_window.facts(config_of())
    assert digits["baselines"] == {"digits": {"guessing": pytest.approx(math.log(10))}}
    assert set(digits["data"]) == {"digits"}
    text = lr_window.facts(config_of(setting=("text-rnn-sgd",)))
    assert set(text["data"]) == {"text"}
    assert set(text["baselines"]["text"]) == {"unigram", "bigram"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setting": ()}, "setting must be one or more different values, got"),
        ({"setting": ("digits-rnn-sgd",) * 2}, "setting must be one or more different"),
        (
            {"setting": ("digits-rnn-lion",)},
            "setting must be TASK-CELL-OPTIMIZER, of digits, text; rnn, lstm, gru; "
            "sgd, momentum, adam, got setting=digits-rnn-lion.",
        ),
        ({"setting": ("digits-rnn",)}, "sgd, momentum, adam, got setting=digits-rnn."),
        ({"hidden": 0}, "hidden must be >= 1, got hidden=0."),
        ({"length": 0}, "length must be >= 1, got length=0."),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(**options)
