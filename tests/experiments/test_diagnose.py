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
    ("loss", "end", "damage"),
    [
        ((slice(30, None), 3.0), "damaged", 30),
        ((slice(30, None), NAN), "damaged", 30),
        ((slice(0, None), 3.0), "damaged", 0),
        ((slice(1, None), INF), "damaged", 1),
        ((slice(75, None), 3.0), "damaged", 75),
        # Where it began cannot be told.
        ((slice(76, None), 3.0), "neither", NAN),
        ((slice(30, None), 2.41), "damaged", 30),
        ((slice(30, None), 2.39), "neither", NAN),
        ((slice(30, None), 2.0), "neither", NAN),
        ((slice(30, None), 1.61), "neither", NAN),
        ((slice(30, None), 1.59), "sound", NAN),
        ((slice(30, 60), 3.0), "sound", NAN),
    ],
)
def test_a_run_is_damaged_from_where_its_loss_stays_above_the_start(loss, end, damage):
    found = diagnose.judge(run_of(loss=loss))
    assert found.end == end
    assert found.damage == pytest.approx(damage, nan_ok=True)


def test_single_good_batches_do_not_undo_the_damage_nor_bad_ones_make_it():
    damaged = run_of(loss=(slice(30, None), 3.0))
    damaged.loss[[35, 50, 70, 99]] = 1.0
    damaged.loss[[3, 10, 20]] = 9.0
    assert diagnose.judge(damaged) == ("damaged", 30)


def test_a_run_that_only_does_not_learn_is_neither_damaged_nor_sound():
    noise = np.random.default_rng(0).normal(2, 0.4, (100, UPDATES))
    runs = [run_of()._replace(loss=loss) for loss in noise]
    assert {diagnose.judge(run).end for run in runs} == {"neither"}


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


def row(damage, arm="none", seed=0, end="sound", **fired):
    return {
        "setting": "text",
        "arm": arm,
        "seed": seed,
        "end": end if math.isnan(damage) else "damaged",
        "damage": damage,
        **dict.fromkeys(diagnose.WARNINGS, NAN),
        **{name.replace("_", " "): update for name, update in fired.items()},
    }


def seeds(first, damage=20.0, runs=5, **fired):
    """Runs of as many seeds, damaged and, with a clip, sound."""
    return [
        made
        for seed in range(first, first + runs)
        for made in (row(damage, seed=seed, **fired), row(NAN, "clip:1", seed))
    ]


def test_a_warning_is_worth_its_delay_what_it_misses_and_its_false_alarms():
    rows = [
        row(20.0, loss_not_finite=25.0, loss_above_start=13.0),
        row(30.0, loss_above_start=29.0),
        row(40.0, loss_above_start=45.0),
        # Neither counts: not every warning can fire before update 10.
        row(10.0, loss_above_start=11.0),
        row(NAN, end="neither", loss_above_start=11.0),
        row(NAN, loss_above_start=5.0),
        *(row(NAN, "clip:1") for _ in range(9)),
    ]
    found = {record.name: record for record in diagnose.records(rows)}
    above, broken = found["loss above start"], found["loss not finite"]
    assert above == ("loss above start", [-7, -1, 5], 1, 10)
    assert (above.fired, above.is_good) == (3, True)
    assert (broken.fired, broken.false, broken.is_good) == (1, 0, False)
    cells = [list(column.cells) for column in diagnose.table(rows).columns]
    lines = {line[1]: line[2:] for line in zip(*cells)}
    assert lines["loss above start"] == ("3/3", "-1 [-7, 5]", "1/1", "0/9")
    assert lines["loss not finite"] == ("1/3", "inf [5, inf]", "0/1", "0/9")
    assert lines["update > weights"] == ("0/3", "inf [inf, inf]", "0/1", "0/9")


def test_every_warning_can_fire_at_the_update_after_which_damage_counts():
    loss = np.full(UPDATES, 1.0)
    loss[10:] = 90.0
    fired = diagnose.warned(run_of()._replace(loss=loss, grad_norm=200 * loss**2))
    compared = [name for name in fired if "median" in name or "above" in name]
    assert {name: fired[name] for name in compared} == dict.fromkeys(compared, 10)
    assert diagnose.ABLE == 10


def test_the_first_good_warning_is_chosen_on_half_of_the_seeds_and_told_of_the_others():
    # On the first seeds the weights are first, on all together the loss would be.
    chosen = seeds(0, loss_above_start=9.0)
    for run in chosen[::2]:
        run["weights > 2 x start"] = 5.0
    others = seeds(5, loss_above_start=9.0, loss_not_finite=26.0)
    lines = diagnose.verdict([*chosen, *others])
    assert lines == [
        "text: runs: none: 10 damaged, 0 sound, 0 neither; clip:1: 0 damaged, 10 "
        "sound, 0 neither; damage from update 20 [20, 20] on (median and range)",
        "text: the first good warning on half of the seeds is weights > 2 x start; on "
        "the others it fires in 0 of 5 damaged runs, and in 0 of 5 sound ones: not "
        "good there",
        "text: the loss is not finite in 5 of 10 damaged runs (median 6 updates after "
        "the damage, range 6 to 6)",
    ]
    lines = diagnose.verdict([*others, *seeds(10, loss_above_start=15.0)])
    assert lines[1] == (
        "text: the first good warning on half of the seeds is loss above start; on the "
        "others it fires in 5 of 5 damaged runs (median 5 updates before the damage, "
        "range -5 to -5), and in 0 of 5 sound ones: good there too"
    )


NONE_GOOD = (
    "no warning fires in at least 90% of 5 damaged runs and in at most 10% of 5 sound "
    "ones"
)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (seeds(0, runs=10), "no warning fires in any of 5 damaged runs"),
        # It misses the damage of one seed.
        (
            [*seeds(0, runs=1), *seeds(1, runs=9, loss_above_start=9.0)],
            NONE_GOOD,
        ),
        # It is a false alarm in all sound runs.
        ([run | {"update > weights": 5.0} for run in seeds(0, runs=10)], NONE_GOOD),
    ],
)
def test_the_verdict_says_so_if_no_warning_is_good(runs, said):
    lines = diagnose.verdict(runs)
    assert lines[1] == f"text: {said}"
    assert lines[2] == "text: the loss is not finite in 0 of 10 damaged runs"


NOT_JUDGED = (
    "text: which warning comes first cannot be judged from fewer than 5 runs damaged "
    "after update 10 and 5 sound ones in each half of the seeds: there are "
)


@pytest.mark.parametrize(
    ("runs", "numbers"),
    [
        (seeds(0, runs=9), "4 and 5 damaged, 4 and 5 sound"),
        (
            [run for run in seeds(0, runs=10) if run["end"] == "damaged"],
            "5 and 5 damaged, 0 and 0 sound",
        ),
        (seeds(0, runs=1), "0 and 1 damaged, 0 and 1 sound"),
    ],
)
def test_no_warning_is_named_from_few_runs(runs, numbers):
    assert diagnose.verdict(runs)[1] == NOT_JUDGED + numbers


def test_runs_damaged_before_every_warning_can_fire_are_left_out_and_counted():
    runs = [*seeds(0, 10.0, 10), *seeds(0, 11.0, 10, loss_above_start=12.0)]
    _, left_out, first, _ = diagnose.verdict(runs)
    assert left_out == (
        "text: 10 of 20 damaged runs are damaged by update 10, before which not every "
        "warning can fire: which comes first is judged without them"
    )
    assert "it fires in 5 of 5 damaged runs (median 1 updates after" in first
    assert diagnose.verdict(seeds(0, 3.0, 10))[2] == (
        f"{NOT_JUDGED}0 and 0 damaged, 5 and 5 sound"
    )


def test_the_verdict_of_runs_without_damage_is_that_there_is_none():
    (line,) = diagnose.verdict([row(NAN), row(NAN, "clip:1", end="neither")])
    assert line == (
        "text: no run is damaged (none: 0 damaged, 1 sound, 0 neither; clip:1: 0 "
        "damaged, 0 sound, 1 neither), so there is nothing to foresee"
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
        ({"updates": 35}, "updates must be >= 36, got updates=35"),
    ],
)
def test_a_config_that_is_not_possible_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(diagnose.SMOKE, **change)
