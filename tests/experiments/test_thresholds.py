import dataclasses
import io
import math

import numpy as np
import pytest
from rich.console import Console

from experiments import clips, train
from experiments.studies import thresholds
from experiments.studies.thresholds import FIXED, LEARNS, OTHER

NAN, INF = math.nan, math.inf
KINDS = {"none": "none", "autoclip": LEARNS, "zclip": LEARNS, "clip:1": OTHER}
ALL, NONE = [1] * 6, [0] * 6


def runs_of(ends, arm="none", lr=0.1, task="torder", first=0, early=2.0, baseline=None):
    """Rows of runs: torder is solved after 500 updates or not, music ends with a loss.

    An arm that is a number is a fixed threshold. No run of music is worse than its
    baseline, unless one is given.
    """
    fixed = not isinstance(arm, str)
    return [
        {
            "experiment": "thresholds",
            "task": task,
            "arm": f"clip_by_global_norm:{arm:g}" if fixed else arm,
            "kind": FIXED if fixed else KINDS[arm],
            "threshold": arm if fixed else NAN,
            "lr": lr,
            "seed": first + i,
            "solved": task == "torder" and bool(end),
            "solved_at": 500.0 if task == "torder" and end else NAN,
            "test_loss": end if task == "music" else 1.25,
            "clipped": 0.25,
            "cosine": 0.5,
            "baseline": baseline or (1.0 if task == "torder" else INF),
            "early_norm": early,
            "early_updates": 100,
        }
        for i, end in enumerate(ends)
    ]


def test_all_methods_are_run_each_once_as_it_comes():
    named = [clips.parse(spec) for spec in thresholds.METHODS]
    assert [clip.name for clip in named] == list(clips.FACTORIES)
    assert "clip_by_global_norm:1" in thresholds.METHODS
    config = dataclasses.replace(
        thresholds.SMOKE,
        threshold=(1.0, 0.03),
        clip=("clip_by_global_norm:inf", "zclip", "clip_by_global_norm:1e0"),
    )
    assert thresholds.specs(config) == [
        "none",
        "clip_by_global_norm:1",
        "clip_by_global_norm:0.03",
        "zclip",
    ]


@pytest.mark.parametrize(
    ("spec", "kind", "threshold"),
    [
        ("none", "none", NAN),
        ("clip_by_global_norm:0.3", FIXED, 0.3),
        ("clip_by_global_norm:0.3,ord=1", OTHER, NAN),
        ("clip:1", OTHER, NAN),
        ("normalize_by_leaf_norm", OTHER, NAN),
        ("autoclip", LEARNS, NAN),
        ("median_mad", LEARNS, NAN),
    ],
)
def test_a_clip_is_fixed_or_has_no_memory_or_learns(spec, kind, threshold):
    found = thresholds.kind(clips.parse(spec))
    np.testing.assert_equal(found, {"kind": kind, "threshold": threshold})


@pytest.mark.parametrize(
    ("clip", "none", "effect"),
    [
        (ALL, NONE, "gains"),
        (NONE, ALL, "loses"),
        (ALL, ALL, "makes no clear difference"),
        ([1] * 5 + [0], NONE, "makes no clear difference"),
        (ALL[:5], NONE[:5], "cannot be judged, n too small to tell"),
    ],
)
def test_shares_are_compared_by_mcnemar_on_the_seeds_of_both(clip, none, effect):
    measure = thresholds.MEASURES["torder"]
    both = runs_of(clip, "zclip", first=2)
    # Seeds that only one of them has say nothing.
    more = runs_of([1 - none[0]] * 2 + none)
    assert thresholds.effect(both, more) == effect
    assert measure.shown(both).median == np.mean(clip)
    assert measure.cost(both) == 1 - np.mean(clip)


def sweep(ends, none, task, **labels):
    return [
        *runs_of(none, task=task, **labels),
        *(row for c, end in ends.items() for row in runs_of(end, c, task=task)),
    ]


def test_a_threshold_works_if_it_gains_80_percent_of_what_the_best_gains():
    # The best gains 10 of 12 runs: 80 % of it is 8 more than none's 2.
    ends = {0.5: 0, 0.9: 9, 1.0: 10, 3.0: 12, 20.0: 10, 21.0: 2}
    runs = sweep(
        {c: [1] * k + [0] * (12 - k) for c, k in ends.items()},
        [1] * 2 + [0] * 10,
        "torder",
    )
    found = thresholds.rule(runs)
    assert found.norm == 2.0
    assert found.thresholds == [0.5, 0.9, 1.0, 3.0, 20.0, 21.0]
    assert found.allowed == [1.0, 3.0, 20.0]
    assert (found.effect, found.works) == ("gains", [1.0, 3.0, 20.0])


SAME, FEW = "makes no clear difference", "cannot be judged from fewer than 6 seeds"


@pytest.mark.parametrize(
    ("none", "baseline", "effect", "works"),
    [
        # Of the 6 nats from 10 to 4, 4.8 are enough.
        ([16.0, 10.0, 10.0, 9.0] * 2, 99.0, "gains", [1.0, 10.0]),
        ([7.0] * 8, 99.0, "gains", [10.0]),
        ([4.0] * 8, 99.0, SAME, []),
        ([3.0] * 8, 99.0, "loses", []),
        ([4.0, 9.0] * 4, 99.0, SAME, []),
        # None blew up: gains are counted from the baseline, if there is one better.
        ([40.0] * 8, 99.0, "gains", [0.1, 1.0, 10.0]),
        ([40.0] * 8, 10.0, "gains", [1.0, 10.0]),
        ([NAN, INF] * 4, 10.0, "gains", [1.0, 10.0]),
        ([40.0] * 8, 4.0, "gains", []),
        ([40.0] * 4, 99.0, FEW, []),
    ],
)
def test_losses_gain_by_their_median_if_the_best_gains(none, baseline, effect, works):
    ends = {
        0.1: [8.0, 9.0, 7.0, NAN] * 2,
        1.0: [5.0, 5.0, 5.0, NAN] * 2,
        10.0: [4.0] * 8,
        99.0: [NAN] * 8,
    }
    runs = sweep(ends, none, "music", baseline=baseline)
    seen = [row for row in runs if row["seed"] < len(none)]
    found = thresholds.rule(seen)
    assert (found.effect, found.works) == (effect, works)
    (line, *_) = (x for x in thresholds.verdict(seen) if "learning rate 0.1 the" in x)
    assert ("but no threshold gains" in line) == (effect != "gains")
    assert ("but no threshold works" in line) == (effect == "gains" and not works)


def test_the_mean_norm_is_the_median_over_the_runs_without_a_clip():
    runs = sweep({1.0: ALL}, NONE, "torder")
    for row, norm in zip(runs, [1.0, 3.0, 5.0, 7.0, 1e9, INF]):
        row["early_norm"] = norm
    assert thresholds.rule(runs).norm == 6.0


def test_the_best_fixed_threshold_is_chosen_on_other_seeds_than_it_is_judged_on():
    rows = [
        *runs_of([1, 1, 1, 0], "zclip"),
        *runs_of([1, 0, 1, 1], 0.1, lr=0.1),
        *runs_of([0, 0, 1, 1], 0.1, lr=0.3),
        *runs_of([0, 1, 1, 1], 1.0, lr=0.1),
        *runs_of([1, 1, 0, 0], 1.0, lr=0.3),
    ]
    best = thresholds.best_fixed(rows)
    assert best.lr == 0.3
    assert [(row["threshold"], row["seed"]) for row in best.runs] == [
        (1.0, 2),
        (1.0, 3),
    ]
    assert not any(row["solved"] for row in best.runs)


def test_clips_are_ranked_by_success_then_by_time_or_by_loss():
    slow = [{**row, "solved_at": 900.0} for row in runs_of(ALL, "zclip")]
    torder = [*runs_of(NONE), *slow, *runs_of([1, 1, 0, 0, 0, 0], "autoclip")]
    ranked = thresholds.ranked([*torder, *runs_of(ALL, 1.0)])
    assert [*ranked] == ["clip_by_global_norm:1", "zclip", "autoclip", "none"]
    music = {"none": [NAN] * 3, "zclip": [5.0, 6.0, 7.0], "autoclip": [1.0, 7.0, 9.0]}
    rows = [
        row for arm, ends in music.items() for row in runs_of(ends, arm, task="music")
    ]
    assert [*thresholds.ranked(rows)] == ["zclip", "autoclip", "none"]


def test_a_choice_is_told_of_if_one_of_the_tasks_has_one():
    once = [*sweep({1.0: ALL}, NONE, "torder"), *runs_of([7.0] * 6, task="music")]
    more = [*once, *runs_of([9.0] * 6, lr=0.3, task="music")]
    assert "chosen" not in thresholds.table(once).caption
    assert "chosen on the first 2 of 6 seeds" in thresholds.table(more).caption


ROWS = [
    *sweep({0.1: [1] + [0] * 7, 1.0: [1] * 8, 100.0: [0] * 8}, [0] * 8, "torder"),
    *runs_of([1] * 8, "autoclip"),
    *runs_of([1] * 3 + [0] * 5, "zclip"),
    *runs_of([0] * 8, "clip:1"),
    *sweep({0.1: [8.0] * 8, 1.0: [6.0] * 8}, [7.0] * 8, "music", early=0.01),
    *runs_of([5.0] * 8, "autoclip", task="music"),
    # Better than the best threshold only on the seeds that choose it.
    *runs_of([1.0] * 2 + [7.0] * 6, "zclip", task="music"),
    *runs_of([NAN] * 8, "clip:1", task="music"),
]


def test_the_verdict_weighs_thresholds_the_rule_and_the_methods():
    assert thresholds.verdict(ROWS) == [
        "torder: the best fixed threshold, clip_by_global_norm:1 at learning rate 0.1, "
        "solves 6/6 [0.61, 1.00]; none, at 0.1, solves 0/8 [0.00, 0.32]",
        "torder: at learning rate 0.1 the mean norm of the first 100 updates without a "
        "clip is 2, and the rule of 0.5 to 10 times that allows 1 to 20: 1 of the 1 "
        "thresholds tried there work, and 1 of all 3",
        "torder: against none, as it comes, gains: autoclip (1 of 3 other methods)",
        "torder: against none, as it comes, makes no clear difference: zclip, clip:1 "
        "(2 of 3 other methods)",
        "torder: against the best fixed threshold, as it comes, makes no clear "
        "difference: autoclip, zclip (2 of 3 other methods)",
        "torder: against the best fixed threshold, as it comes, loses: clip:1 "
        "(1 of 3 other methods)",
        "music: the best fixed threshold, clip_by_global_norm:1 at learning rate 0.1, "
        "ends at 6 [6, 6]; none, at 0.1, ends at 7 [7, 7]",
        "music: at learning rate 0.1 the mean norm of the first 100 updates without a "
        "clip is 0.01, and the rule of 0.5 to 10 times that allows 0.005 to 0.1: 0 of "
        "the 1 thresholds tried there work, and 1 of all 2",
        "music: against none, as it comes, gains: autoclip (1 of 3 other methods)",
        "music: against none, as it comes, makes no clear difference: zclip "
        "(1 of 3 other methods)",
        "music: against none, as it comes, loses: clip:1 (1 of 3 other methods)",
        "music: against the best fixed threshold, as it comes, gains: autoclip "
        "(1 of 3 other methods)",
        "music: against the best fixed threshold, as it comes, loses: zclip, clip:1 "
        "(2 of 3 other methods)",
    ]


def test_the_table_ranks_the_clips_of_each_task():
    console = Console(width=120, file=io.StringIO(), markup=False)
    console.print(thresholds.table(ROWS))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    torder, music = lines.index(["torder"]), lines.index(["music"])
    assert lines[torder + 1] == (
        "clip_by_global_norm:1 0.1 8/8 [0.68, 1.00] 500 1.25 [1.25, 1.25] 25% 0.50 "
        f"{FIXED}".split()
    )
    assert lines[torder + 5][:3] == ["none", "0.1", "0/8"]
    assert lines[music + 1] == f"autoclip 0.1 5 [5, 5] 25% 0.50 {LEARNS}".split()
    assert lines[music + 6] == f"clip:1 0.1 inf [inf, inf] 25% 0.50 {OTHER}".split()


class Expected:
    """A journal that knows what was announced."""

    def expect(self, name, updates):
        self.updates = updates


def test_rows_know_the_norm_at_the_beginning_and_what_the_clip_is(monkeypatch):
    trained = []

    def compare(setup, grid, seeds, task, pieces, journal, part):
        trained.append((part, sum(pieces), setup.model.initial, task.outputs))
        shape = len(grid), len(seeds), len(pieces)
        found = {"grad_norm": np.arange(np.prod(shape), dtype=float).reshape(shape)}
        names = "clipped", "cosine", "grad_norm_median", "grad_norm_max", "nonfinite"
        found |= {name: np.ones(shape) for name in (*names, "weight_norm")}
        found["spectral_radius"] = np.ones(shape)
        judged = np.ones((*shape[:2], 1 + len(pieces)))
        found |= {f"test_{name}": judged for name in ("loss", "error")}
        found |= {f"final_{name}": judged[..., :1] for name in ("loss", "error")}
        return {**found, "seconds": np.ones(len(grid))}

    monkeypatch.setattr(train, "compare", compare)
    config = dataclasses.replace(
        thresholds.SMOKE,
        task=("torder", "music"),
        threshold=(1.0,),
        clip=("zclip",),
        lr=(0.1, 0.3),
        seeds=2,
        updates=100,
        music_updates=40,
    )
    journal = Expected()
    rows, _ = thresholds.run(config, journal)
    assert trained == [("torder", 100, "basic_tanh", 4), ("music", 40, "flax", 88)]
    # Two kinds of clips on both tasks.
    assert journal.updates == 2 * (100 + 40)
    assert len(rows) == (2 + 1) * 3 * 2
    assert [row["early_norm"] for row in rows[:4]] == [0.0, 10.0, 20.0, 30.0]
    assert {row["early_updates"] for row in rows} == {10, 4}
    assert [(row["kind"], row["lr"]) for row in rows[-6::2]] == [
        ("none", 1.0),
        (FIXED, 1.0),
        (LEARNS, 1.0),
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": ("add",)}, "task must be of torder, music, got task=add."),
        ({"task": ()}, "task must be one or more different values, got"),
        ({"threshold": ()}, "threshold must be one or more different values, got"),
        ({"threshold": (INF,)}, "threshold must be finite and > 0, got threshold=inf."),
        ({"length": 9}, "length of torder must be >= 10, got length=9."),
        ({"music_lr": (-1.0,)}, "lr must be finite and > 0, got lr=-1.0."),
        ({"music_length": 0}, "music_length must be >= 1, got music_length=0."),
        ({"music_updates": 0}, "music_updates must be >= 1, got music_updates=0."),
        ({"checks": 0}, "checks must be >= 1, got checks=0."),
        ({"hidden": 0}, "hidden must be >= 1, got hidden=0."),
    ],
)
def test_what_cannot_be_run_is_refused(changes, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        dataclasses.replace(thresholds.SMOKE, **changes)
