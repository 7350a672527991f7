import math

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
