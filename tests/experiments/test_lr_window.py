import dataclasses
import math
import re

import numpy as np
import pytest
from rich.progress import Progress

from experiments import arms, plots, train
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
    assert line.endswith(
        "wider for 0 of 8 seeds, narrower for 0, cut off by the grid for 0, sign test "
        "p = 1"
    )


NARROW = {0.01: 1.9, 0.1: 0.1, 1.0: NAN, 10.0: NAN}
WIDE = {0.01: 1.9, 0.1: 0.1, 1.0: 0.2, 10.0: NAN}


def test_the_verdict_compares_windows_and_what_their_largest_rate_gives():
    none = rows_of("none", NARROW, errors={1.0: 0.9})
    clip = rows_of(CLIP, WIDE, errors={1.0: 0.05})
    assert lr_window.verdict([*none, *clip])[0] == (
        f"digits-rnn-sgd: {CLIP} works over 1.00 decades (0.1 to 1), none over 0.00 "
        "decades (0.1): wider for 8 of 8 seeds, narrower for 0, cut off by the grid "
        "for 0, sign test p = 0.008; at 1, its largest, 95.0% right, without it 10.0%"
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


# Windows from 0.1 to 1, which end, and from 1, which the grid cuts off.
ENDS = {0.01: 1.9, 0.1: 0.1, 1.0: 0.2, 10.0: 1.9, 100.0: 1.9}
CUT = {0.01: 1.9, 0.1: 1.9, 1.0: 1.9, 10.0: 1.9, 100.0: 0.1}
WIDE_CUT = {0.01: 1.9, 0.1: 0.1, 1.0: 0.1, 10.0: 0.1, 100.0: 0.1}


@pytest.mark.parametrize(
    ("none", "clip", "found", "p"),
    [
        # At least 0 decades: more than 1, or less.
        (ENDS, CUT, (0, 0, 8), "1"),
        (CUT, ENDS, (0, 0, 8), "1"),
        (CUT, CUT, (0, 0, 8), "1"),
        (CUT, WIDE_CUT, (0, 0, 8), "1"),
        # At least 3 decades are more than 1.
        (ENDS, WIDE_CUT, (8, 0, 0), "0.008"),
        (WIDE_CUT, ENDS, (0, 8, 0), "0.008"),
        (ENDS, ENDS, (0, 0, 0), "1"),
    ],
)
def test_a_window_cut_off_by_the_grid_counts_only_where_it_tells(none, clip, found, p):
    rows = [*rows_of("none", none), *rows_of(CLIP, clip)]
    wider, narrower, cut = found
    assert (
        f": wider for {wider} of 8 seeds, narrower for {narrower}, cut off by the grid "
        f"for {cut}, sign test p = {p};"
    ) in lr_window.verdict(rows)[0]
    cells = [list(column.cells)[-1] for column in lr_window.table(rows).columns]
    assert cells[6] == ("+0.00" if none is clip is ENDS else "")


def test_an_empty_window_is_narrower_than_one_that_is_cut_off():
    assert lr_window.compared(Window((), True), Window((1.0,), False)) == "narrower"
    assert lr_window.compared(Window((1.0,), False), Window((), True)) == "wider"


def test_windows_of_as_many_steps_are_equal_though_rates_are_rounded():
    rates = lr_window.rates(3, -5, 8)
    assert rates[:6] == (0.0215, 0.0464, 0.1, 0.215, 0.464, 1.0)
    assert rates[-3:] == (100.0, 215.0, 464.0)
    for steps in range(len(rates)):
        places = range(len(rates) - steps)
        widths = {Window(rates[i : i + steps + 1], True).width for i in places}
        assert widths == {round(steps / 3, 2)}


def test_tiers_have_evenly_spaced_rates():
    for config in lr_window.STUDY.tiers.values():
        steps = np.diff(np.log10(dataclasses.asdict(config)["lr"]))
        np.testing.assert_allclose(steps, steps.mean(), atol=2e-3)


def test_a_best_rate_at_an_end_of_the_grid_is_marked():
    rows = [*rows_of("none", WIDE), *rows_of(CLIP, CUT)]
    small = rows_of("clip:1", {0.01: 0.1, 0.1: 1.0})
    rates = [list(column.cells)[1:] for column in lr_window.table(rows + small).columns]
    assert rates[1] == ["0.1", ">=100", "<=0.01"]


def test_the_table_says_how_rates_were_chosen_only_if_they_were():
    chosen = "rate, chosen on the first 2 of 8 seeds and read off the others. Clipped"
    assert chosen in str(lr_window.table(rows_of("none", WIDE)).caption)
    one = [
        *rows_of("none", {1.0: 0.5}),
        *rows_of("none", {0.1: 0.5}, optimizer="momentum"),
    ]
    assert "chosen" not in str(lr_window.table(one).caption)
    same = lr_window.table(rows_of("none", {0.1: [0.5], 1.0: [0.6]}))
    assert "learning rate, chosen by the same seed. Clipped" in str(same.caption)


def test_a_rare_clip_is_not_rounded_to_none():
    runs = rows_of("none", NARROW) + rows_of(CLIP, WIDE)
    rare = [{**run, "clipped": 0.004 * (run["arm"] == CLIP)} for run in runs]
    assert "clips <1% of the updates" in lr_window.verdict(rare)[1]
    cells = [list(column.cells)[1:] for column in lr_window.table(rare).columns]
    assert cells[3] == ["0%", "<1%"]


def test_seeds_have_windows_of_their_own():
    half = [0.2] * 5 + [NAN] * 3
    none, clip = rows_of("none", NARROW), rows_of(CLIP, {**WIDE, 1.0: half})
    assert (
        "wider for 5 of 8 seeds, narrower for 0, cut off by the grid for 0, sign test "
        "p = 0.06;"
    ) in lr_window.verdict([*none, *clip])[0]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ((0.05, 0.05, 0.05, 0.05, 0.06, 0.06), "gains"),
        ((0.05, 0.05, 0.05, 0.05, 0.06, 0.13), "makes no clear difference"),
        ((0.2, 0.2, 0.2, 0.2, 0.3, NAN), "loses"),
    ],
)
def test_the_verdict_compares_each_at_its_best_rate_on_seeds_that_did_not_choose_it(
    losses, found
):
    none = rows_of("none", {0.1: 1.9, 1.0: [0.01] * 2 + [0.10, *[0.11] * 4, 0.12]})
    clip = rows_of(CLIP, {0.1: [0.01] * 2 + list(losses), 1.0: 1.9})
    line = lr_window.verdict([*none, *clip])[1]
    assert f": at its best learning rate {CLIP} {found}: loss" in line
    assert (
        "at 0.1 (the smallest tried), where it clips 25% of the updates; none "
        "0.11 [0.1, 0.12] at 1 (the largest tried); the gap, seed by seed, is "
    ) in line


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


def test_captions_say_what_is_trained_and_how_rates_are_scaled(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(plots, "save", lambda *parts: written.append(parts[-1]))
    momentum = rows_of("none", {0.1: 0.5, 1.0: 0.4}, optimizer="momentum")
    lr_window.figures(results_of(momentum), tmp_path)
    lr_window.figures(results_of(rows_of("none", {0.1: 0.5, 1.0: 0.4})), tmp_path)
    runs = "8 seeds, 1 updates of 1 sequences, 1 units; digits: digits of somebody\n"
    scaled = f"{runs}learning rates: those of sgd times 0.1 (momentum)\n"
    for caption, start in zip(written, (scaled, scaled, runs, runs), strict=True):
        assert caption.startswith(start)
    assert "works below the dashed line,\nwith 80% or more" in written[2]
    assert "times" not in written[2] + written[3]


def test_figures_show_runs_that_all_diverged(tmp_path):
    runs = [
        *rows_of("none", {0.1: NAN, 1.0: NAN}),
        *rows_of(CLIP, {0.1: 9.0, 1.0: NAN}),
    ]
    drawn = lr_window.figures(results_of(runs), tmp_path)
    assert [path.name for path in drawn] == ["losses.png", "maps.png"]
    assert all(path.is_file() for path in drawn)


def results_of(runs):
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
        "data": {"digits": "digits of somebody, 8 rows"},
        "commit": None,
        "device": "",
        "versions": {"jax": ""},
    }
    return Results(about, runs, {})


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
