import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import explode

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("radius", "dtype", "steps"),
    [
        (1.1, "float32", 931),
        (2.81, "float32", 86),
        (2.0, "float32", 128),
        (0.5, "float32", 127),
        (0.9, "float32", 829),
        # Rounded to 1.1015625 and 0.8984375.
        (1.1, "bfloat16", 918),
        (0.9, "bfloat16", 816),
        (1.001, "bfloat16", NAN),
        (1.1, "float16", 117),
        (2.0, "float16", 16),
        (0.5, "float16", 15),
        (1.0, "float32", NAN),
    ],
)
def test_the_law_says_when_a_power_is_out_of_range(radius, dtype, steps):
    np.testing.assert_equal(explode.lost_by_law(radius, dtype), float(steps))


@pytest.mark.parametrize(
    ("norms", "dtype", "steps"),
    [
        ([1, 2, INF, INF], "float32", 2),
        ([1, NAN, 1, 1], "float32", 1),
        ([1, 1e-5, 0, 0], "float16", 1),
        ([1, 1e-5, 0, 0], "bfloat16", 2),
        ([1, 1e-30, 1e30], "float32", NAN),
    ],
)
def test_a_norm_is_lost_once_it_is_not_finite_or_not_normal(norms, dtype, steps):
    np.testing.assert_equal(explode.lost(np.array(norms), dtype), float(steps))


def test_the_slope_is_that_of_the_second_half_in_range():
    later = np.exp(0.3 * np.arange(20))
    transient = np.concatenate([[50.0] * 10, later[10:], [INF, 1.0, NAN]])
    assert explode.slope(transient, "float32") == pytest.approx(0.3)
    assert explode.slope(later[:3], "float32") == pytest.approx(0.3)
    assert math.isnan(explode.slope(np.array([1.0, INF, INF]), "float32"))


SLOPES = {
    "linear": lambda drive: np.ones_like(drive),
    "tanh": lambda drive: 1 - np.tanh(drive) ** 2,
    "sigmoid": lambda drive: np.exp(-drive) / (1 + np.exp(-drive)) ** 2,
}
VALUES = {
    "linear": lambda drive: drive,
    "tanh": np.tanh,
    "sigmoid": lambda drive: 1 / (1 + np.exp(-drive)),
}


@pytest.mark.parametrize("unit", SLOPES)
def test_a_gradient_goes_back_by_a_product_of_jacobians(unit):
    numbers = np.random.default_rng(1)
    kernel_HxH, v_H = numbers.normal(size=(4, 4)), numbers.normal(size=4)
    drive_TxH = numbers.normal(size=(6, 4))
    h_H, slopes = np.zeros(4), []
    for drive_H in drive_TxH:
        total_H = h_H @ kernel_HxH + drive_H
        h_H = VALUES[unit](total_H)
        slopes.append(SLOPES[unit](total_H))
    d_H, norms = v_H, [np.linalg.norm(v_H)]
    for slope_H in slopes[:0:-1]:
        d_H = (d_H * slope_H) @ kernel_HxH.T
        norms.append(np.linalg.norm(d_H))
    arrays = (jnp.float32(x) for x in (kernel_HxH, v_H, drive_TxH[:, None]))
    found = explode.norms_back(explode.UNITS[unit], *arrays)
    np.testing.assert_allclose(found, norms, rtol=1e-5)


STEPS = 1000
RADII = 0.9, 1.0, 1.1, 2.0, 2.81


@pytest.fixture(scope="module")
def drawn():
    draw = functools.partial(explode.draw, 16, STEPS)
    return jax.jit(jax.vmap(draw))(np.arange(2))


def test_kernels_have_spectral_radius_1_and_costs_norm_1(drawn):
    values = np.linalg.eigvals(np.asarray(drawn.kernel_KxHxH, float))
    np.testing.assert_allclose(np.abs(values).max(-1), 1, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(drawn.v_KxH, axis=-1), 1, rtol=1e-6)
    orthogonal_HxH = np.asarray(drawn.kernel_KxHxH[0, 1])
    np.testing.assert_allclose(orthogonal_HxH @ orthogonal_HxH.T, np.eye(16), atol=1e-6)
    assert ((drawn.kernel_KxHxH[:, 3] != 0).sum(-1) == 15).all()
    assert (drawn.kernel_KxHxH[0, 1:] != drawn.kernel_KxHxH[1, 1:]).any((1, 2)).all()
    assert drawn.drive_TxBxH.shape == (2, 1 + STEPS, 1, 16)


def all_norms(dtype, drawn):
    return np.asarray(explode._all_norms("linear", dtype, jnp.array(RADII), drawn))


def test_linear_chains_are_powers_of_the_radius(drawn):
    norms = all_norms("float32", drawn)
    assert norms.shape == (5, 2, 4, 1 + STEPS)
    for seed in range(2):
        ends = [explode.lost(each[seed, 0], "float32") for each in norms]
        np.testing.assert_equal(ends, [829, NAN, 931, 128, 86])
    powers = np.array([[[radius**k for k in range(80)]] * 2 for radius in RADII])
    np.testing.assert_allclose(norms[:, :, 0, :80], powers, rtol=1e-5)
    np.testing.assert_allclose(norms[:, :, 1, :80], powers, rtol=1e-4)
    for kernel in 2, 3:
        slopes = [explode.slope(each, "float32") for each in norms[2, :, kernel]]
        np.testing.assert_allclose(slopes, math.log(1.1), rtol=0.01)


@pytest.mark.parametrize(
    ("dtype", "lost"),
    # The factors are rounded: to 0.8984 and 1.1016 in bfloat16, 0.8999 and 1.0996.
    [("bfloat16", [816, NAN, 918, 128, 86]), ("float16", [93, NAN, 117, 16, 11])],
)
def test_numbers_of_fewer_bits_are_lost_as_soon_as_their_factor_says(
    dtype, lost, drawn
):
    norms = all_norms(dtype, drawn)
    ends = [explode.lost(each[0, 0], dtype) for each in norms]
    np.testing.assert_allclose(ends, lost, rtol=0.005, equal_nan=True)


def test_a_clip_leaves_its_threshold_of_whatever_is_finite():
    came = np.array(
        [[0.5, 1.0, 3.0, 1e30, INF], [0.0, 1e-30, 1e20, 2.0, NAN]], np.float32
    )
    kept = explode._fed("clip_by_global_norm:1.0", came)
    np.testing.assert_allclose(kept[:, :4], np.minimum(came, 1)[:, :4], rtol=1e-6)
    assert np.isnan(kept[:, 4]).all()
    np.testing.assert_array_equal(explode._fed("none", came), came)


def row(
    unit="linear", kernel=explode.ONE, radius=1.1, slope=0.0953, lost=931.0, **rest
):
    return {
        "unit": unit,
        "kernel": kernel,
        "dtype": "float32",
        "radius": radius,
        "slope": slope,
        "law": math.log(radius),
        "lost": lost,
        "lost_by_law": explode.lost_by_law(radius, "float32"),
        **rest,
    }


def test_the_verdict_says_how_many_chains_follow_the_law():
    rows = [
        row(),
        row(radius=1.0, slope=0.0, lost=NAN),
        row(kernel="sparse", slope=0.12531, lost=900.0),
        row(kernel="sparse", slope=NAN, lost=2.0),
    ]
    slopes, steps = explode.verdict(rows)
    assert slopes == (
        "linear units, float32: per step the logarithm of the norm changes by "
        "log(radius), within 0.02, in 2 of 3 chains; farthest off, by 0.03: sparse, "
        "radius 1.1; 1 of 4 left the range too early to fit"
    )
    assert steps == (
        "one number, float32: out of range after 931 steps at radius 1.1 (law: 931)"
    )


def test_without_a_slope_no_chain_is_said_to_follow_the_law():
    slopes, _ = explode.verdict([row(slope=NAN, lost=2.0)])
    assert slopes == "linear units, float32: 1 of 1 left the range too early to fit"


@pytest.mark.parametrize(
    ("slope", "found"),
    [
        (-0.2, "in 1 of 1 chains, and grows in none"),
        (0.05, "in 1 of 1 chains, and grows at radius 1.1"),
        (0.2, "in 0 of 1 chains, and grows at radius 1.1"),
    ],
)
def test_the_verdict_says_whether_saturation_tames(slope, found):
    (line,) = explode.verdict([row(unit="tanh", slope=slope)])
    assert line.startswith("tanh units: ")
    assert line.endswith(found)


def test_units_without_a_slope_are_compared_by_when_they_leave_the_range():
    sooner = [
        row(unit="tanh", slope=NAN, lost=2.0),
        row(unit="tanh", radius=1.0, slope=NAN, lost=2.0),
    ]
    later = row(unit="tanh", slope=NAN, lost=1000.0)
    said = "left the range too early to fit, 2 of them sooner than linear ones do by"
    (line,) = explode.verdict([*sooner, later])
    assert line == f"tanh units: 3 of 3 {said} the law"
    (line,) = explode.verdict([row(unit="tanh", slope=0.2), *sooner, later])
    assert "in 0 of 1 chains, and grows at radius 1.1; 3 of 4 left" in line


FED = {
    "arm": "clip_by_global_norm:1.0",
    "radius": 1.1,
    "came": 3e38,
    "kept": 1.0,
    "broken": 5,
    "broken_kept": 4,
    "zeroed": 2,
}


def test_the_verdict_hides_nothing_that_a_clip_does():
    harmless = {"came": 5.0, "kept": 0.9, "broken": 0, "broken_kept": 0, "zeroed": 1}
    (line,) = explode.verdict([FED, FED | harmless])
    assert line == (
        "clip_by_global_norm:1.0: of norms up to 3.0e+38 it leaves at most 1; of 5 "
        "that are not finite 4 stay so for all to see; 3 that are not 0 become 0"
    )


def test_the_table_has_the_law_below_the_chains():
    table = explode.table([row(), row(kernel="sparse", slope=-0.5, lost=NAN), FED])
    cells = [list(column.cells) for column in table.columns]
    assert cells[1] == ["one number", "sparse", "law", ""]
    assert cells[3] == ["+0.0953, 931", "-0.5000, -", "+0.0953, 931", "1, 4/5, 2"]


def test_the_table_has_the_median_of_the_slopes_that_could_be_fitted():
    known = [row(slope=slope) for slope in (0.25, NAN, 0.75)]
    table = explode.table([*known, row(kernel="sparse", slope=NAN, lost=2.0), FED])
    assert list(table.columns[3].cells)[:2] == ["+0.5000, 931", "-, 2"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"radius": ()}, "radius must be one or more different values"),
        (
            {"radius": (1.0, 6e-5)},
            "radius must be in the range of float16, 6.1e-05 to 65504, got "
            "radius=6e-05.",
        ),
        ({"radius": (NAN,)}, "got radius=nan."),
        ({"hidden": 1}, "hidden must be >= 2, got hidden=1."),
        ({"steps": 9}, "steps must be >= 10, got steps=9."),
        ({"seeds": 0}, "seeds must be >= 1, got seeds=0."),
        ({"clip": ("clp",)}, "clip 'clp' is not known"),
    ],
)
def test_impossible_values_are_refused(option, message):
    with pytest.raises(ValueError, match=r".") as refused:
        dataclasses.replace(explode.SMOKE, **option)
    assert message in str(refused.value)
