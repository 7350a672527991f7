import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models import Recurrent

RUNS, T, B, F, H, C = 3, 6, 4, 2, 5, 3
ACTIVATIONS = {"tanh": models.TANH, "sigmoid": models.SIGMOID}


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def plainly(activation, kernel, drive, nudge):
    """The recurrence as JAX would differentiate it."""

    def advance(h, now):
        h = activation.value(h @ kernel + now[0]) + now[1]
        return h, h

    return jax.lax.scan(advance, jnp.zeros_like(drive[0]), (drive, nudge))[1]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_recurrence_has_the_values_of_its_formula(name):
    act = {"tanh": np.tanh, "sigmoid": lambda z: 1 / (1 + np.exp(-z))}[name]
    kernel, drive, nudge = normal(H, H), normal(T, B, H, seed=1), normal(T, B, H)
    h, nudged, expected, expected_nudged = np.zeros((B, H)), np.zeros((B, H)), [], []
    for t in range(T):
        h = act(h @ kernel + drive[t])
        nudged = act(nudged @ kernel + drive[t]) + nudge[t]
        expected.append(h)
        expected_nudged.append(nudged)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(array) for array in (kernel, drive, nudge)]
        got = jnp.asarray(models.recur(ACTIVATIONS[name], *arrays[:2]))
        got_nudged = jnp.asarray(models.recur(ACTIVATIONS[name], *arrays))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(got_nudged, expected_nudged, rtol=1e-12)


@pytest.mark.parametrize("nudged", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_recurrence_has_the_gradients_of_autodiff(name, nudged):
    activation = ACTIVATIONS[name]
    with jax.enable_x64(True):
        kernel = jnp.asarray(normal(RUNS, H, H))
        drive, nudge, weight = jnp.asarray(normal(3, RUNS, T, B, H, seed=1))
        nudge = nudge * nudged

        def cost(recurrence):
            def of(kernel, drive, nudge, weight):
                h = recurrence(activation, kernel, drive, nudge)
                return jnp.sum(weight * h * h)

            return jax.value_and_grad(of, (0, 1, 2))

        def without_nudge(activation, kernel, drive, nudge):
            return models.recur(activation, kernel, drive)

        @jax.jit
        def both(*arrays):
            got = cost(models.recur if nudged else without_nudge)
            alone = got(*(array[1] for array in arrays))
            return jax.vmap(cost(plainly))(*arrays), jax.vmap(got)(*arrays), alone

        expected, mapped, alone = both(kernel, drive, nudge, weight)
    # Without a nudge there is no gradient of one.
    count = 3 if nudged else 2
    for got, want in (
        (mapped, expected),
        (alone, jax.tree.map(lambda leaf: leaf[1], expected)),
    ):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-11)
        for got_leaf, leaf in zip(got[1][:count], want[1][:count]):
            np.testing.assert_allclose(got_leaf, leaf, rtol=1e-9, atol=1e-11)


def test_a_plain_network_is_that_of_flax():
    model = Recurrent("rnn", H, C)
    x = jnp.asarray(normal(B, T, F), jnp.float32)

    @jax.jit
    def both():
        params = model.init(jax.random.key(0), x)
        own = params["params"]["recurrence"]
        theirs = {"i": own["input"], "h": {"kernel": own["recurrent"]}}
        rnn = nn.RNN(nn.SimpleCell(H), time_major=True)
        h = rnn.apply({"params": {"cell": theirs}}, jnp.swapaxes(x, 0, 1))
        return model.apply(params, x, method="states"), h

    np.testing.assert_allclose(*both(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module", params=models.CELLS)
def network(request):
    model = Recurrent(request.param, H, C)
    x = jnp.asarray(normal(B, T, F), jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(0), x), x


def test_answering_at_a_step_is_answering_at_every_step_and_picking(network):
    model, params, x = network

    @jax.jit
    def both(params):
        answer = jax.vmap(lambda at: model.apply(params, x, at), out_axes=1)
        return model.apply(params, x), answer(jnp.arange(T))

    every, picked = both(params)
    chex.assert_shape(every, (B, T, C))
    chex.assert_type([every, *jax.tree.leaves(params)], jnp.float32)
    np.testing.assert_allclose(picked, every, rtol=1e-5, atol=1e-6)


def test_an_answer_depends_on_what_came_before_only(network):
    model, params, x = network
    later = x.at[:, 4:].add(1.0)
    before, after = jax.jit(jax.vmap(model.apply, (None, 0)))(
        params, jnp.stack([x, later])
    )
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).all()


def test_the_recurrent_kernel_is_known_of_plain_networks_only(network):
    model, params, _ = network
    kernel = models.recurrent_kernel(params)
    if model.cell == "rnn":
        assert kernel is params["params"]["recurrence"]["recurrent"]
    else:
        assert kernel is None
    assert models.recurrent_kernel({"params": {"Dense_0": {}}}) is None


WIDE = 60


@pytest.fixture(scope="module")
def initial():
    """Parameters by initialisation, in float64."""

    def start(name):
        model = Recurrent("rnn", WIDE, WIDE, name)
        return model.init(jax.random.key(1), jnp.ones((1, 1, WIDE)))

    starts = jax.jit(lambda: {name: start(name) for name in models.INITS})()
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), starts)


@pytest.mark.parametrize("name", models.INITS)
def test_biases_start_at_0(initial, name):
    params = initial[name]["params"]
    for layer in (params["recurrence"]["input"], params["readout"]):
        np.testing.assert_array_equal(layer["bias"], np.zeros(WIDE))


def assert_std(kernel, std):
    # Five standard errors of a mean and of a standard deviation.
    n = kernel.size
    assert abs(kernel.mean()) < 5 * std / np.sqrt(n)
    assert abs(kernel.std() / std - 1) < 5 / np.sqrt(2 * n)


@pytest.mark.parametrize(
    "name, std",
    [
        ("flax", 1 / np.sqrt(WIDE)),
        ("basic_tanh", 0.1),
        ("smart_tanh", 0.01),
        ("sigmoid", 0.01),
    ],
)
def test_kernels_start_with_their_standard_deviation(initial, name, std):
    params = initial[name]["params"]
    kernels = [params["recurrence"]["input"]["kernel"], params["readout"]["kernel"]]
    if name in ("basic_tanh", "sigmoid"):
        kernels.append(params["recurrence"]["recurrent"])
    for kernel in kernels:
        assert_std(kernel, std)


def test_the_recurrent_kernel_of_flax_starts_orthogonal(initial):
    kernel = initial["flax"]["params"]["recurrence"]["recurrent"]
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(WIDE), atol=1e-5)


def radius(kernel):
    return np.abs(np.linalg.eigvals(np.asarray(kernel, np.float64))).max()


def test_the_recurrent_kernel_of_smart_tanh_is_sparse_and_has_its_radius(initial):
    kernel = initial["smart_tanh"]["params"]["recurrence"]["recurrent"]
    places = kernel != 0
    np.testing.assert_array_equal(places.sum(1), 15)
    # Each row has places of its own.
    assert len(set(map(tuple, places))) == WIDE
    assert abs(radius(kernel) - 0.95) < 1e-5
    few = jax.jit(models.smart_tanh, static_argnums=1)(jax.random.key(0), (10, 10))
    assert (few != 0).all()
    assert abs(radius(few) - 0.95) < 1e-5


@pytest.mark.parametrize("name", models.INITS)
def test_the_units_are_those_of_the_initialisation(name):
    value = Recurrent("rnn", H, C, name).activation.value(jnp.ones(()))
    np.testing.assert_allclose(
        value, {"sigmoid": 0.7310586}.get(name, 0.7615942), rtol=1e-6
    )


TURN = np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])


# Kernels and their spectral radii; None: by their eigenvalues.
KERNELS = {
    "random": (normal(50, 50, scale=0.1), None),
    "complex pair": (0.9 * TURN, 0.9),
    "complex pair, not normal": (np.array([[0.0, -4.0], [1.0, 0.0]]), 2.0),
    "opposite pair": (np.diag([1.25, -1.25]), 1.25),
    "far from normal": (np.array([[0.5, 1e3, 0], [0, -0.4, 1e3], [0, 0, 0.3]]), 0.5),
    "without eigenbasis": (np.array([[0.9, 1.0], [0.0, 0.9]]), 0.9),
    "one unit": (np.array([[-3.0]]), 3.0),
    "large": (1e30 * TURN, 1e30),
    "small": (1e-30 * TURN, 1e-30),
    "zero": (np.zeros((2, 2)), 0.0),
    "nilpotent": (np.triu(np.ones((9, 9)), 1), 0.0),
    "NaN": (np.array([[np.nan, 0.0], [0.0, 1.0]]), np.nan),
    "inf": (np.array([[np.inf, 0.0], [0.0, 1.0]]), np.nan),
}


@pytest.mark.parametrize("name", KERNELS)
def test_spectral_radius(name):
    kernel, expected = KERNELS[name]
    expected = radius(kernel) if expected is None else expected
    with jax.enable_x64(True):
        got = jax.jit(models.spectral_radius)(jnp.asarray(kernel))
        np.testing.assert_allclose(got, expected, rtol=2e-5)
    single = jax.jit(models.spectral_radius)(jnp.asarray(kernel, jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=5e-5)


def test_spectral_radii_of_many_compiled():
    kernels = normal(4, 6, 6)
    got = jax.jit(jax.vmap(models.spectral_radius))(jnp.asarray(kernels, jnp.float32))
    np.testing.assert_allclose(got, [radius(kernel) for kernel in kernels], rtol=5e-5)


@pytest.mark.parametrize(
    "cell, initial, message",
    [
        ("cnn", "flax", r"cell must be .*, got cell=cnn\.$"),
        ("rnn", "zeros", r"initial must be .*, got initial=zeros\.$"),
        ("lstm", "sigmoid", r"initial must be .*, got initial=sigmoid\.$"),
        ("gru", "basic_tanh", r"initial must be .*, got initial=basic_tanh\.$"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(cell, initial, message):
    with pytest.raises(ValueError, match=message):
        Recurrent(cell, H, C, initial)


def test_what_is_no_batch_of_sequences_is_refused():
    with pytest.raises(AssertionError, match="rank"):
        Recurrent("rnn", H, C).init(jax.random.key(0), jnp.ones((4, 64)))


def test_more_than_one_step_to_answer_at_is_refused():
    with pytest.raises(AssertionError, match="rank"):
        jax.eval_shape(
            Recurrent("rnn", H, C).init,
            jax.random.key(0),
            jnp.ones((B, T, F)),
            jnp.arange(2),
        )


def test_check_notices_hidden_states_that_are_not_finite():
    model = Recurrent("rnn", H, C, check=True)
    x = jnp.asarray(normal(B, T, F), jnp.float32)
    params = jax.jit(model.clone(check=False).init)(jax.random.key(0), x)

    def square(params, x, at):
        return jnp.sum(jnp.asarray(model.apply(params, x, at)) ** 2)

    def runs(params, xs, at):
        """As training does it: one run after the other, and the gradient inside."""
        return jax.lax.map(lambda x: jax.value_and_grad(square)(params, x, at), xs)

    checked = chex.chexify(jax.jit(runs), async_check=False)
    xs, at = jnp.stack([x, 2 * x]), jnp.int32(T - 1)
    value, _ = checked(params, xs, at)
    unchecked = jax.vmap(lambda x: model.clone(check=False).apply(params, x, at))(xs)
    expected = jnp.sum(jnp.asarray(unchecked) ** 2, (1, 2))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    with pytest.raises(AssertionError, match="finite"):
        checked(params, xs.at[1, 0, 0, 0].set(jnp.nan), at)
