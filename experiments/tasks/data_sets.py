"""What the tasks made of data sets share: files, and scores of many examples."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.config import UsageError
from experiments.tasks import Score

# A part of a data set, on which models are judged; they are always trained on "train".
Split = Literal["train", "valid", "test"]


class Totals(NamedTuple):
    """Sums over answers that were classified.

    Attributes:
      loss: cross entropies, in nats.
      wrong: number of wrong answers.
      answers: number of answers.
    """

    loss: jax.Array
    wrong: jax.Array
    answers: jax.Array

    def score(self) -> Score:
        """Returns the mean over the answers."""
        return Score(self.loss / self.answers, self.wrong / self.answers)


def classified(logits: jax.Array, label: jax.Array, counts: jax.Array) -> Totals:
    """Adds up how logits compare with labels.

    Args:
      logits: of shape (..., C). NaN is always wrong.
      label: integers of shape (...).
      counts: whether an answer counts, of shape (...).

    Returns:
      The sums.
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    wrong = (jnp.argmax(logits, -1) != label) | jnp.isnan(logits).any(-1)
    return Totals(
        loss=jnp.sum(loss, where=counts),
        wrong=jnp.sum(wrong, where=counts, dtype=jnp.float32),
        answers=jnp.sum(counts, dtype=jnp.float32),
    )


def add_up(
    totals: Callable[[jax.Array, jax.Array], Any], examples: int, most: int
) -> Any:
    """Adds up sums over all examples, block after block, so that memory stays small.

    Args:
      totals: maps indices of examples (B,), and whether each counts (B,), to sums over
        those that count: the last block can repeat the last example.
      examples: their number.
      most: largest number of examples in a block.

    Returns:
      The sums over all examples, each of which counts once.
    """
    blocks = math.ceil(examples / most)
    size = math.ceil(examples / blocks)

    def block(start):
        index_B = start + jnp.arange(size)
        return totals(jnp.minimum(index_B, examples - 1), index_B < examples)

    found = jax.lax.map(block, size * jnp.arange(blocks))
    return jax.tree.map(lambda leaf: jnp.sum(leaf, 0), found)


def read(path: Path) -> bytes:
    """Reads a file.

    Raises:
      UsageError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
