"""Text, of which each next character is predicted.

The first 90 % of the characters train, the next 5 % are "valid", the last 5 % "test".
The vocabulary is the kinds of characters in the training part, by code point, and one
symbol for all others: it is never met in training, but asked for where it comes.

A sequence is a window of T characters, one-hot, and the answer after every step is the
next character; the first step knows nothing of what came before the window. The loss is
the mean cross entropy per character, in nats. Models are judged on windows which follow
each other without a gap; what is left at the end of the part is not asked.

Without a file the text is the documentation of Python which comes with it.
"""

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import UsageError
from experiments.tasks import Batch, Score, data_sets
from experiments.tasks.data_sets import Split

# Where parts start and end, in percent of the characters.
PARTS: dict[Split, tuple[int, int]] = {
    "train": (0, 90),
    "valid": (90, 95),
    "test": (95, 100),
}
# A text must be this many times as long as a window: the smaller parts have 5 %.
FEWEST_WINDOWS = 20
# What a count starts at in `baselines`, so that nothing is impossible.
PSEUDOCOUNT = 0.1
# Most characters a model is asked at once.
BLOCK = 4096


@flax.struct.dataclass
class Text:
    """Characters as places in the vocabulary, int32.

    Attributes:
      train_N: the training part.
      judged_WxT1: windows on which models are judged, of T + 1 characters: the last of
        a window is the first of the next one.
      outputs: size of the vocabulary.
    """

    train_N: jax.Array
    judged_WxT1: jax.Array
    outputs: int = flax.struct.field(pytree_node=False)
    unit: str = flax.struct.field(pytree_node=False, default="nats")

    @property
    def features(self) -> int:
        """Size of the vocabulary."""
        return self.outputs

    def sample(self, key: jax.Array, batch: int) -> Batch:
        """Draws windows of the training part with replacement.

        Args:
          key: PRNG key.
          batch: number of windows B.

        Returns:
          One-hot characters of shape (B, T, C); the target is the next ones, (B, T).
        """
        length = self.judged_WxT1.shape[1] - 1
        starts = len(self.train_N) - length
        start_Bx1 = jax.random.randint(key, (batch, 1), 0, starts)
        return self._batch(self.train_N[start_Bx1 + jnp.arange(length + 1)[None]])

    def score(self, y_BxTxC: jax.Array, target_BxT: jax.Array) -> Score:
        """Compares logits with the characters that came."""
        counts_BxT = jnp.ones(target_BxT.shape, bool)
        return data_sets.classified(y_BxTxC, target_BxT, counts_BxT).score()

    def judge(
        self, answer: Callable[[jax.Array, jax.Array | None], jax.Array], key: jax.Array
    ) -> Score:
        """Puts all windows to be judged to a model; the key is ignored."""
        del key
        windows, length = self.judged_WxT1.shape[0], self.judged_WxT1.shape[1] - 1

        def totals(index_B, counts_B):
            x_BxTxC, at, target_BxT = self._batch(self.judged_WxT1[index_B])
            counts_BxT = jnp.broadcast_to(counts_B[:, None], target_BxT.shape)
            return data_sets.classified(answer(x_BxTxC, at), target_BxT, counts_BxT)

        return data_sets.add_up(totals, windows, max(BLOCK // length, 1)).score()

    def _batch(self, window_BxT1: jax.Array) -> Batch:
        x_BxTxC = jax.nn.one_hot(window_BxT1[:, :-1], self.outputs, dtype=jnp.float32)
        chex.assert_rank(x_BxTxC, 3)
        return Batch(x_BxTxC, None, window_BxT1[:, 1:])


class Source(NamedTuple):
    """A text and what is known of it.

    Attributes:
      name: of the file, or of what else it comes from.
      content: the text in UTF-8.
      code_N: its code points.
    """

    name: str
    content: bytes
    code_N: np.ndarray

    def part(self, split: Split) -> np.ndarray:
        """Returns the code points of a part."""
        start, end = (len(self.code_N) * share // 100 for share in PARTS[split])
        return self.code_N[start:end]

    def encode(self, split: Split) -> np.ndarray:
        """Returns a part as places in the vocabulary, whose last is for others."""
        known = np.unique(self.part("train"))
        place = np.searchsorted(known, self.part(split))
        found = known[np.minimum(place, len(known) - 1)] == self.part(split)
        return np.where(found, place, len(known)).astype(np.int32)


def load(
    data: Path | None,
    length: int,
    split: Split = "valid",
    examples: int | None = None,
) -> Text:
    """Loads a text.

    Args:
      data: file with the text in UTF-8; None: the documentation of Python.
      length: characters T of a window.
      split: part of the text on which models are judged.
      examples: most windows on which they are, the first ones; None: all.

    Returns:
      The task.

    Raises:
      UsageError: if the file is no text, or too short.
    """
    source = _read(data, length)
    return Text(
        train_N=jnp.asarray(source.encode("train")),
        judged_WxT1=jnp.asarray(_windows(source.encode(split), length)[:examples]),
        outputs=_kinds(source) + 1,
    )


def about(data: Path | None, length: int) -> str:
    """Says which text `load` loads, and refuses the same ones."""
    source = _read(data, length)
    sizes = (f"{len(source.part(split)):,} {split}" for split in PARTS)
    return (
        f"{source.name}, sha256 {hashlib.sha256(source.content).hexdigest()}, "
        f"characters in order: {', '.join(sizes)}; {_kinds(source)} kinds in train, "
        "one symbol for others"
    )


def baselines(
    data: Path | None,
    length: int,
    split: Split = "valid",
    examples: int | None = None,
) -> dict[str, float]:
    """Returns what counting reaches on the windows on which models are judged.

    With counts from the training part and a = `PSEUDOCOUNT`, the probability of
    character j, after character i, is

        unigram: (count(j) + a) / sum_k (count(k) + a)
        bigram: (count(i, j) + a) / sum_k (count(i, k) + a)

    Args:
      data: as for `load`.
      length: as for `load`.
      split: as for `load`.
      examples: as for `load`.

    Returns:
      Mean cross entropy in bits per character, by name.
    """
    source = _read(data, length)
    size = _kinds(source) + 1
    train_N = source.encode("train")
    windows_WxT1 = _windows(source.encode(split), length)[:examples]
    before, after = windows_WxT1[:, :-1], windows_WxT1[:, 1:]
    unigram_C = PSEUDOCOUNT + np.bincount(train_N, minlength=size)
    pairs = np.bincount(train_N[:-1] * size + train_N[1:], minlength=size**2)
    bigram_CxC = PSEUDOCOUNT + pairs.reshape(size, size)
    unigram_C /= unigram_C.sum()
    bigram_CxC /= bigram_CxC.sum(1, keepdims=True)
    return {
        "unigram": float(-np.log2(unigram_C[after]).mean()),
        "bigram": float(-np.log2(bigram_CxC[before, after]).mean()),
    }


def _read(data: Path | None, length: int) -> Source:
    """Reads a text whose smallest part has a window and the character after it."""
    if data is None:
        name, content = _documentation()
    else:
        name, content = data.name, data_sets.read(data)
    if b"\0" in content:
        raise UsageError(f"{data} is binary. Choose a text.")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{data} is not UTF-8 at byte {error.start}. Convert it."
        ) from error
    fewest = FEWEST_WINDOWS * (length + 1)
    if len(text) < fewest:
        raise UsageError(
            f"{data or name} has {len(text):,} characters. Windows of {length} take "
            f"{fewest:,} or more: choose a longer text, or a smaller length."
        )
    return Source(name, content, np.frombuffer(text.encode("utf-32-le"), "<u4"))


def _documentation() -> tuple[str, bytes]:
    """Returns what `help` of Python knows of its language: a name, and the text."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "This Python comes without its documentation (pydoc_data.topics). "
            "Choose a text."
        ) from error
    name = f"pydoc_data.topics of Python {platform.python_version()}"
    return name, "".join(topics[key] for key in sorted(topics)).encode()


def _kinds(source: Source) -> int:
    return len(np.unique(source.part("train")))


def _windows(code_N: np.ndarray, length: int) -> np.ndarray:
    """Cuts characters into windows of T + 1, which share their ends."""
    start_Wx1 = np.arange(0, len(code_N) - length, length)[:, None]
    return code_N[start_Wx1 + np.arange(length + 1)]
