"""The tasks, one file each.

A task is a pytree of its data (a `flax.struct.dataclass`), so that it can be passed to
compiled programs, with static

    features: number of features F of an input
    outputs: number of outputs C of a model
    unit: unit of the loss, for example "nats"

and three functions, all traceable, which runs map over their keys:

    sample(key, batch) -> Batch: draws `batch` training examples.
    score(y, target) -> Score: compares what a model answers, y, with the target of a
        batch. y is (B, C), or (B, T, C) where a model answers after every step.
    judge(answer, key) -> Score: puts the examples on which models are judged to
        `answer(x_BxTxF, at)`, which returns y. Data sets ask all their held-out
        examples and ignore the key; generated tasks draw fresh ones by it.
"""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Examples, all of one length.

    Attributes:
      x_BxTxF: float32 inputs.
      at: step after which a model answers, an int32 scalar; what comes later is
        padding. None: a model answers after every step.
      target: what `score` needs to know of the right answers, a pytree.
    """

    x_BxTxF: Any
    at: Any
    target: Any


class Score(NamedTuple):
    """How answers compare with the right ones.

    Attributes:
      loss: mean loss, in the task's `unit`: what training differentiates.
      error: share of wrong answers, in [0, 1].
    """

    loss: Any
    error: Any
