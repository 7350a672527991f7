import dataclasses
import math
import statistics

import numpy as np
import pytest

from experiments import arms
from experiments.studies import diagnose

NAN, INF = math.nan, math.inf
UPDATES = 100


def run_of(**changes):
    """A run in which nothing happens, but for values at some updates, by curve."""
    curves = {"loss": 1.0, "grad_norm": 1.0, "weight_norm": 4.0, "moved": 0.01}
    found = {name: np.full(UPDATES, value) for name, value in curves.items()}
    for name, (when, value) in changes.items():
        found[name][when] = value
    return diagnose.Trace(start=2.0, **found)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        ((slice(30, None), 3.0), 30),
        ((slice(30, None), 2.0), 30),
        ((slice(30, None), NAN), 30),
        ((slice(0, None), 3.0), 0),
        ((slice(1, None), INF), 1),
        ((slice(75, None), 3.0), 75),
        ((slice(76, None), 3.0), NAN),
        ((slice(0, 0), 3.0), NAN),
        ((slice(30, 50), 3.0), NAN),
        ((slice(30, 60), 3.0), NAN),
    ],
)
def test_the_damage_is_where_the_loss_is_no_longer_below_the_start(loss, found):
    assert diagnose.damage(run_of(loss=loss)) == pytest.approx(found, nan_ok=True)


def test_single_good_batches_do_not_undo_the_damage_nor_bad_ones_make_it():
    damaged = run_of(loss=(slice(30, None), 3.0))
    damaged.loss[[35, 50, 70, 99]] = 1.0
    damaged.loss[[3, 10, 20]] = 9.0
    assert diagnose.damage(damaged) == 30


def test_the_running_median_knows_only_what_came_before():
    values = np.random.default_rng(0).lognormal(size=250)
    values[[40, 41]] = NAN
    known = [INF if math.isnan(value) else value for value in values]
    expected = [INF] * 10 + [
        statistics.median(known[max(update - 100, 0) : update])
        for update in range(10, 250)
    ]
    np.testing.assert_allclose(diagnose.running_median(values), expected, rtol=1e-12)


FIRES = [
    ("loss not finite", "loss", INF, 1e30, 40),
    ("loss not finite", "loss", NAN, 1e30, 40),
    ("gradient not finite", "grad_norm", NAN, 1e30, 40),
    ("gradient not finite", "grad_norm", INF, 1e30, 40),
    ("loss above start", "loss", 12.0, 11.0, 40),
    ("loss above start", "loss", NAN, 11.0, 40),
    ("loss > 3 x median", "loss", 3.1, 3.0, 40),
    ("gradient > 10 x median", "grad_norm", 10.1, 10.0, 40),
    ("gradient > 100 x median", "grad_norm", 100.1, 100.0, 40),
    ("gradient > 100 x median", "grad_norm", NAN, 100.0, 40),
    ("weights > 2 x start", "weight_norm", 8.1, 8.0, 40),
    ("weights > 2 x start", "weight_norm", 8.1, 8.0, 1),
    ("weights > 10 x start", "weight_norm", 40.1, 40.0, 40),
    ("update > 0.1 x weights", "moved", 0.11, 0.1, 0),
    ("update > weights", "moved", 1.1, 1.0, 40),
]


@pytest.mark.parametrize(("name", "curve", "beyond", "within", "at"), FIRES)
def test_a_warning_fires_beyond_its_limit_only(name, curve, beyond, within, at):
    assert diagnose.warned(run_of(**{curve: (at, beyond)}))[name] == at
    assert math.isnan(diagnose.warned(run_of(**{curve: (at, within)}))[name])


def test_every_warning_is_tried_and_none_fires_in_a_calm_run():
    assert {name for name, *_ in FIRES} == diagnose.WARNINGS.keys()
    assert all(map(math.isnan, diagnose.warned(run_of()).values()))


@pytest.mark.parametrize(
    ("name", "first"),
    [("loss above start", 9), ("loss > 3 x median", NAN), ("update > weights", NAN)],
)
def test_warnings_wait_until_there_is_something_to_compare_with(name, first):
    high = run_of(loss=(slice(0, None), 5.0), moved=(slice(0, None), 1.0))
    assert diagnose.warned(high)[name] == pytest.approx(first, nan_ok=True)
    early = diagnose.warned(
        run_of(loss=(slice(0, 10), [1, 1, 90, 1, 1, 1, 1, 1, 1, 1]))
    )
    assert math.isnan(early["loss > 3 x median"])


def test_losses_that_nearly_overflow_are_compared_all_the_same():
    huge = run_of()._replace(start=3e38, loss=np.full(UPDATES, 2e38, np.float32))
    assert all(map(math.isnan, diagnose.warned(huge).values()))


def row(damage, arm="none", setting="text", **fired):
    return {
        "setting": setting,
        "arm": arm,
        "damage": damage,
        **dict.fromkeys(diagnose.WARNINGS, NAN),
        **{name.replace("_", " "): update for name, update in fired.items()},
    }


def test_a_warning_is_worth_its_delay_what_it_misses_and_its_false_alarms():
    rows = [
        row(20.0, loss_not_finite=25.0, loss_above_start=13.0),
        row(30.0, loss_above_start=29.0),
        row(40.0, loss_above_start=45.0),
        row(NAN, loss_above_start=5.0),
        *(row(NAN, "clip:1") for _ in range(9)),
    ]
    found = {record.name: record for record in diagnose.records(rows)}
    above, broken = found["loss above start"], found["loss not finite"]
    assert (above.delays, above.fired, above.false, above.runs) == (
        [-7, -1, 5],
        3,
        1,
        10,
    )
    assert above.is_good
    assert (broken.fired, broken.false, broken.is_good) == (1, 0, False)
    cells = [list(column.cells) for column in diagnose.table(rows).columns]
    lines = {line[1]: line[2:] for line in zip(*cells)}
    assert lines["loss above start"] == ("3/3", "-1 [-7, 5]", "1/1", "0/9")
    assert lines["loss not finite"] == ("1/3", "inf [5, inf]", "0/1", "0/9")
    assert lines["update > weights"] == ("0/3", "inf [inf, inf]", "0/1", "0/9")


def test_the_verdict_names_the_first_good_warning_and_says_what_nan_is_worth():
    damaged = [row(20.0, loss_above_start=10.0, loss_not_finite=26.0)] * 2
    lines = diagnose.verdict([*damaged, row(NAN, "clip:1")])
    assert lines == [
        "text: runs damaged: none 2/2, clip:1 0/1; from update 20 [20, 20] on (median "
        "and range)",
        "text: the first good warning is loss above start (median 10 updates before "
        "the damage, range -10 to -10; missing in 0 of 2, a false alarm in 0 of 1)",
        "text: the loss is not finite in 2 of 2 damaged runs, median 6 updates after "
        "the damage, range 6 to 6",
    ]


def test_the_verdict_says_so_if_no_warning_is_good_and_if_the_loss_stays_finite():
    runs = [row(20.0, loss_above_start=23.0), row(NAN, "clip:1", loss_above_start=2.0)]
    _, none_good, finite = diagnose.verdict(runs)
    assert none_good.startswith(
        "text: no warning misses at most 10% of the damaged runs"
    )
    assert "the first is loss above start (median 3 updates after" in none_good
    assert finite == (
        "text: the loss is finite in 1 of 1 damaged runs: what is finite may be lost "
        "all the same"
    )


def test_the_verdict_of_runs_without_damage_is_that_there_is_none():
    (line,) = diagnose.verdict([row(NAN), row(NAN, "clip:1")])
    assert line == (
        "text: no run is damaged (none 0/1, clip:1 0/1), so there is nothing to foresee"
    )


def test_a_row_belongs_to_its_arm_and_seed():
    config = dataclasses.replace(diagnose.SMOKE, seed=5, seeds=2, lr=(0.3,))
    grid = arms.grid(config.lr, config.clip)
    calm = run_of()
    curves = {
        name: np.tile(curve, (2, 2, 1))
        for name, curve in calm._asdict().items()
        if name != "start"
    }
    curves |= {"start": np.full((2, 2), 2.0), "test_loss": np.full((2, 2, 3), 1.5)}
    curves["loss"][1, 0, 60:] = 7.0
    curves["seconds"] = np.array([4.0, 6.0])
    rows = diagnose._rows(config, "digits", grid, curves)
    found = [(row["arm"], row["seed"], row["damage"], row["seconds"]) for row in rows]
    none, clip = config.clip
    assert found[2] == (clip, 5, 60.0, 3.0)
    assert [row[:2] for row in found] == [(none, 5), (none, 6), (clip, 5), (clip, 6)]
    assert [math.isnan(row[2]) for row in found] == [True, True, False, True]
    assert rows[2]["loss > 3 x median"] == 60.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setting": ("adding", "mnist")}, "setting must be of adding, text, digits"),
        ({"setting": ()}, "setting must be one or more different values"),
        ({"length": 9}, "length of add must be >= 10"),
        ({"hidden": 0}, "hidden must be >= 1, got hidden=0"),
        ({"lr": (-1.0,)}, "lr must be finite and > 0"),
    ],
)
def test_a_config_that_is_not_possible_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(diagnose.SMOKE, **change)
