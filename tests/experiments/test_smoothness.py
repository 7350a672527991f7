import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

from experiments.journal import Journal
from experiments.studies import smoothness

NAN, INF = math.nan, math.inf
TINY = dataclasses.replace(
    smoothness.SMOKE,
    lr=(0.5,),
    clip=("none", "clip_by_global_norm:0.01"),
    seeds=2,
    updates=8,
    every=1,
    batch=2,
    probe=4,
    length=5,
    hidden=3,
)


def test_the_smoothness_of_a_quadratic_is_that_of_its_matrix_along_the_way():
    def gradient(params):
        steep, flat = params["steep"], params["flat"]
        loss = 5 * jnp.sum(steep**2) + 0.5 * jnp.sum(flat**2)
        return loss, {"steep": 10 * steep, "flat": flat}

    here = {"steep": jnp.array([2.0]), "flat": jnp.array([0.0, 1.0])}
    there = {"steep": jnp.array([2.3]), "flat": jnp.array([0.4, 1.0])}
    point = smoothness.measure(gradient, here, there)
    assert point.loss == pytest.approx(20.5, rel=1e-6)
    assert point.grad_norm == pytest.approx(math.hypot(20, 1), rel=1e-6)
    assert point.smoothness == pytest.approx(math.hypot(3, 0.4) / 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        # 3 x^2 from 1 to 3: at share s it changes by 6 + 6 s per length.
        (lambda x: 3 * x**2, 12.0),
        # It grows up to 5 / 3, which is the first look, and no further.
        (lambda x: 3 * jnp.minimum(x, 5 / 3), 3.0),
        (lambda x: jnp.where(x > 2, jnp.nan, x), NAN),
    ],
)
def test_the_largest_change_per_length_on_the_way_counts(gradient, expected):
    def both(x):
        return jnp.sum(x), gradient(x)

    point = smoothness.measure(both, jnp.array([1.0]), jnp.array([3.0]))
    assert point.smoothness == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_equal_values_share_the_mean_of_their_ranks():
    values = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    assert smoothness.ranks(values).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]


X, Y = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 1.0, 4.0, 3.0, 5.0])


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (X, Y, 0.8),
        (np.exp(X), Y**3, 0.8),
        (X, -Y, -0.8),
        (X, X**2, 1.0),
        (X, np.ones(5), NAN),
    ],
)
def test_the_correlation_is_spearmans(x, y, expected):
    assert smoothness.spearman(x, y) == pytest.approx(expected, nan_ok=True)


def test_what_both_follow_is_held_constant():
    draws = np.random.default_rng(0)
    time = np.arange(40)
    x, y = time + draws.normal(0, 8, 40), 2 * time + draws.normal(0, 16, 40)
    lines = np.stack([np.ones(40), smoothness.ranks(time)], axis=1)

    def left(values):
        rank = smoothness.ranks(values)
        return rank - lines @ np.linalg.lstsq(lines, rank, rcond=None)[0]

    expected = np.corrcoef(left(x), left(y))[0, 1]
    assert smoothness.spearman(x, y) > 0.5
    assert smoothness.spearman(x, y, time) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(smoothness.spearman(time, 2 * time, time))


GRAD_NORM = np.geomspace(0.01, 100, 40)


@pytest.mark.parametrize(
    ("l0", "l1"), [(2.0, 3.0), (5.0, 0.0), (0.0, 3.0), (1e4, 0.1), (1e-3, 20.0)]
)
def test_a_literal_line_is_found_though_every_fourth_point_is_below(l0, l1):
    line = l0 + l1 * GRAD_NORM
    line[::4] /= 7
    found = smoothness.fit(GRAD_NORM, line)
    assert found == pytest.approx((l0, l1), rel=1e-3)


def test_nine_in_ten_noisy_points_are_below_the_line_whatever_the_units():
    noise = np.random.default_rng(1).lognormal(size=(2, 400))
    steep, smooth = noise[0], (1 + 2 * noise[0]) * noise[1]
    found = smoothness.fit(steep, smooth)
    below = np.mean(smooth < found.l0 + found.l1 * steep)
    assert below == pytest.approx(0.9, abs=0.005)
    scaled = smoothness.fit(1e3 * steep, 1e-2 * smooth)
    assert scaled == pytest.approx((1e-2 * found.l0, 1e-5 * found.l1), rel=1e-3)


def test_points_that_are_not_finite_are_left_out_and_counted():
    at = np.arange(12)
    loss, grad_norm = np.linspace(4, 3, 12), 1.0 + np.arange(12)
    smooth = 2 + 3 * grad_norm
    whole = smoothness.relation(at, smoothness.Point(loss, grad_norm, smooth))
    assert whole["spearman"] == pytest.approx(1)
    assert (whole["l0"], whole["l1"]) == pytest.approx((2, 3), rel=1e-3)
    assert (whole["lost"], whole["start_loss"], whole["end_loss"]) == (0, 4.0, 3.0)
    assert whole["spans"] == pytest.approx(38 / 5)
    broken = smooth.copy()
    broken[[2, 5, 11]] = NAN, INF, 0
    found = smoothness.relation(at, smoothness.Point(loss, grad_norm, broken))
    assert (found["lost"], found["spearman"]) == (3, pytest.approx(1))
    assert found["spans"] == pytest.approx(35 / 5)
    broken[:2] = NAN
    found = smoothness.relation(at, smoothness.Point(loss, grad_norm, broken))
    assert found["lost"] == 5
    assert math.isnan(found["spearman"])
    assert math.isnan(found["l1"])


def rows_of(spearman, held):
    return [
        {
            "cell": "lstm",
            "arm": "none",
            "lr": 1.0,
            "end_loss": 2.5,
            "spearman": one,
            "at_equal_update": other,
            "l0": 0.5,
            "l1": 2.0,
            "spans": 9.0,
            "lost": 1,
        }
        for one, other in zip(spearman, held, strict=True)
    ]


HIGH, LOW, AROUND = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95], [-0.5] * 6, [-0.2, 0.1] * 3


GROWS = "smoothness grows with the gradient norm, as in Zhang et al."
FALLS = "smoothness falls with the gradient norm, unlike in Zhang et al."
UNCLEAR = "smoothness has no clear relation to the gradient norm"


@pytest.mark.parametrize(
    ("spearman", "held", "claim", "numbers"),
    [
        (HIGH, HIGH, GROWS, "0.75 [0.50, 0.95]"),
        (
            HIGH,
            AROUND,
            f"{GROWS}; whether beyond what both follow in time is not clear",
            "0.75 [0.50, 0.95]",
        ),
        (
            HIGH,
            LOW,
            f"{GROWS}, but not beyond what both follow in time",
            "0.75 [0.50, 0.95]",
        ),
        (LOW, LOW, FALLS, "-0.50 [-0.50, -0.50]"),
        (AROUND, HIGH, UNCLEAR, "-0.05 [-0.20, 0.10]"),
        (HIGH[:5], HIGH[:5], "no verdict from fewer than 6 seeds", "0.70 [0.50, 0.90]"),
    ],
)
def test_the_verdict_follows_from_the_interval(spearman, held, claim, numbers):
    (line,) = smoothness.verdict(rows_of(spearman, held))
    assert line.startswith(f"lstm, lr 1, none: {claim}: Spearman {numbers}, with the ")
    assert line.endswith("seeds); the smoothness of a run spans a factor of 9")


@pytest.mark.parametrize(
    ("spearman", "claim", "numbers", "lacking"),
    [
        ([*HIGH[:5], NAN], UNCLEAR, "0.70 [-1.00, 1.00]", 1),
        ([*LOW[:5], NAN], UNCLEAR, "-0.50 [-1.00, 1.00]", 1),
        ([NAN] * 6, UNCLEAR, "nan [-1.00, 1.00]", 6),
        # Of nine draws the interval leaves out one at each end.
        ([*HIGH, 0.4, 0.3, NAN], GROWS, "0.65 [0.30, 0.95]", 1),
        ([*LOW, -0.4, -0.3, NAN], FALLS, "-0.50 [-0.50, -0.30]", 1),
    ],
)
def test_a_correlation_that_cannot_be_measured_supports_neither_side(
    spearman, claim, numbers, lacking
):
    (line,) = smoothness.verdict(rows_of(spearman, spearman))
    assert line.startswith(
        f"lstm, lr 1, none: {claim}: Spearman {numbers}, with the update held constant "
        f"{numbers} ("
    )
    told = f"; {lacking} of {len(spearman)} runs have no correlation to measure;"
    assert told in line


def test_a_factor_that_is_not_known_is_not_told():
    rows = [run | {"spans": NAN} for run in rows_of([NAN] * 6, [NAN] * 6)]
    (line,) = smoothness.verdict(rows)
    assert line.endswith("; 6 of 6 runs have no correlation to measure")


def test_the_table_has_a_line_per_arm_and_a_lost_run_supports_nothing():
    (line,) = zip(
        *(x.cells for x in smoothness.table(rows_of([*HIGH[1:], NAN], HIGH)).columns)
    )
    assert line == (
        "lstm",
        "none",
        "1",
        "2.50",
        "0.80 [-1.00, 1.00]",
        "0.75 [0.50, 0.95]",
        "0.5",
        "2",
        "6",
    )


@pytest.mark.parametrize(
    ("updates", "every", "pieces"),
    [(99, 10, [10] * 9 + [9]), (100, 10, [10] * 10), (8, 1, [1] * 8)],
)
def test_points_are_as_far_apart_as_the_config_says(updates, every, pieces):
    assert smoothness.cut(updates, every) == pieces


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("a law is no law " * 20)
    config = dataclasses.replace(TINY, data=file)
    return smoothness.run(config, Journal(file.parent, Progress(disable=True)))


def test_arms_are_measured_at_the_same_start_and_then_where_they_are(tiny):
    rows, curves = tiny
    runs = [(row["arm"], row["seed"], row["points"]) for row in rows]
    none, clip = TINY.clip
    assert runs == [(none, 0, 8), (none, 1, 8), (clip, 0, 8), (clip, 1, 8)]
    assert curves["at"].tolist() == list(range(8))
    for name in ("loss", "grad_norm"):
        found = curves[f"rnn {name}"]
        assert found.shape == (2, 2, 8)
        np.testing.assert_array_equal(found[0, :, 0], found[1, :, 0])
        assert (found[0, :, 1:] != found[1, :, 1:]).all()
        assert (found[:, 0] != found[:, 1]).all()
    assert (curves["rnn smoothness"] > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": ("rnn", "qrnn")}, "cell must be of rnn, lstm, gru, got cell=qrnn"),
        ({"probe": 0}, "probe must be >= 1, got probe=0"),
        ({"updates": 39}, "updates must be >= 40, got updates=39"),
        ({"clip": ("none", "none")}, "clip must be one or more different values"),
    ],
)
def test_a_config_that_is_not_possible_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(smoothness.SMOKE, **change)
