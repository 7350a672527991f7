import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

from experiments import clips
from experiments.journal import Journal
from experiments.results import Results
from experiments.studies import limits

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("spec", "norms", "limit", "kept"),
    [
        ("mean_clip:2", [1, 5, NAN, 3], [INF, 2, 6, 6], [1, 2, NAN, 3]),
        ("none", [1, 5, NAN, 3], [INF] * 4, [1, 5, NAN, 3]),
        ("clip_by_trust_ratio:2", [1, 5, NAN, 3], [2] * 4, [1, 2, NAN, 2]),
        ("ema_clip:2,decay=0.5", [1, 5, NAN, 3], [INF, 2, 3, 3], [1, 2, NAN, 3]),
    ],
)
def test_a_clip_is_fed_updates_of_these_norms(spec, norms, limit, kept):
    trace = limits.feed(clips.parse(spec), jnp.array(norms, jnp.float32))
    np.testing.assert_allclose(trace.limit, limit, rtol=1e-6)
    np.testing.assert_allclose(trace.kept, kept, rtol=1e-6)
    np.testing.assert_array_equal(trace.clipped, np.less(kept, norms))


def test_the_norms_are_calm_but_for_four_events():
    norms, calm = limits.norms(jax.random.key(3), 200)
    expected = np.ones(200)
    expected[60], expected[90:95], expected[120], expected[140:] = 50, 10, NAN, 3
    np.testing.assert_allclose(norms / calm, expected, rtol=1e-6)
    logarithm = np.log(calm)
    assert abs(logarithm.mean()) < 0.05
    assert logarithm[:100].mean() - logarithm[100:].mean() == pytest.approx(
        0.25, abs=0.1
    )


CONFIG = dataclasses.replace(limits.SMOKE, clip=("quantile_clip",), updates=100)


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path, Progress())


def test_a_seed_decides_everything(journal):
    def run(seed):
        rows, curves = limits.run(dataclasses.replace(CONFIG, seed=seed), journal)
        return [{**row, "seconds": 0} for row in rows], curves

    rows, curves = run(1)
    same_rows, same_curves = run(1)
    np.testing.assert_equal(same_rows, rows)
    np.testing.assert_equal(same_curves, curves)
    assert (run(2)[1]["norm"] != curves["norm"]).any()


def trace(limit, kept, clipped=False):
    """A limit of 2 without the events; with them, what is given by name of event."""
    when = limits.events(100)
    found = {"limit": np.full((2, 100), 2.0), "kept": np.ones((2, 100))}
    for name, value in limit.items():
        found["limit"][0, getattr(when, name)] = value
    found["kept"][0, when.spike] = kept
    return limits.Trace(**found, clipped=np.full((2, 100), clipped))


def test_what_happens_to_a_limit_is_counted_in_updates():
    norms = np.full(100, 0.5)
    still = limits._metrics(norms, trace({}, kept=3.0))
    assert still == {
        "clipped": 0.0,
        "spike_kept": 6.0,
        "back_spike": 0.0,
        "back_burst": 0.0,
        "follows": pytest.approx(NAN, nan_ok=True),
        "warmup": 0,
    }
    moving = trace({"rise": np.linspace(2, 6, 30)}, kept=3.0, clipped=True)
    moving.limit[0, 31:35] = 4.0
    moving.limit[0, 50:60] = INF
    found = limits._metrics(norms, moving)
    assert (found["clipped"], found["back_spike"], found["follows"]) == (1.0, 4.0, 15.0)
    assert math.isnan(found["back_burst"])
    assert found["warmup"] == 10
    moving.limit[0, 61:] = 4.0
    assert math.isnan(limits._metrics(norms, moving)["follows"])


@pytest.mark.parametrize("count", [1, 5])
def test_the_figure_has_a_panel_for_any_number_of_clips(count, tmp_path, journal):
    rows, curves = limits.run(dataclasses.replace(CONFIG, clip=("none",)), journal)
    about = {
        "config": dataclasses.asdict(CONFIG),
        **limits.STUDY.facts(CONFIG),
        "commit": None,
        "device": "1 x cpu",
        "versions": {"jax": jax.__version__},
    }
    several = {
        name: np.repeat(curve, count, axis=0) if curve.ndim > 1 else curve
        for name, curve in curves.items()
    }
    (path,) = limits.figures(Results(about, rows * count, several), tmp_path)
    assert path.stat().st_size > 10_000
