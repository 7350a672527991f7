"""The gradient of training, with the regulariser against vanishing gradients.

With d_t = dC/dh_t, the total derivative of the loss C after step t, the regulariser
asks that the part of it that goes one step back be no shorter and no longer:

    r_t = ||(d_t * act'(h_t)) W^T||^2 / ||d_t||^2
    Omega = sum_t mean_batch (r_t - 1)^2 / (sum_t share of the batch that counts)

Only entries with ||d_t||^2 >= 1e-20 count; the ratio of the others is taken as 1. The
gradient of Omega is taken with respect to the recurrent kernel W alone, h and d being
held constant, and added, alpha times, to that of the loss.

Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
https://arxiv.org/abs/1211.5063. Equation 9 there has the ratio of the norms; here, as
in equation 10 and in the authors' program, it is that of their squares. The share that
counts is in the program only.
"""

from typing import Any

import jax
import jax.numpy as jnp

from experiments import models
from experiments.tasks import Batch, Score

# Derivatives shorter than this have vanished for good.
SHORTEST = 1e-10


def gradient(
    params: Any, model: Any, task: Any, batch: Batch, alpha: float | jax.Array
) -> tuple[Score, Any]:
    """Returns how a model does on a batch, and the gradient to train it with.

    Args:
      params: its parameters.
      model: a `models.Recurrent`; where alpha is 0, any Flax module of its call.
      task: what scores the answers.
      batch: the examples.
      alpha: the weight of Omega. A Python number 0: no Omega is computed.

    Returns:
      The score, without Omega, and the gradient, a tree as `params`.

    Raises:
      ValueError: if there is an Omega to compute and the units are gated.
    """
    if not isinstance(alpha, jax.Array) and alpha == 0:
        return _plain(params, model, task, batch)
    if model.cell != "rnn":
        raise ValueError(f"cell must be rnn where alpha > 0, got cell={model.cell}.")

    def loss(params, nudge_TxBxH):
        h_TxBxH = model.apply(params, batch.x_BxTxF, nudge_TxBxH, method="states")
        y = model.apply(params, h_TxBxH, batch.at, method="answer")
        score = task.score(y, batch.target)
        return score.loss, (score, h_TxBxH)

    def regulariser(params):
        kernel_HxH = jnp.asarray(models.recurrent_kernel(params))
        return omega(kernel_HxH, d_TxBxH, model.activation.slope(h_TxBxH))

    size_B, size_T, _ = batch.x_BxTxF.shape
    nudge_TxBxH = jnp.zeros((size_T, size_B, model.hidden), batch.x_BxTxF.dtype)
    differentiate = jax.grad(loss, (0, 1), has_aux=True)
    (grads, d_TxBxH), (score, h_TxBxH) = differentiate(params, nudge_TxBxH)
    pull = jax.grad(regulariser)(params)
    return score, jax.tree.map(lambda grad, pull: grad + alpha * pull, grads, pull)


def _plain(params: Any, model: Any, task: Any, batch: Batch) -> tuple[Score, Any]:
    def loss(params):
        y = model.apply(params, batch.x_BxTxF, batch.at)
        score = task.score(y, batch.target)
        return score.loss, score

    grads, score = jax.grad(loss, has_aux=True)(params)
    return score, grads


def omega(
    kernel_HxH: jax.Array, d_TxBxH: jax.Array, slope_TxBxH: jax.Array
) -> jax.Array:
    """Returns Omega.

    Args:
      kernel_HxH: the recurrent kernel W.
      d_TxBxH: total derivatives of the loss with respect to the states.
      slope_TxBxH: act'(h_t), the slopes of the units.
    """
    # Ratios do not depend on the length of d, whose square may overflow.
    peak_TxBx1 = jnp.max(jnp.abs(d_TxBxH), -1, keepdims=True)
    d_TxBxH = d_TxBxH / jnp.where(peak_TxBx1 > 0, peak_TxBx1, 1)
    length_TxB = jnp.linalg.norm(d_TxBxH, axis=-1)
    counts_TxB = length_TxB * peak_TxBx1[..., 0] >= SHORTEST
    back_TxBxH = (d_TxBxH * slope_TxBxH) @ kernel_HxH.T
    square_TxB = jnp.sum(back_TxBxH**2, -1)
    square_TxB = square_TxB / jnp.where(counts_TxB, length_TxB, 1) ** 2
    ratio_TxB = jnp.where(counts_TxB, square_TxB, 1)
    # Where nothing counts Omega is 0.
    counted = jnp.maximum(jnp.sum(counts_TxB), 1)
    return jnp.sum((ratio_TxB - 1) ** 2) / counted
