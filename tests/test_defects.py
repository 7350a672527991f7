"""What goes wrong elsewhere, silently, and must not here.

The numbers are those of the table of defects of optax 0.2.8; each test also shows that
the input is one on which the plain rule fails, by measuring in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import norm

import optaxclip

pytestmark = pytest.mark.usefixtures("strict")


def clipped_norm(tx, leaves):
    out, _ = jax.jit(tx.update)(leaves, tx.init(leaves))
    return norm([np.asarray(leaf).astype(np.float64) for leaf in out])


def test_many_bf16_leaves_are_clipped_to_the_bound():
    rng = np.random.default_rng(0)
    # A sum of their squares in bfloat16 stops growing at 256.
    leaves = [jnp.asarray(rng.normal(size=100), jnp.bfloat16) for _ in range(500)]
    assert norm([np.asarray(x, np.float64) for x in leaves]) > 200
    got = clipped_norm(optaxclip.clip_by_global_norm(1.0), leaves)
    np.testing.assert_allclose(got, 1.0, rtol=1e-3)


def test_fp16_does_not_overflow_into_zeros():
    got = clipped_norm(optaxclip.clip_by_global_norm(1.0), [jnp.float16([300, 1])])
    np.testing.assert_allclose(got, 1.0, rtol=1e-3)
    many = [jnp.full(10, 100.0, jnp.float16) for _ in range(100)]
    got = clipped_norm(optaxclip.clip_by_global_norm(1.0), many)
    np.testing.assert_allclose(got, 1.0, rtol=1e-3)
    params = jnp.float16([300, 400])
    tx = optaxclip.adaptive_grad_clip(0.01)
    out, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(out, [3.0, 4.0], rtol=1e-3)


@pytest.mark.parametrize(
    "values, bound",
    [([1e20, 1.0], 1.0), ([1e19] * 4, 1.0), ([1e-19] * 4, 1e-19), ([1e-23], 1e-24)],
)
def test_float32_neither_overflows_nor_underflows(values, bound):
    x = jnp.array(values, jnp.float32)
    for tx in (
        optaxclip.clip_by_global_norm(bound),
        optaxclip.clip_by_leaf_norm(bound),
        optaxclip.clip_by_unit_norm(bound),
    ):
        np.testing.assert_allclose(clipped_norm(tx, [x]), bound, rtol=1e-6)


def test_a_float32_array_as_limit_of_bf16_updates():
    x = jnp.ones(4, jnp.bfloat16)
    for make in (
        optaxclip.clip,
        optaxclip.clip_by_global_norm,
        optaxclip.clip_by_block_rms,
        optaxclip.adaptive_grad_clip,
    ):
        tx = make(jnp.float32(0.5))
        out, _ = tx.update(x, tx.init(x), x)
        assert out.dtype == jnp.bfloat16
        assert float(out[0]) <= 0.5


def test_threshold_zero_on_zeros_is_zero():
    zeros = jnp.zeros(3)
    for make in (optaxclip.clip_by_global_norm, optaxclip.clip_by_block_rms):
        out, _ = make(0.0).update(zeros, None)
        np.testing.assert_array_equal(out, zeros)


def test_one_inf_does_not_zero_the_others():
    updates = {"w": jnp.array([jnp.inf, 4.0]), "b": jnp.array([1.0, 2.0])}
    out, _ = optaxclip.clip_by_global_norm(1.0).update(updates, None)
    assert all(np.isnan(np.asarray(leaf)).all() for leaf in jax.tree.leaves(out))
    out, _ = optaxclip.clip_by_leaf_norm(9.0).update(updates, None)
    assert np.isnan(np.asarray(out["w"])).all()
    np.testing.assert_array_equal(out["b"], updates["b"])


@pytest.mark.parametrize(
    "make",
    [
        optaxclip.clip_by_global_norm,
        optaxclip.clip_by_block_rms,
        optaxclip.adaptive_grad_clip,
    ],
)
def test_derivatives_at_a_zero_gradient(make):
    params = jnp.ones((2, 2))
    for u in (jnp.zeros((2, 2)), jnp.array([[0.0, 3.0], [0.0, 4.0]])):
        tx = make(0.5)
        _, pull = jax.vjp(lambda u, p, tx=tx: tx.update(u, None, p)[0], u, params)
        for leaf in pull(jnp.ones((2, 2))):
            assert np.isfinite(np.asarray(leaf)).all()


def test_no_temporary_of_the_size_of_the_gradients():
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-3))
    params = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * 2
    state = jax.eval_shape(tx.init, params)

    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(step, donate_argnums=(1, 2)).lower(params, params, state)
    temp = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temp < 0.01 * 2 * 4 * 1024**2


def test_scalars_integers_float0_and_keys_pass():
    updates = {
        "number": 5.0,
        "ints": jnp.arange(3),
        "float0": np.zeros(2, jax.dtypes.float0),
        "key": jax.random.key(0),
    }
    for make in (
        optaxclip.clip,
        optaxclip.clip_by_global_norm,
        optaxclip.clip_by_block_rms,
    ):
        out, _ = make(1.0).update(updates, None)
        assert float(out["number"]) == 1.0
        for name in ("ints", "float0", "key"):
            assert out[name] is updates[name]


def test_a_donated_state_is_never_the_same_buffer_twice():
    tx = optaxclip.clip_by_global_norm(
        optaxclip.bounds.at_most(
            optaxclip.recorded(1.0), optaxclip.recorded(lambda step: 2.0)
        )
    )
    u = jnp.array([3.0, 4.0])
    update = jax.jit(tx.update, donate_argnums=(1,))
    for _ in range(2):
        state = tx.init(u)
        for _ in range(2):
            _, state = update(u, state)


@pytest.mark.parametrize("ratio", [1e-20, 1e-30, 1e-36, 1e-37])
def test_a_tiny_factor_still_keeps_the_bound(ratio):
    x = jnp.array([0.6e30, 0.8e30])
    limit = float(np.float32(1e30 * ratio))
    for make in (optaxclip.clip_by_global_norm, optaxclip.clip_by_leaf_norm):
        np.testing.assert_allclose(clipped_norm(make(limit), [x]), limit, rtol=1e-6)


def test_an_infinite_limit_passes_derivatives_through_every_shape():
    u = jnp.array([3.0, 4.0])
    for name in ("hard", "rational", "sqrt", "tanh", "drop", "reciprocal"):
        shape = getattr(optaxclip.shapes, name)
        for scope in (optaxclip.scopes.tree(), optaxclip.scopes.element()):
            run = lambda u, c, scope=scope, shape=shape: (
                optaxclip.clip_by(scope, c, shape).update(u, None)[0].sum()
            )
            du, dc = jax.grad(run, (0, 1))(u, jnp.float32(jnp.inf))
            np.testing.assert_array_equal(du, [1, 1])
            assert float(dc) == 0


def test_a_leaf_at_the_end_of_float32_is_clipped():
    tx = optaxclip.clip_by_leaf_norm(1e38)
    out, _ = tx.update(jnp.array([3.4028e38, 0.0]), None)
    np.testing.assert_allclose(out, [1e38, 0.0], rtol=1e-6)


def test_states_keep_their_dtypes_in_mixed_precision():
    with jax.enable_x64(True):
        wide, narrow = jnp.ones((3, 2)), jnp.ones((3, 2), jnp.float32)
        recorded = optaxclip.recorded
        agc = optaxclip.adaptive_grad_clip(recorded(0.1))
        for tx, updates, params, extra in (
            (optaxclip.clip_by_global_norm(recorded(1.0)), narrow, None, {"norm": 5.0}),
            (optaxclip.clip_by_global_norm(recorded(1.0)), wide, None, {"norm": 5.0}),
            (agc, narrow, wide, {}),
            (agc, wide, narrow, {}),
        ):
            state = tx.init(updates if params is None else params)
            _, after = tx.update(updates, state, params, **extra)
            for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
                assert a.dtype == b.dtype


def test_messages_of_rare_mistakes():
    u = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"min_value must be <= 0, got"):
        optaxclip.clip_by_value(np.array(1.0), 2.0)
    with pytest.raises(TypeError, match="labels must be all strings or all ints"):
        optaxclip.clip_by_group_norm(1.0, {"a": "x", "b": 3}).init(u)
    with pytest.raises(ValueError, match="needs its state, got None"):
        optaxclip.clip_by_global_norm(lambda step: 1.0).update(u, None)
    with pytest.raises(TypeError, match=r"max_norm must be a real number, got .*={}"):
        optaxclip.clip_by_leaf_norm({})
    part, _ = optaxclip.clip_by_leaf_norm({"a": None, "b": 1.0}).update(
        {"a": None, "b": jnp.array([3.0, 4.0])}, None
    )
    np.testing.assert_allclose(part["b"], [0.6, 0.8], rtol=1e-6)
