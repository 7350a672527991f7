import math

import numpy as np
import pytest

from experiments import stats


@pytest.mark.parametrize(
    ("successes", "runs", "low", "high"),
    [(8, 8, 0.68, 1.0), (0, 8, 0.0, 0.32), (0, 20, 0.0, 0.16), (20, 20, 0.84, 1.0)],
)
def test_wilson_interval_is_the_published_one(successes, runs, low, high):
    assert stats.wilson(successes, runs) == pytest.approx((low, high), abs=0.005)


@pytest.mark.parametrize("runs", [1, 5, 100])
def test_wilson_interval_holds_the_rate_and_mirrors(runs):
    for successes in range(runs + 1):
        low, high = stats.wilson(successes, runs)
        assert 0 <= low <= successes / runs <= high <= 1
        mirrored = stats.wilson(runs - successes, runs)
        assert mirrored == pytest.approx((1 - high, 1 - low))


def test_spread_counts_a_diverged_run_as_the_worst():
    assert stats.spread([0.5, math.nan, 0.25]) == (0.5, 0.25, math.inf)
    assert f"{stats.spread([1.0, 2.0, 4.0]):.1f}" == "2.0 [1.0, 4.0]"


@pytest.mark.parametrize(
    ("ahead", "behind", "same", "p"),
    [(20, 0, 0, 1.9e-6), (0, 20, 3, 1.9e-6), (5, 0, 9, 0.0625), (3, 3, 2, 1.0)],
)
def test_mcnemar_is_a_sign_test_of_the_pairs_that_differ(ahead, behind, same, p):
    first = [True] * ahead + [False] * behind + [True] * same
    second = [False] * ahead + [True] * behind + [True] * same
    assert stats.mcnemar(first, second) == pytest.approx(p, rel=0.01)
    assert stats.mcnemar(second, first) == stats.mcnemar(first, second)


def test_mcnemar_without_a_difference_is_1():
    assert stats.mcnemar([True, False], [True, False]) == 1


def test_survival_falls_by_a_run_at_each_event_and_keeps_the_rest():
    times, waiting = stats.survival(np.array([30, math.nan, 10, math.nan]), 50)
    assert times.tolist() == [0, 10, 30, 50]
    assert waiting.tolist() == [1, 0.75, 0.5, 0.5]
    times, waiting = stats.survival(np.array([math.nan]), 50)
    assert (times.tolist(), waiting.tolist()) == ([0, 50], [1, 1])


@pytest.mark.parametrize(
    ("runs", "low", "high"), [(5, 1, 5), (6, 1, 6), (10, 2, 9), (20, 6, 15)]
)
def test_interval_of_the_median_is_that_of_the_tables(runs, low, high):
    values = np.random.default_rng(0).permutation(np.arange(1.0, runs + 1))
    assert stats.interval_of_median(values) == (low, high)


def test_interval_of_the_median_takes_nan_as_the_worst():
    assert stats.interval_of_median([math.nan, 1.0, 2.0]) == (1.0, math.inf)
