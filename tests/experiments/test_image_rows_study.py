import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.progress import Progress

from experiments import outcomes, plots, train
from experiments.journal import Journal
from experiments.studies import image_rows

NAN = math.nan


def rows_of(arm, lr, accuracies, diverged=False):
    return [
        {
            "experiment": "image_rows",
            "arm": arm,
            "lr": lr,
            "seed": seed,
            "valid_error": 1 - accuracy,
            "test_loss": NAN if diverged else 1.0,
            "test_error": 1 - accuracy,
            "diverged": diverged,
            "clipped": 0.25,
            "grad_norm_median": 0.5,
            "grad_norm_max": 7.0,
        }
        for seed, accuracy in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("accuracies", "found"),
    [
        ((0.6, 0.7, 0.7, 0.7, 0.7, 0.8), "gains"),
        ((0.5, 0.8, 0.8, 0.8, 0.8, 0.9), "makes no clear difference"),
        ((0.5, 0.6, 0.6, 0.6, 0.6, 0.7), "makes no clear difference"),
        ((0.1, 0.2, 0.3, 0.3, 0.3, 0.6), "loses"),
        ((0.9,) * 5, "cannot be judged from fewer than 6 seeds"),
    ],
)
def test_the_verdict_follows_from_the_seeds_one_by_one(accuracies, found):
    none = rows_of("none", 0.1, (0.5, 0.6, 0.6, 0.6, 0.6, 0.7))
    clip = rows_of("clip:1", 0.1, accuracies)
    (line,) = image_rows.verdict([*none, *clip])
    assert line.startswith(f"clip:1 {found}: accuracy")
    assert (
        "at learning rate 0.1, where it clips 25% of the updates; without a clip "
        "0.600 [0.500, 0.700] at 0.1; the gap, seed by seed, is "
    ) in line
    assert image_rows.verdict(clip) == []


def test_each_arm_is_compared_at_its_own_best_learning_rate():
    high, low = (0.9,) * 8, (0.1,) * 8
    wide = [*rows_of("clip:1", 0.1, high), *rows_of("clip:1", 1.0, high)]
    narrow = [*rows_of("none", 0.1, low), *rows_of("none", 1.0, high)]
    (line,) = image_rows.verdict([*narrow, *wide])
    assert line.startswith("clip:1 makes no clear difference: accuracy 0.900")
    assert "at learning rate 0.1 (the smallest tried), where" in line
    assert "without a clip 0.900 [0.900, 0.900] at 1 (the largest tried);" in line


def test_the_learning_rate_is_chosen_on_validation_images():
    first, second = (rows_of("none", lr, (0.9,) * 8) for lr in (0.1, 1.0))
    for row in first:
        row["valid_error"] = 0.5
    clip = [*rows_of("clip:1", 0.1, (0.8,) * 8), *rows_of("clip:1", 1.0, (0.8,) * 8)]
    (line,) = image_rows.verdict([*first, *second, *clip])
    assert line.endswith(
        "without a clip 0.900 [0.900, 0.900] at 1 (the largest tried); the gap, seed "
        "by seed, is -0.100 [-0.100, -0.100]"
    )


def test_the_learning_rate_is_chosen_on_seeds_that_are_not_reported():
    lucky = rows_of("clip:1", 0.1, [0.9] * 2 + [0.2] * 6)
    steady = rows_of("clip:1", 1.0, [0.8] * 8)
    none = rows_of("none", 0.1, [0.5] * 8)
    (line,) = image_rows.verdict([*none, *lucky, *steady])
    assert line.startswith("clip:1 loses: accuracy 0.200 [0.200, 0.200]")


def test_the_table_has_a_line_per_arm():
    rows = [
        *rows_of("none", 0.1, (0.1,) * 5, diverged=True),
        *rows_of("clip:1", 0.1, (0.7, 0.8, 0.9, 0.9, 0.9)),
    ]
    columns = image_rows.table(rows).columns
    cells = {column.header: list(column.cells) for column in columns}
    assert cells["clip"] == ["none", "clip:1"]
    assert cells["accuracy"] == ["0.100 [0.100, 0.100]", "0.900 [0.700, 0.900]"]
    assert cells["loss"] == ["inf [inf, inf]", "1 [1, 1]"]
    assert cells["diverged"] == ["5/5", "0/5"]
    assert cells["clipped"] == ["25%", "25%"]


def test_a_rare_clip_is_not_rounded_to_none():
    runs = rows_of("none", 0.1, (0.5,) * 4) + rows_of("clip:1", 0.1, (0.9,) * 4)
    rare = [{**run, "clipped": 0.004 * (run["arm"] != "none")} for run in runs]
    (line,) = image_rows.verdict(rare)
    assert "clips <1% of the updates" in line
    columns = image_rows.table(rare).columns
    cells = {column.header: list(column.cells) for column in columns}
    assert cells["clipped"] == ["0%", "<1%"]


def test_the_table_says_how_rates_are_chosen_if_they_are():
    one, two = rows_of("none", 0.1, (0.9,) * 4), rows_of("none", 1.0, (0.8,) * 4)
    assert str(image_rows.table([*one, *two]).caption).endswith(
        "by accuracy on validation images, chosen on the first 2 of 4 seeds and read "
        "off the others."
    )
    assert "chosen" not in str(image_rows.table(one).caption)


def test_a_map_of_arms_hatches_those_of_which_half_diverged():
    rows = [
        *rows_of("none", 0.1, (0.9,) * 2),
        *rows_of("none", 1.0, (0.1,) * 2, diverged=True),
        *rows_of("clip:1", 0.1, (0.8,)),
        *rows_of("clip:1", 0.1, (0.8,), diverged=True),
        *rows_of("clip:1", 1.0, (0.7,) * 2),
        *rows_of("clip:1", 1.0, (0.7,), diverged=True),
    ]
    axis = Figure().subplots()
    plots.arms_map(axis, rows, outcomes.median("test_loss"), ".2f", vmin=0, vmax=1)
    cells = {text.get_position(): text.get_text() for text in axis.texts}
    assert cells == {(0, 1): "1.00", (1, 1): "inf", (0, 0): "inf", (1, 0): "1.00"}
    hatched = {
        (patch.get_x() + 0.5, patch.get_y() + 0.5)
        for patch in axis.patches
        if isinstance(patch, Rectangle) and patch.get_hatch()
    }
    assert hatched == {(1, 1), (0, 0)}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["clip:1", "none"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "1"]


def test_curves_show_accuracy_and_options_reach_the_model(tmp_path, monkeypatch):
    seen = []

    def compare(setup, grid, seeds, task, pieces, journal, final):
        seen.append(setup)
        assert (task.judged_label_N != final.judged_label_N).any()
        shape = len(grid), len(seeds)
        names = [*train.Summary._fields, "final_loss", "final_error"]
        curves = {name: np.ones((*shape, len(pieces))) for name in names}
        tested = {
            name: np.full((*shape, len(pieces) + 1), 0.25)
            for name in ("test_loss", "test_error")
        }
        return {**curves, **tested, "seconds": np.ones(shape[0])}

    monkeypatch.setattr(train, "compare", compare)
    config = image_rows.ImageRowsConfig(
        experiment="image_rows",
        lr=(0.1,),
        clip=("none",),
        seeds=2,
        updates=40,
        batch=3,
        cell="gru",
        hidden=7,
        optimizer="momentum",
    )
    with Progress() as progress:
        rows, curves = image_rows.run(config, Journal(tmp_path, progress))
    (setup,) = seen
    assert (setup.model.cell, setup.model.hidden, setup.model.outputs) == ("gru", 7, 10)
    assert (setup.optimizer, setup.batch) == ("momentum", 3)
    assert len(rows) == 2
    np.testing.assert_array_equal(curves["valid_accuracy"], np.full((1, 2, 21), 0.75))
    np.testing.assert_array_equal(curves["judged"], np.arange(0, 41, 2))


def test_a_network_without_units_is_refused():
    with pytest.raises(ValueError, match=r"hidden must be >= 1, got hidden=0\."):
        image_rows.ImageRowsConfig(
            experiment="image_rows",
            lr=(0.1,),
            clip=("none",),
            seeds=1,
            updates=1,
            batch=1,
            hidden=0,
        )
