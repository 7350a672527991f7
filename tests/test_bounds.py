"""Bounds: what a clip takes as one, and what they give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import bounds, clip_by, scopes

pytestmark = pytest.mark.usefixtures("strict")
UPDATES = {
    "hidden": {"w": jnp.array([3.0, 4.0]), "b": jnp.array([5.0])},
    "output": jnp.array([6.0, 8.0]),
}


def norms_after(tx, params=None, updates=UPDATES):
    out, _ = tx.update(updates, tx.init(updates), params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): round(
            float(np.linalg.norm(np.asarray(leaf))), 4
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(out)
    }


def test_a_prefix_tree_of_numbers_schedules_and_bounds():
    limits = {
        "hidden": 1.0,
        "output": optax.constant_schedule(2.0),
    }
    want = {"hidden/w": 1.0, "hidden/b": 1.0, "output": 2.0}
    assert norms_after(optaxclip.clip_by_leaf_norm(limits)) == want
    limits = {
        "hidden": {"w": 1.0, "b": bounds.recorded(1.0)},
        "output": bounds.at_most(2.0, 9.0),
    }
    assert norms_after(optaxclip.clip_by_leaf_norm(limits)) == want
    assert (
        norms_after(
            optaxclip.clip_by_leaf_norm({"hidden": 1.0, "output": jnp.float32(2)})
        )
        == want
    )


def test_limits_by_label():
    labels = {"hidden": "h", "output": "o"}
    tx = optaxclip.clip_by_group_norm({"h": 5.0, "o": 1.0}, labels)
    out = norms_after(tx)
    assert out["output"] == 1.0
    np.testing.assert_allclose(
        np.hypot(out["hidden/w"], out["hidden/b"]), 5.0, rtol=1e-4
    )
    with pytest.raises(
        ValueError, match=r"max_norms has no value for o, got values for h"
    ):
        norms_after(optaxclip.clip_by_group_norm({"h": 5.0}, labels))
    with pytest.raises(
        ValueError, match=r"max_norms has a value for x, which does not"
    ):
        norms_after(
            optaxclip.clip_by_group_norm({"h": 5.0, "o": 1.0, "x": 2.0}, labels)
        )


def test_a_prefix_that_does_not_fit_names_the_place():
    with pytest.raises(
        ValueError, match=r"clip_by_leaf_norm: max_norm has no value for output"
    ):
        norms_after(optaxclip.clip_by_leaf_norm({"hidden": 1.0}))
    with pytest.raises(ValueError, match=r"clip_by_global_norm: max_norm"):
        norms_after(optaxclip.clip_by_global_norm({"hidden": 1.0, "output": 2.0}))
    with pytest.raises(ValueError, match=r"must be >= 0, got max_norm=-2.0"):
        optaxclip.clip_by_leaf_norm({"hidden": 1.0, "output": -2.0})


def test_a_limit_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"must be a scalar or fit the magnitudes"):
        norms_after(optaxclip.clip_by_leaf_norm(jnp.ones(3)))


def test_a_schedule_counts_steps_from_zero():
    tx = optaxclip.clip_by_global_norm(lambda step: 1.0 + step.astype(jnp.float32))
    u = jnp.array([30.0, 40.0])
    state = tx.init(u)
    for step in range(3):
        out, state = tx.update(u, state)
        np.testing.assert_allclose(np.linalg.norm(out), 1.0 + step, rtol=1e-6)
    assert int(state.step) == 3


def test_relative_is_a_share_of_the_parameters():
    params = {
        "hidden": {"w": jnp.array([0.0, 1.0]), "b": jnp.array([0.0])},
        "output": jnp.array([0.0, 2.0]),
    }
    tx = clip_by(scopes.leaf(), bounds.relative(0.5, floor=0.1))
    want = {"hidden/w": 0.5, "hidden/b": 0.05, "output": 1.0}
    assert norms_after(tx, params) == want


def test_relative_to_a_bound_of_the_ratio():
    ratio = bounds.recorded(optax.constant_schedule(0.5))
    tx = clip_by(scopes.tree(), bounds.relative(ratio))
    params = jnp.array([2.0])
    _, state = tx.update(jnp.array([6.0]), tx.init(params), params)
    (record,) = optaxclip.records(state)
    assert float(record.norm) == 3.0 and float(record.limit) == 0.5
    np.testing.assert_allclose(record.scale, 1 / 6, rtol=1e-6)


def test_at_most_and_at_least():
    u = jnp.array([3.0, 4.0])
    size = lambda bound: float(
        np.linalg.norm(clip_by(scopes.tree(), bound).update(u, None)[0])
    )
    np.testing.assert_allclose(size(bounds.at_most(1.0, 2.0, 3.0)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(size(bounds.at_least(1.0, 2.0)), 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match="at_most: values must not be empty"):
        bounds.at_most()


def test_states_of_combined_bounds_are_kept_apart():
    tx = optaxclip.clip_by_global_norm(
        bounds.at_most(
            bounds.recorded(9.0), lambda step: 10.0 - 9.0 * step.astype(jnp.float32)
        )
    )
    u = jnp.array([3.0, 4.0])
    state = tx.init(u)
    for want in (5.0, 1.0):
        out, state = jax.jit(tx.update)(u, state)
        np.testing.assert_allclose(np.linalg.norm(out), want, rtol=1e-6)
    (record,) = optaxclip.records(state)
    # It learns what all of them together kept.
    assert int(record.clipped_steps) == 1
    np.testing.assert_allclose(record.scale, 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    "params, message",
    [
        (None, r"adaptive_grad_clip: needs params, got None\. Call tx\.update"),
        ({"hidden": UPDATES["hidden"]}, r"got no param at output"),
        (
            {**UPDATES, "output": jnp.ones(3)},
            r"got \(3,\) for an update of shape \(2,\) at output",
        ),
        (
            {**UPDATES, "output": None},
            r"got NoneType for an update of shape \(2,\) at output",
        ),
        (
            {**UPDATES, "output": {"kernel": jnp.ones(2)}},
            r"got dict for an update of shape \(2,\) at output",
        ),
    ],
)
def test_params_that_do_not_fit_are_refused(params, message):
    tx = optaxclip.adaptive_grad_clip(0.01)
    with pytest.raises(ValueError, match=message):
        tx.update(UPDATES, tx.init(UPDATES), params)


def test_a_missing_gradient_is_no_error():
    updates = {**UPDATES, "output": None}
    tx = optaxclip.adaptive_grad_clip(0.01)
    out, _ = tx.update(updates, tx.init(UPDATES), UPDATES)
    assert out["output"] is None


def outputs(tx, values, params=None):
    """What comes out for updates of one number each, and the last state."""
    state = tx.init(jnp.zeros(1))
    update = jax.jit(tx.update)
    found = []
    for value in values:
        out, state = update(jnp.array([value], jnp.float32), state, params)
        found.append(float(out[0]))
    return found, state


def test_a_parameter_that_is_nan_leaves_no_trace_in_a_learned_ratio():
    rule = bounds.relative(bounds.tracked_quantile(0.9, initial=0.01))
    tx = optaxclip.clip_by_leaf_norm(rule)
    params = jnp.array([jnp.nan])
    found, state = outputs(tx, [500.0], params)
    assert np.isnan(found).all()
    (estimate,) = state.estimate
    assert float(estimate) == float(jnp.float32(0.01))


def test_a_parameter_of_zero_sets_no_limit_and_teaches_nothing_without_a_floor():
    rule = bounds.relative(bounds.ema(2.0), None)
    tx = optaxclip.clip_by_leaf_norm(rule)
    found, state = outputs(tx, [500.0], jnp.zeros(1))
    (count,) = state.count
    assert found == [500.0] and int(count) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda x: optaxclip.clip_by_global_norm(bounds.mean_std(x, warmup=2)),
        lambda x: optaxclip.clip_by_global_norm(bounds.deviation(x, warmup=2)),
        lambda x: optaxclip.clip_by_global_norm(bounds.median_mad(x, warmup=1)),
        lambda x: optaxclip.zclip(eps=x, warmup=2),
        lambda x: optaxclip.adagn(eps=x),
        lambda x: optaxclip.ema_clip(x),
        lambda x: optaxclip.norm_growth_clip(x),
        lambda x: optaxclip.spam_clip(x, warmup=1),
        lambda x: optaxclip.quantile_clip(rate=x),
        lambda x: optaxclip.acclip(decay=x),
        lambda x: optaxclip.adopt_clip(x),
        lambda x: optaxclip.clippy(x),
        lambda x: optaxclip.autoclip(x),
    ],
)
def test_a_traced_argument_below_its_range_never_turns_an_update_round(make):
    def run(x):
        tx = make(x)
        state = tx.init(jnp.zeros(1))
        found = []
        for value in (1.0, 3.0, 2.0, 200.0, 2.0):
            out, state = tx.update(jnp.array([value]), state, jnp.ones(1))
            found.append(out)
        return jnp.stack(found)

    found = np.asarray(jax.jit(run)(jnp.float32(-2.0)))
    assert np.isfinite(found).all() and (found >= 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda decay: optaxclip.adaclip(decay),
        lambda decay: optaxclip.adagn(decay, rms_decay=decay),
    ],
)
def test_a_decay_that_was_rounded_to_1_is_moved_below_it(make):
    run = jax.jit(lambda decay: outputs_of(make(decay), (1.0, 1.0, 50.0)))
    assert np.isfinite(np.asarray(run(jnp.float32(1)))).all()


def outputs_of(tx, values):
    state = tx.init(jnp.zeros(1))
    found = []
    for value in values:
        out, state = tx.update(jnp.array([value]), state)
        found.append(out)
    return jnp.stack(found)


def test_inf_as_a_multiple_means_no_limit():
    for rule in (
        bounds.median_mad(jnp.inf, warmup=2),
        bounds.mean_std(jnp.inf, warmup=2),
        bounds.mean(jnp.inf),
        bounds.ema(jnp.inf),
        bounds.growth(jnp.inf),
    ):
        values = [2.0, 2.0, 2.0, 700.0]
        assert outputs(optaxclip.clip_by_global_norm(rule), values)[0] == values


def test_a_zscore_up_to_its_limit_grows_even_from_no_deviation_at_all():
    tx = optaxclip.zclip(beyond="limit", max_norm=jnp.inf)
    found, _ = outputs(tx, [1.0] * 30 + [3.0] * 400)
    assert found[30] < 1.01 and found[-1] == 3.0


@pytest.mark.parametrize("smallest", [1e-45, 1e-38])
def test_a_number_that_a_kernel_flushes_to_zero_poisons_nothing(smallest):
    for tx in (optaxclip.acclip(), optaxclip.ema_clip(2.0), optaxclip.spam_clip()):
        found, state = outputs(tx, [smallest, 1.0, 1.0])
        assert np.isfinite(found).all() and found[-1] > 0
        for leaf in jax.tree.leaves(state):
            assert np.isfinite(np.asarray(leaf)).all()


def test_counters_at_their_end_do_no_harm():
    tx = optaxclip.adopt_clip()
    state = tx.init(jnp.zeros(1))
    last = state._replace(step=jnp.int32(2**31 - 1))
    out, _ = tx.update(jnp.array([1e9]), last)
    np.testing.assert_allclose(out, [(2.0**31) ** 0.25], rtol=1e-6)
    for rule in (bounds.mean(2.0), bounds.streaming_quantile(), bounds.mean_over_rms()):
        tx = optaxclip.clip_by_global_norm(rule)
        _, state = outputs(tx, [1.0] * 8)
        state = state._replace(count=jnp.int32(2**31 - 1))
        for _ in range(3):
            out, state = jax.jit(tx.update)(jnp.ones(1), state)
        assert int(state.count) == 2**31 - 1 and float(out[0]) > 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: optaxclip.clip_by_global_norm(optaxclip.zclip()), "Pass its bound"),
        (lambda: norms_after(clip_by(scopes.leaf(), bounds.ema)), "returns a Bound"),
        (lambda: clip_by(scopes.tree, 1.0), "Call the scope"),
        (lambda: clip_by(scopes.tree(), 1.0, "hard"), "Call the scope"),
        (lambda: optaxclip.autoclip(np.array([1.0, 2.0])), "a single real number"),
        (lambda: bounds.ema(start="zero"), "start must be one of"),
        (lambda: bounds.percentile(observe="kept"), "observe must be one of"),
        (lambda: optaxclip.zclip(warmup=2**40), "below 2\\^31"),
        (lambda: scopes.peak("yes"), "rescale must be True or False"),
    ],
)
def test_what_is_mistaken_for_a_bound_a_scope_or_a_number_is_refused(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        wrong()


@pytest.mark.parametrize(
    "tx, other",
    [
        (optaxclip.autoclip(window=5), optaxclip.autoclip(window=7)),
        (optaxclip.autoclip(), optaxclip.clip_by_global_norm(1.0)),
        (optaxclip.zclip(), optaxclip.adagc()),
        (optaxclip.acclip(), optaxclip.acclip()),
    ],
)
def test_the_state_of_something_else_is_refused(tx, other):
    params = {"a": jnp.ones(2)}
    if tx.update.__module__ == "optaxclip.beyond":
        params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"(state|updates) must"):
        tx.update({"a": jnp.ones(2)}, other.init(params))


def test_stable_adam_passes_on_what_adam_makes_of_every_leaf():
    tx = optaxclip.scale_by_stable_adam()
    updates = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(3), "none": None}
    with jax.numpy_dtype_promotion("standard"):
        out, _ = tx.update(updates, tx.init(updates))
    assert out["w"].dtype == jnp.bfloat16 and out["none"] is None
    assert out["n"].shape == (3,)
