"""Recurrent networks in Flax.

They are written in `flax.linen`: there, `init` and `apply` are pure functions of a
plain tree of parameters, so the training step can be mapped over seeds and scanned over
updates as it stands, and an optax transformation sees exactly the arrays of the model.
(In an LSTM of `flax.linen` each gate has its own matrices: for a clip by leaf norm, a
leaf is one gate's matrix. Keras holds all gates of a layer in one variable.)

Letters in names of arrays: B batch, T time, F features, H hidden units, C outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

CELLS = ("rnn", "lstm", "gru")

# Entries that smart_tanh keeps of each row, and the spectral radius it then sets.
KEPT = 15
RADIUS = 0.95
# Matrices are squared this often: the k in Gelfand's formula is 2^20.
SQUARINGS = 20


class Activation(NamedTuple):
    """What a plain recurrent unit does to its input.

    Attributes:
      value: the function.
      slope: its derivative, as a function of its value.
    """

    value: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]


TANH = Activation(jnp.tanh, lambda h: 1 - h**2)
SIGMOID = Activation(jax.nn.sigmoid, lambda h: h * (1 - h))


class Init(NamedTuple):
    """How a network starts; its biases and its initial state are 0.

    Attributes:
      about: a sentence that says it exactly.
      kernel: initialiser of the input and readout kernels.
      recurrent: initialiser of the recurrent kernel.
      activation: the units it is meant for.
    """

    about: str
    kernel: nn.initializers.Initializer
    recurrent: nn.initializers.Initializer
    activation: Activation


def smart_tanh(
    key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32
) -> jax.Array:
    """Returns a sparse recurrent kernel of a given spectral radius.

    Entries are normal; each row (a unit's outgoing weights) keeps `KEPT` at random
    places, or all if there are no more; the rest is rescaled.
    """
    values_key, places_key = jax.random.split(key)
    kept_HxH = jnp.broadcast_to(jnp.arange(shape[1]) < KEPT, shape)
    kept_HxH = jax.random.permutation(places_key, kept_HxH, axis=1, independent=True)
    kernel_HxH = kept_HxH * jax.random.normal(values_key, shape, dtype)
    return kernel_HxH * (RADIUS / spectral_radius(kernel_HxH))


_INITS = {
    "flax": Init(
        "Flax defaults: recurrent kernels orthogonal, other kernels LeCun normal, "
        "biases and initial state 0",
        nn.initializers.lecun_normal(),
        nn.initializers.orthogonal(),
        TANH,
    ),
    "basic_tanh": Init(
        "basic_tanh: all kernels normal with standard deviation 0.1, "
        "biases and initial state 0, tanh units",
        nn.initializers.normal(0.1),
        nn.initializers.normal(0.1),
        TANH,
    ),
    "smart_tanh": Init(
        "smart_tanh: all kernels normal with standard deviation 0.01; of the "
        f"recurrent kernel each row keeps {KEPT} entries at random places, the others "
        f"are 0, and it is rescaled to spectral radius {RADIUS}; "
        "biases and initial state 0, tanh units",
        nn.initializers.normal(0.01),
        smart_tanh,
        TANH,
    ),
    "sigmoid": Init(
        "sigmoid: all kernels normal with standard deviation 0.01, "
        "biases and initial state 0, sigmoid units",
        nn.initializers.normal(0.01),
        nn.initializers.normal(0.01),
        SIGMOID,
    ),
}
INITS = {name: init.about for name, init in _INITS.items()}


class Recurrent(nn.Module):
    """Reads a sequence, and answers from its hidden state.

    Attributes:
      cell: one of `CELLS`; "rnn" has plain units.
      hidden: number of units H.
      outputs: number of outputs C.
      initial: a key of `INITS`: how it starts, and for an "rnn" which units it has.
        "lstm" and "gru" have only "flax"; the others are those of Pascanu, Mikolov,
        Bengio, On the difficulty of training recurrent neural networks, 2013,
        https://arxiv.org/abs/1211.5063.
      check: whether hidden states are checked to be finite (needs `chex.chexify`).
    """

    cell: str
    hidden: int
    outputs: int
    initial: str = "flax"
    check: bool = False

    def __post_init__(self) -> None:
        """Refuses what does not exist."""
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {CELLS}, got cell={self.cell}.")
        known = tuple(INITS) if self.cell == "rnn" else ("flax",)
        if self.initial not in known:
            raise ValueError(
                f"initial must be one of {known} (cell={self.cell}), "
                f"got initial={self.initial}."
            )
        super().__post_init__()

    @property
    def activation(self) -> Activation:
        """What the units of an "rnn" do."""
        return _INITS[self.initial].activation

    def setup(self) -> None:
        """Makes the layers."""
        init = _INITS[self.initial]
        if self.cell == "rnn":
            self.recurrence = PlainRNN(
                self.hidden, init.activation, init.kernel, init.recurrent
            )
        else:
            cell = nn.OptimizedLSTMCell if self.cell == "lstm" else nn.GRUCell
            self.recurrence = nn.RNN(cell(self.hidden), time_major=True)
        self.readout = nn.Dense(self.outputs, kernel_init=init.kernel)

    def __call__(self, x_BxTxF: jax.Array, at: jax.Array | None = None) -> jax.Array:
        """Returns what the model answers.

        Args:
          x_BxTxF: input sequences.
          at: the step after which it answers, an integer scalar; None: every step.

        Returns:
          Outputs of shape (B, C), or (B, T, C) if it answers after every step.
        """
        return self.answer(self.states(x_BxTxF), at)

    def states(
        self, x_BxTxF: jax.Array, nudge_TxBxH: jax.Array | None = None
    ) -> jax.Array:
        """Returns the hidden states, of shape (T, B, H).

        Args:
          x_BxTxF: input sequences.
          nudge_TxBxH: see `recur`; for an "rnn" only.
        """
        chex.assert_rank(x_BxTxF, 3)
        x_TxBxF = jnp.swapaxes(x_BxTxF, 0, 1)
        nudge = () if nudge_TxBxH is None else (nudge_TxBxH,)
        h_TxBxH = jnp.asarray(self.recurrence(x_TxBxF, *nudge))
        chex.assert_shape(h_TxBxH, (*x_TxBxF.shape[:2], self.hidden))
        if self.check:
            chex.assert_tree_all_finite(h_TxBxH)
        return h_TxBxH

    def answer(self, h_TxBxH: jax.Array, at: jax.Array | None = None) -> jax.Array:
        """Returns the outputs, as a call does, from the hidden states."""
        if at is None:
            return jnp.swapaxes(self.readout(h_TxBxH), 0, 1)
        chex.assert_rank(at, 0)
        h_BxH = jax.lax.dynamic_index_in_dim(h_TxBxH, at, keepdims=False)
        return self.readout(h_BxH)


class PlainRNN(nn.Module):
    """Plain recurrent units, as in `recur`.

    Attributes:
      hidden: number of units H.
      activation: what the units do.
      kernel_init: initialiser of the input kernel.
      recurrent_init: initialiser of the recurrent kernel.
    """

    hidden: int
    activation: Activation
    kernel_init: nn.initializers.Initializer
    recurrent_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, x_TxBxF: jax.Array, nudge_TxBxH: jax.Array | None = None
    ) -> jax.Array:
        """Returns the hidden states, of shape (T, B, H)."""
        drive = nn.Dense(self.hidden, kernel_init=self.kernel_init, name="input")
        shape = self.hidden, self.hidden
        kernel_HxH = self.param("recurrent", self.recurrent_init, shape)
        return recur(self.activation, kernel_HxH, drive(x_TxBxF), nudge_TxBxH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(
    activation: Activation,
    kernel_HxH: jax.Array,
    drive_TxBxH: jax.Array,
    nudge_TxBxH: jax.Array | None = None,
) -> jax.Array:
    """Runs a plain recurrent network.

        h_t = act(h_{t-1} W + drive_t) + nudge_t,  h_0 = 0

    Backwards it gives the same as JAX would, in less time: JAX adds to the gradient of
    W at every step; here the loop goes through the units' gradients only, and one
    product over all steps then makes that of W.

    Args:
      activation: act, what the units do.
      kernel_HxH: W.
      drive_TxBxH: what the units receive from elsewhere.
      nudge_TxBxH: what is added to the states; None: 0. The gradient of a cost C with
        respect to nudge_t is the total derivative dC/dh_t, through all later states.

    Returns:
      The states h_1 to h_T, of shape (T, B, H).
    """
    return _forward(activation, kernel_HxH, drive_TxBxH, nudge_TxBxH)[0]


def _forward(
    activation: Activation,
    kernel_HxH: jax.Array,
    drive_TxBxH: jax.Array,
    nudge_TxBxH: jax.Array | None,
) -> tuple[jax.Array, tuple]:
    """Returns the states, and what `_backward` needs."""

    def advance(h_BxH, now):
        drive_BxH, nudge_BxH = now
        value_BxH = activation.value(h_BxH @ kernel_HxH + drive_BxH)
        h_BxH = value_BxH if nudge_BxH is None else value_BxH + nudge_BxH
        return h_BxH, (h_BxH, None if nudge_BxH is None else value_BxH)

    h0_BxH = jnp.zeros_like(drive_TxBxH[0])
    _, (h_TxBxH, value_TxBxH) = jax.lax.scan(
        advance, h0_BxH, (drive_TxBxH, nudge_TxBxH)
    )
    return h_TxBxH, (kernel_HxH, h_TxBxH, value_TxBxH)


def _backward(
    activation: Activation, kept: tuple, grad_TxBxH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the gradients of kernel, drive and nudge."""
    kernel_HxH, h_TxBxH, value_TxBxH = kept
    nudged = value_TxBxH is not None

    def retreat(drive_BxH, now):
        grad_BxH, value_BxH = now
        total_BxH = grad_BxH + drive_BxH @ kernel_HxH.T
        drive_BxH = total_BxH * activation.slope(value_BxH)
        return drive_BxH, (drive_BxH, total_BxH if nudged else None)

    _, (drive_TxBxH, total_TxBxH) = jax.lax.scan(
        retreat,
        jnp.zeros_like(grad_TxBxH[0]),
        (grad_TxBxH, value_TxBxH if nudged else h_TxBxH),
        reverse=True,
    )
    kernel_grad_HxH = jnp.einsum("tbi,tbj->ij", h_TxBxH[:-1], drive_TxBxH[1:])
    return kernel_grad_HxH, drive_TxBxH, total_TxBxH


recur.defvjp(_forward, _backward)


def recurrent_kernel(params: Any) -> jax.Array | None:
    """Returns the recurrent kernel (H, H) of a plain network; others have none."""
    return params["params"].get("recurrence", {}).get("recurrent")


def spectral_radius(kernel_HxH: jax.Array) -> jax.Array:
    """Returns the largest magnitude of the eigenvalues, by Gelfand's formula.

        rho(W) = lim ||W^k||^(1/k)

    W is squared `SQUARINGS` times and rescaled to norm 1 each time; the logarithms of
    the scales add up to that of the norm. No eigenvalue is computed: accelerators have
    no routine for those of a general matrix. NaN if an entry is not finite.
    """

    def square(carry, share):
        power_HxH, log_norm = carry
        norm = jnp.max(jnp.abs(power_HxH))
        power_HxH = power_HxH / jnp.where(norm == 0, 1, norm)
        return (power_HxH @ power_HxH, log_norm + share * jnp.log(norm)), None

    shares = jnp.exp2(-jnp.arange(SQUARINGS + 1, dtype=kernel_HxH.dtype))
    start = kernel_HxH, jnp.zeros((), kernel_HxH.dtype)
    (_, log_norm), _ = jax.lax.scan(square, start, shares)
    return jnp.exp(log_norm)
