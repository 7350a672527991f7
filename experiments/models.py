"""Recurrent classifiers in Flax.

They are written in `flax.linen`: there, `init` and `apply` are pure functions of a
plain tree of parameters, so the training step can be mapped over seeds and scanned over
updates as it stands, and an optax transformation sees exactly the arrays of the model.
(In an LSTM of `flax.linen` each gate has its own matrices: for a clip by leaf norm, a
leaf is one gate's matrix. Keras holds all gates of a layer in one variable.)

Letters in names of arrays: B batch, T time, F features, H hidden units, C classes.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

CELLS = {"rnn": nn.SimpleCell, "lstm": nn.OptimizedLSTMCell}

INIT = (
    "Flax defaults: recurrent kernels orthogonal, other kernels LeCun normal, "
    "biases and initial state 0"
)


class RowClassifier(nn.Module):
    """Reads a sequence and answers from the last hidden state.

    Attributes:
      cell: a key of `CELLS`: "rnn" has tanh units.
      hidden: number of units.
      classes: number of answers.
      check: whether hidden states are checked to be finite (needs `chex.chexify`).
    """

    cell: str
    hidden: int
    classes: int
    check: bool = False

    @nn.compact
    def __call__(self, x_BxTxF: jax.Array) -> jax.Array:
        """Returns logits of shape (B, C)."""
        chex.assert_rank(x_BxTxF, 3)
        h_BxTxH = jnp.asarray(nn.RNN(CELLS[self.cell](self.hidden))(x_BxTxF))
        chex.assert_shape(h_BxTxH, (*x_BxTxF.shape[:2], self.hidden))
        if self.check:
            chex.assert_tree_all_finite(h_BxTxH)
        return nn.Dense(self.classes)(h_BxTxH[:, -1])
