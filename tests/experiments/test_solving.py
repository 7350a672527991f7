import dataclasses
import io
import math

import numpy as np
import pytest
from rich.console import Console

from experiments import train
from experiments.studies import pathological, solving, temporal_order
from experiments.studies.solving import Stage

NAN = math.nan
CLIP = "clip_by_global_norm:1.0"


def runs_of(solved, arm="none", lr=0.1, alpha=0.0, control=False, **labels):
    """Rows of runs, each solved after 500 updates or (None) never; kept if solved."""
    return [
        {
            "experiment": "temporal_order",
            "task": "torder",
            "length": 30,
            "longest": 30,
            "alpha": alpha,
            "control": control,
            "arm": arm,
            "lr": lr,
            "seed": seed,
            "updates": 4000,
            "solved": bool(is_solved),
            "kept": bool(is_solved),
            "perfect": False,
            "final_error": 0.0 if is_solved else 0.75,
            "solved_at": 500.0 if is_solved else NAN,
            "clipped": 0.25,
            "grad_norm_median": 0.5,
            "grad_norm_max": 1.2e9,
            **labels,
        }
        for seed, is_solved in enumerate(solved)
    ]


def text_of(table, width=120):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_run_has_solved_its_task_once_and_keeps_it_at_the_end():
    error = np.array([[[0.7, 0.005, 0.3], [0.7, 0.3, 0.009], [0.7, 0.01, NAN]]])
    error = np.concatenate([error, [[[0.7, 0.3, 0.0]]]], axis=1)
    rows = [{"seed": 0, "final_error": end} for end in (0.3, 0.008, NAN, 0.0)]
    found = solving.with_solutions(rows, error, [30, 20])
    np.testing.assert_equal(
        [row["solved_at"] for row in found], [30.0, 50.0, NAN, 50.0]
    )
    assert [row["solved"] for row in found] == [True, True, False, True]
    assert [row["kept"] for row in found] == [False, True, False, True]
    assert [row["perfect"] for row in found] == [False, False, False, True]
    assert [row["seed"] for row in found] == [0, 0, 0, 0]


CONFIG = dataclasses.replace(
    temporal_order.STANDARD,
    task=("torder", "perm"),
    length=(10, 12),
    lr=(0.1, 0.3),
    alpha=(0.0, 2.0),
    updates=100,
    checks=3,
    seeds=2,
    control=(0.01,),
    control_length=(12,),
)


def test_a_run_goes_through_tasks_lengths_and_alphas_then_the_control():
    stages = solving.stages(CONFIG)
    assert stages == [
        *(
            Stage(task, length, alpha, control=False)
            for task in ("torder", "perm")
            for length in (10, 12)
            for alpha in (0.0, 2.0)
        ),
        Stage("torder", 12, 0.0, control=True),
        Stage("perm", 12, 0.0, control=True),
    ]
    assert len({stage.part for stage in stages}) == len(stages)
    plain, regularised, control = stages[0], stages[1], stages[-1]
    assert [(arm.lr, arm.clip.spec) for arm in plain.grid(CONFIG)] == [
        (0.1, "none"),
        (0.1, CLIP),
        (0.3, "none"),
        (0.3, CLIP),
    ]
    assert {arm.clip.spec for arm in regularised.grid(CONFIG)} == {CLIP}
    assert [(arm.lr, arm.clip.spec) for arm in control.grid(CONFIG)] == [(0.01, "none")]
    assert sum(plain.pieces(CONFIG)) == 100
    assert sum(control.pieces(CONFIG)) == 4 * 100
    without = dataclasses.replace(CONFIG, control=(), control_length=())
    assert solving.stages(without) == stages[:-2]


class Expected:
    """A journal that knows what was announced."""

    def expect(self, name, updates):
        self.updates = updates


def test_what_is_announced_is_trained_at_one_length_or_a_range(monkeypatch):
    trained = []

    def compare(setup, grid, seeds, task, pieces, journal, part, final):
        assert task.lengths == final.lengths
        assert [t.block * t.blocks for t in (task, final)] == [1000, 10_000]
        kinds = {arm.clip.kind for arm in grid}
        trained.append((part, task.lengths, setup.alpha, sum(pieces) * len(kinds)))
        shape = len(grid), len(seeds), len(pieces)
        names = "clipped", "cosine", "grad_norm_median", "grad_norm_max"
        found = {name: np.ones(shape) for name in (*names, "nonfinite")}
        found |= {name: np.ones(shape) for name in ("weight_norm", "spectral_radius")}
        judged = np.zeros((*shape[:2], len(pieces) + 1))
        found |= {f"test_{name}": judged for name in ("loss", "error")}
        found |= {f"final_{name}": judged[..., :1] for name in ("loss", "error")}
        return {**found, "seconds": np.ones(len(grid))}

    monkeypatch.setattr(train, "compare", compare)
    journal = Expected()
    rows, curves = solving.run(CONFIG, journal)
    assert journal.updates == sum(updates for *_, updates in trained) == 10 * 100 + 600
    assert trained[1] == ("torder 10 2", (10, 11), 2.0, 100)
    assert trained[-1] == ("perm 12 0 control", (12, 13), 0.0, 400)
    assert len(rows) == 2 * (4 * (4 + 2) + 2 * 1)
    assert {row["longest"] - row["length"] for row in rows} == {0}
    pieces = len(curves["torder 10 2 judged"])
    assert curves["torder 10 2 judged"][-1] == 100
    assert curves["torder 10 2 grad_norm_max"].shape == (2, 2, pieces)
    assert curves["perm 12 0 control spectral_radius"].shape == (1, 2, 4 * pieces)

    trained.clear()
    ranged = dataclasses.replace(CONFIG, length=(10,), longest=20)
    rows, _ = solving.run(ranged, journal)
    assert [lengths for _, lengths, *_ in trained] == [(10, 21)] * 4 + [(12, 21)] * 2
    assert solving.where(rows[0]) == "torder 10-20"


ALL, NONE = [1] * 6, [0] * 6


@pytest.mark.parametrize(
    ("clip", "none", "effect"),
    [
        (ALL, NONE, "gains (McNemar p = 0.03): it solves 6/6 [0.61, 1.00]"),
        (NONE, ALL, "loses (McNemar p = 0.03): it solves 0/6 [0.00, 0.39]"),
        (ALL, ALL, "makes no clear difference (McNemar p = 1): it solves 6/6"),
        ([1] * 5 + [0], NONE, "makes no clear difference (McNemar p = 0.06): it"),
        (ALL[:5], NONE[:5], "cannot be judged, n too small to tell (McNemar p = 0.06)"),
    ],
)
def test_a_clip_gains_or_loses_if_mcnemar_says_so(clip, none, effect):
    (line,) = solving.verdict([*runs_of(none), *runs_of(clip, CLIP)])
    assert line.startswith(f"torder 30: against none {CLIP} {effect}")
    assert line.endswith("at learning rate 0.1")


def test_each_clip_is_compared_at_its_own_best_rate_on_other_seeds():
    low = [*runs_of([0, 0, 1, 1], lr=0.1), *runs_of([1, 1, 0, 0], lr=0.3)]
    high = [*runs_of([1, 1, 1, 0], CLIP, 0.1), *runs_of([0, 0, 1, 1], CLIP, 0.3)]
    (line,) = solving.verdict([*low, *high])
    assert "it solves 1/2 [0.09, 0.91] and keeps 1/2" in line
    assert f"{line.partition('; ')[0]}".endswith("at learning rate 0.1")
    assert line.endswith(
        "none solves 0/2 [0.00, 0.66] and keeps 0/2 [0.00, 0.66] at learning rate 0.3"
    )


def test_rates_are_chosen_by_runs_solved_and_only_among_equals_by_runs_kept():
    kept = runs_of(ALL, lr=0.3)
    lost = [{**row, "kept": False} for row in runs_of(ALL, lr=0.1)]
    assert solving.tuned([*lost, *kept])["none", 0.0].lr == 0.3
    # One run more that solves it outweighs all that keep it.
    fewer = runs_of([0] + [1] * 5, lr=0.3)
    assert solving.cost(lost) < solving.cost(fewer)
    assert solving.tuned([*fewer, *lost])["none", 0.0].lr == 0.1
    # Where none is solved, fewer wrong answers decide.
    wrong, better = runs_of(NONE, lr=0.1), runs_of(NONE, lr=0.3)
    better[1]["final_error"] = 0.5
    assert solving.tuned([*wrong, *better])["none", 0.0].lr == 0.3


def test_omega_is_compared_with_none_and_with_the_same_clip_without_it():
    other = "clip:1.0"
    rows = [
        *runs_of(NONE),
        *runs_of(NONE, CLIP),
        *runs_of(ALL, other),
        *runs_of(ALL, CLIP, alpha=2.0),
    ]
    lines = solving.verdict(rows)
    assert [line.partition(" (")[0] for line in lines] == [
        f"torder 30: against none {CLIP} makes no clear difference",
        f"torder 30: against none {other} gains",
        f"torder 30: against none {CLIP} + 2 Omega gains",
        f"torder 30: against {CLIP} {CLIP} + 2 Omega gains",
    ]


def test_the_control_is_told_at_its_best_rate_on_other_seeds():
    control = [
        *runs_of([0, 0, 1, 1], lr=0.01, control=True),
        *runs_of([1, 0, 1, 0], lr=0.02, control=True),
    ]
    assert solving.verdict([*runs_of(NONE), *control]) == [
        "torder 30: with 4 times the updates none solves 1/2 [0.09, 0.91] and keeps "
        "1/2 [0.09, 0.91] at learning rate 0.02 (of 0.01, 0.02)"
    ]


def test_the_table_has_a_line_per_arm_that_fits_a_terminal():
    text = text_of(
        solving.arms_table([*runs_of([0] * 12), *runs_of([1] * 12, CLIP, lr=0.003)])
    )
    none, clipped = (
        line.split() for line in text.splitlines() if line.startswith(" torder 30")
    )
    assert none[2:] == (
        "none 0.1 4000 0/12 [0.00, 0.24] 0/12 0/12 - 25% 0.5 1e+09".split()
    )
    assert clipped[2:] == (
        f"{CLIP} 0.003 4000 12/12 [0.76, 1.00] 12/12 0/12 500 25% 0.5 1e+09".split()
    )


def test_the_table_of_tasks_has_a_column_per_method():
    rows = [
        row
        for task in ("perm", "torder3")
        for row in (
            *runs_of(NONE, task=task, longest=200),
            *runs_of(NONE, CLIP, task=task, longest=200),
            *runs_of(ALL, CLIP, alpha=2.0, task=task, longest=200),
            *runs_of(ALL, lr=0.01, control=True, task=task, longest=200),
            *runs_of(ALL, lr=0.01, control=True, task=task, length=99, longest=200),
        )
    ]
    lines = [line.split() for line in text_of(pathological.table(rows)).splitlines()]
    assert ["SGD", "SGD+C", "SGD+CR"] in lines
    for task in ("perm", "torder3"):
        (place,) = (i for i, line in enumerate(lines) if line[:1] == [task])
        assert lines[place] == (
            f"{task} 30-200 0/6 [0.00, 0.39] 0/6 [0.00, 0.39] 6/6 [0.61, 1.00]".split()
        )
        assert (
            lines[place + 1] == ("kept 0, perfect 0 " * 2 + "kept 6, perfect 0").split()
        )
        assert (
            lines[place + 2] == ("after -, lr 0.1 " * 2 + "after 500, lr 0.1").split()
        )


def test_the_table_of_tasks_tells_of_a_choice_only_if_there_was_one():
    rows = runs_of(NONE)
    control = [*rows, *runs_of(NONE, lr=0.01, control=True)]
    chosen = [*rows, *runs_of(ALL, lr=0.3)]
    texts = [text_of(pathological.table(x)) for x in (rows, control, chosen)]
    assert ["chosen" in text for text in texts] == [False, False, True]
    assert "2 of 6 seeds" in texts[-1].replace("\n", " ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": ("order",)}, "task must be of torder, torder3, add, mul, perm, mem,"),
        ({"task": ("torder", "torder")}, "task must be one or more different values"),
        ({"length": ()}, "length must be one or more different values, got"),
        ({"length": (9,)}, "length of torder must be >= 10, got length=9."),
        ({"control_length": (9,)}, "length of torder must be >= 10, got length=9."),
        ({"longest": 30}, r"longest must be > 30 \(length\), got longest=30."),
        ({"initial": "zeros"}, "initial must be of flax, basic_tanh, smart_tanh, sig"),
        ({"alpha": (-1.0,)}, "alpha must be finite and >= 0, got alpha=-1.0."),
        ({"alpha": (NAN,)}, "alpha must be finite and >= 0, got alpha=nan."),
        ({"alpha": (2.0,), "clip": ("none",)}, "alpha must be 0 without a clip, got "),
        (
            {"control": (0.0,), "control_length": (30,)},
            "lr must be finite and > 0, got lr=0.0.",
        ),
        (
            {"control": (0.1,), "control_length": (30, 30)},
            "control_length must be one or more different values, got control_length=",
        ),
        ({"control": (0.1,)}, "control_length must be given with control, and only"),
        ({"control_length": (30,)}, "control_length must be given with control, and"),
        ({"checks": 0}, "checks must be >= 1, got checks=0."),
        ({"hidden": 0}, "hidden must be >= 1, got hidden=0."),
    ],
)
def test_what_cannot_be_run_is_refused(changes, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        dataclasses.replace(temporal_order.SMOKE, **changes)
