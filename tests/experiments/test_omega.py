import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import omega
from experiments.models import Recurrent
from experiments.tasks import Batch, Score

T, B, F, H, C = 6, 5, 2, 4, 3


@flax.struct.dataclass
class Weighted:
    """The mean over the batch of a weighted squared error."""

    weight_B: jax.Array

    def score(self, y, target):
        square = (y - target) ** 2
        loss_B = jnp.sum(square, range(1, square.ndim))
        return Score(jnp.mean(self.weight_B * loss_B), jnp.max(square))


# The derivatives of the second and third example have a norm below 1e-10.
WEIGHTS = np.array([1.0, 0.0, 1e-13, 1e-3, 2.0])


def example(at, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(B, C) if at is not None else (B, T, C))
    return Batch(rng.normal(size=(B, T, F)), at, target)


def parameters(seed=1):
    rng = np.random.default_rng(seed)
    layer = {"kernel": rng.normal(size=(F, H)), "bias": rng.normal(size=H)}
    readout = {"kernel": rng.normal(size=(H, C)), "bias": rng.normal(size=C)}
    recurrence = {"input": layer, "recurrent": rng.normal(size=(H, H))}
    return {"params": {"recurrence": recurrence, "readout": readout}}


def backpropagated(params, batch, weights, act, slope):
    """Returns states and total derivatives, (T, B, H), step by step."""
    layers = params["params"]
    kernel, layer = layers["recurrence"]["recurrent"], layers["recurrence"]["input"]
    readout = layers["readout"]
    h = np.zeros((T + 1, B, H))
    for t in range(T):
        u = batch.x_BxTxF[:, t] @ layer["kernel"] + layer["bias"]
        h[t + 1] = act(h[t] @ kernel + u)
    h = h[1:]
    d = np.zeros((T, B, H))
    for b in range(B):
        for t in reversed(range(T)):
            if batch.at is None or batch.at == t:
                y = h[t, b] @ readout["kernel"] + readout["bias"]
                target = batch.target[b, t] if batch.at is None else batch.target[b]
                d[t, b] += readout["kernel"] @ (2 * weights[b] * (y - target) / B)
            if t + 1 < T:
                d[t, b] += kernel @ (slope(h[t + 1, b]) * d[t + 1, b])
    return h, d


def omega_of(kernel, h, d, slope):
    """Returns Omega, entry by entry."""
    total, share = 0.0, 0.0
    for t in range(T):
        terms, counts = [], []
        for b in range(B):
            square = np.sum(d[t, b] ** 2)
            counts.append(square >= 1e-20)
            back = (d[t, b] * slope(h[t, b])) @ kernel.T
            terms.append((np.sum(back**2) / square - 1) ** 2 if counts[-1] else 0.0)
        total += np.mean(terms)
        share += np.mean(counts)
    return total / share, share


def pull_of(kernel, h, d, slope, by=1e-6):
    """Returns dOmega/dW by central differences, with h and d held constant."""
    pull = np.zeros_like(kernel)
    for place in np.ndindex(*kernel.shape):
        step = np.zeros_like(kernel)
        step[place] = by
        up, down = (omega_of(kernel + s, h, d, slope)[0] for s in (step, -step))
        pull[place] = (up - down) / (2 * by)
    return pull


UNITS = {
    "flax": (np.tanh, lambda h: 1 - h**2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda h: h * (1 - h)),
}


@pytest.mark.parametrize("initial, at", [("flax", 3), ("flax", None), ("sigmoid", 5)])
def test_the_gradient_is_that_of_the_loss_and_alpha_times_that_of_omega(initial, at):
    model, params, batch = Recurrent("rnn", H, C, initial), parameters(), example(at)
    act, slope = UNITS[initial]
    h, d = backpropagated(params, batch, WEIGHTS, act, slope)
    kernel = params["params"]["recurrence"]["recurrent"]
    expected, share = omega_of(kernel, h, d, slope)
    # Some entries count and some do not.
    assert 0 < share < (T if at is None else at + 1)
    with jax.enable_x64(True):
        task = Weighted(jnp.asarray(WEIGHTS))
        one = functools.partial(omega.gradient, model=model, task=task)
        held = [jnp.asarray(array) for array in (kernel, d, slope(h))]

        @jax.jit
        def compute(params, batch, alphas):
            plain = one(params, batch=batch, alpha=0)
            of_alpha = jax.vmap(lambda alpha: one(params, batch=batch, alpha=alpha))
            return plain, of_alpha(alphas), omega.omega(*held)

        found = compute(params, batch, jnp.array([0.0, 2.0]))
        plain, found, value = jax.device_get(found)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert len(set(found[0].loss.tolist())) == 1
    np.testing.assert_allclose(found[0].loss[0], plain[0].loss, rtol=1e-12)
    pull = pull_of(kernel, h, d, slope)
    for (path, without), of_alpha in zip(
        jax.tree.leaves_with_path(plain[1]), jax.tree.leaves(found[1])
    ):
        np.testing.assert_allclose(of_alpha[0], without, rtol=1e-9, atol=1e-12)
        if "recurrent" in jax.tree_util.keystr(path):
            without = without + 2 * pull
        np.testing.assert_allclose(of_alpha[1], without, rtol=1e-6, atol=1e-7)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x_BxTxF, at):
        return nn.Dense(C)(x_BxTxF[:, at])


def test_without_omega_it_is_the_gradient_of_the_loss_of_any_model():
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), example(None))
    batch, task = batch._replace(at=3, target=batch.target[:, 0]), Weighted(jnp.ones(B))
    params = Linear().init(jax.random.key(0), batch.x_BxTxF, 3)
    score, grads = omega.gradient(params, Linear(), task, batch, 0.0)

    def loss(params):
        y = Linear().apply(params, batch.x_BxTxF, 3)
        return jnp.sum((y - batch.target) ** 2) / B

    value, expected = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(score.loss, value, rtol=1e-6)
    for leaf, other in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


def single(size):
    """Derivatives of some size and slopes, in float32."""
    rng = np.random.default_rng(0)
    d = rng.normal(size=(T, B, H))
    slope = rng.uniform(0.1, 1, size=(T, B, H))
    kernel = rng.normal(size=(H, H))
    return [jnp.asarray(array, jnp.float32) for array in (kernel, size * d, slope)]


def test_omega_does_not_depend_on_the_size_of_the_loss():
    program = jax.jit(jax.value_and_grad(omega.omega))
    value, pull = program(*single(1.0))
    assert np.isfinite(value) and value > 0
    # Squares of the first would overflow.
    for size in (1e30, 1e-8):
        other_value, other_pull = program(*single(size))
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        np.testing.assert_allclose(other_pull, pull, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-30])
def test_what_has_vanished_has_no_omega(size):
    value, pull = jax.jit(jax.value_and_grad(omega.omega))(*single(size))
    assert value == 0
    np.testing.assert_array_equal(pull, np.zeros((H, H)))


def test_omega_is_0_where_lengths_stay():
    kernel, d, _ = single(1.0)
    orthogonal = jnp.linalg.qr(kernel)[0]
    ones = jnp.ones_like(d)
    assert omega.omega(orthogonal, d, ones) < 1e-10
    # Ratios of squares: (2^2 - 1)^2.
    np.testing.assert_allclose(omega.omega(2 * orthogonal, d, ones), 9, rtol=1e-5)


@pytest.mark.parametrize("alpha", [2.0, jnp.float32(2)])
def test_gated_units_are_refused(alpha):
    with pytest.raises(ValueError, match=r"^cell must be rnn .*, got cell=gru\.$"):
        omega.gradient({}, Recurrent("gru", H, C), None, example(None), alpha)
