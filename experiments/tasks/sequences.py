"""Generated sequences, whose answer depends on steps long ago.

The six tasks on which Pascanu, Mikolov and Bengio tried how far back recurrent networks
learn to look (On the difficulty of training recurrent neural networks, 2013,
https://arxiv.org/abs/1211.5063); most stem from Hochreiter and Schmidhuber (Long
short-term memory, 1997). Tenths of the length L are rounded down.

    torder, torder3: noise of c, d, e, f, and A or B at 2 (3) places: one of the L/10
        steps from L/10 and one of those from 5L/10 (from L/10, 3L/10, 6L/10). Which
        ones were they, in order? 4 (8) classes.
    add, mul: numbers in [0, 1), two of which are marked: one of the first l/10, and one
        of the next 4l/10. What is their mean (product)? l is L plus up to L/10 - 1
        more steps, drawn for each batch.
    perm: 0 or 1, then L - 1 symbols of noise out of 2..99. Which was the first? 100
        classes.
    mem: 10 symbols of 5 kinds, L blanks, a cue, 9 blanks. The answer after every step
        is a blank, but from the cue on the symbols. 6 classes.

Symbols are one-hot inputs; add and mul have the inputs (marker, number). All but mem
are answered after the last step. The loss is the cross entropy in nats, the mean over
steps for mem, or the squared error for add and mul, where an answer is wrong if that is
above 0.04. Always answering their mean is then wrong for only 36 % (39 %) of the
sequences: a loss that fell says little, only an error near 0 does. A sequence of mem is
wrong if any step is. NaN is always wrong.

L is fixed, or drawn for each batch from a range: the arrays then have the steps of the
longest, and those after the end are zeros, which count for nothing. Models are judged
on fresh sequences in blocks, each of which has one length.
"""

import dataclasses
import functools
from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from experiments.tasks import Batch, Score

# A length, or the shortest of a range and what is above its longest.
Length = int | tuple[int, int]
# (Where it starts, how many steps it has), both in tenths of the length.
Interval = tuple[int, int]

MARKED: tuple[Interval, ...] = ((0, 1), (1, 4))
# An answer of add and mul is wrong if its squared error is above this.
TOLERANCE = 0.04
MEMORIES = 10
BLANK, CUE = 5, 6
# Symbol and label of steps after the end; as an input it is all zeros.
PADDING = -1
# Most sequences a model is asked at once. Where many runs are judged side by side, more
# take more memory, and on CPUs also more time.
BLOCK = 100


@dataclasses.dataclass(frozen=True)
class Rule:
    """What makes a task.

    Attributes:
      draws: maps the number of steps of the arrays to how many random numbers N a
        sequence is made of.
      make: maps random numbers in [0, 1), those of the sequences (B, N) and one of the
        batch, the length (a scalar array) and the number of steps to a batch.
      score: compares answers with targets.
      features: number of features of an input.
      outputs: number of outputs of a model.
      unit: unit of the loss.
      shortest: smallest length that has all places.
      steps: maps a length to the most steps a sequence can have.
    """

    draws: Callable[[int], int]
    make: Callable[[jax.Array, jax.Array, jax.Array, int], Batch]
    score: Callable[[jax.Array, jax.Array], Score]
    features: int
    outputs: int
    unit: str
    shortest: int
    steps: Callable[[int], int]


@flax.struct.dataclass
class Sequences:
    """A task which makes up its sequences; it has no data.

    Attributes:
      blocks: number of blocks of sequences on which models are judged.
      block: number of sequences in each.
      rule: what they are.
      lengths: the shortest, and what is above the longest; drawn for each batch.
    """

    # An array: the same program judges on few sequences and on many.
    blocks: jax.Array
    block: int = flax.struct.field(pytree_node=False)
    rule: Rule = flax.struct.field(pytree_node=False)
    lengths: tuple[int, int] = flax.struct.field(pytree_node=False)

    @property
    def features(self) -> int:
        """Number of features of an input."""
        return self.rule.features

    @property
    def outputs(self) -> int:
        """Number of outputs of a model."""
        return self.rule.outputs

    @property
    def unit(self) -> str:
        """Unit of the loss."""
        return self.rule.unit

    def sample(self, key: jax.Array, batch: int) -> Batch:
        """Draws sequences.

        Args:
          key: PRNG key.
          batch: number of sequences B.

        Returns:
          Inputs of shape (B, T, F), where T are the steps of the longest sequence. The
          target is what to answer: a label (B,), or (B, T) for mem, or a number (B,).
        """
        steps = self.rule.steps(self.lengths[1] - 1)
        draws = self.rule.draws(steps)
        # All at once: a generator of random numbers takes long to compile.
        drawn = jax.random.uniform(key, (2 + batch * draws,))
        own_BxN = drawn[2:].reshape(batch, draws)
        length = _choose(drawn[0], *self.lengths)
        made = self.rule.make(own_BxN, drawn[1], length, steps)
        chex.assert_shape(made.x_BxTxF, (batch, steps, self.features))
        chex.assert_type(made.x_BxTxF, jnp.float32)
        return made

    def score(self, y: jax.Array, target: jax.Array) -> Score:
        """Compares answers, of shape (B, C) or (B, T, C), with the target."""
        chex.assert_shape(y, (*target.shape[: y.ndim - 1], self.outputs))
        return self.rule.score(y, target)

    def judge(
        self, answer: Callable[[jax.Array, jax.Array | None], jax.Array], key: jax.Array
    ) -> Score:
        """Puts fresh sequences to a model, block after block: each has one length."""

        def ask(number, total):
            x_BxTxF, at, target = self.sample(
                jax.random.fold_in(key, number), self.block
            )
            score = self.score(answer(x_BxTxF, at), target)
            return jax.tree.map(jnp.add, total, score)

        total = jax.lax.fori_loop(0, self.blocks, ask, Score(*jnp.zeros(2)))
        return jax.tree.map(lambda part: part / self.blocks, total)


def make(name: str, length: Length, examples: int = 1000) -> Sequences:
    """Makes a task.

    Args:
      name: a key of `TASKS`.
      length: L, or a range of L as (shortest, above the longest).
      examples: number of sequences on which models are judged, a multiple of `BLOCK`
        if above it.

    Returns:
      The task.
    """
    check_length(name, length)
    if examples < 1 or (examples > BLOCK and examples % BLOCK):
        raise ValueError(
            f"examples must be in [1, {BLOCK}] or a multiple of {BLOCK}, "
            f"got examples={examples}."
        )
    block = min(examples, BLOCK)
    blocks = jnp.asarray(examples // block, jnp.int32)
    return Sequences(blocks, block, TASKS[name], _lengths(length))


def check_length(name: str, length: Length) -> None:
    """Refuses a length for which a task does not exist, and a range without any."""
    shortest, above = _lengths(length)
    if shortest < TASKS[name].shortest:
        raise ValueError(
            f"length of {name} must be >= {TASKS[name].shortest}, got length={length}."
        )
    if shortest >= above:
        raise ValueError(
            f"length must be (shortest, above the longest), got length={length}."
        )


def tenths(count: int, length: jax.Array | int) -> jax.Array | int:
    """Returns so many tenths of a length, rounded down."""
    return count * length // 10


def _lengths(length: Length) -> tuple[int, int]:
    return (length, length + 1) if isinstance(length, int) else length


def _choose(
    drawn: jax.Array, first: jax.Array | int, above: jax.Array | int
) -> jax.Array:
    """Turns numbers in [0, 1) into integers from the first to below another."""
    count = jnp.asarray(above - first, jnp.int32)
    # A number below 1 times a count that float32 holds never rounds up to the count.
    return first + (drawn * count.astype(drawn.dtype)).astype(jnp.int32)


def _choose_places(
    drawn_BxK: jax.Array, length: jax.Array, intervals: tuple[Interval, ...]
) -> jax.Array:
    """Chooses one step from each of K intervals."""
    start_1xK = jnp.stack([tenths(start, length) for start, _ in intervals])[None]
    width_1xK = jnp.stack([tenths(width, length) for _, width in intervals])[None]
    return _choose(drawn_BxK, start_1xK, start_1xK + width_1xK)


def _put(at_BxT: jax.Array, place_BxK: jax.Array, value: jax.Array) -> jax.Array:
    return at_BxT.at[jnp.arange(len(place_BxK))[:, None], place_BxK].set(value)


def _one_hot(symbol_BxT: jax.Array, end: jax.Array, kinds: int) -> jax.Array:
    """Encodes the symbols before the end; the steps after it are zeros."""
    known_1xT = (jnp.arange(symbol_BxT.shape[1]) < end)[None]
    shown_BxT = jnp.where(known_1xT, symbol_BxT, PADDING)
    return jax.nn.one_hot(shown_BxT, kinds, dtype=jnp.float32)


def _make_order(
    intervals: tuple[Interval, ...],
    drawn_BxN: jax.Array,
    drawn: jax.Array,
    length: jax.Array,
    steps: int,
) -> Batch:
    """Makes torder and torder3: the label has one bit (B) per place, first lowest."""
    del drawn
    noise_BxT, places_BxK, bits_BxK = jnp.split(
        drawn_BxN, [steps, steps + len(intervals)], axis=1
    )
    place_BxK = _choose_places(places_BxK, length, intervals)
    bit_BxK = _choose(bits_BxK, 0, 2)
    symbol_BxT = _put(_choose(noise_BxT, 2, 6), place_BxK, bit_BxK)
    label_B = bit_BxK @ 2 ** jnp.arange(len(intervals))
    return Batch(_one_hot(symbol_BxT, length, kinds=6), length - 1, label_B)


def _make_numbers(
    combine: Callable[..., jax.Array],
    drawn_BxN: jax.Array,
    drawn: jax.Array,
    length: jax.Array,
    steps: int,
) -> Batch:
    """Makes add and mul."""
    end = length + _choose(drawn, 0, tenths(1, length))
    number_BxT, places_BxK = jnp.split(drawn_BxN, [steps], axis=1)
    place_BxK = _choose_places(places_BxK, end, MARKED)
    marker_BxT = _put(jnp.zeros_like(number_BxT), place_BxK, jnp.ones(()))
    known_1xTx1 = (jnp.arange(steps) < end)[None, :, None]
    x_BxTxF = jnp.where(known_1xTx1, jnp.stack([marker_BxT, number_BxT], -1), 0)
    target_B = combine(jnp.take_along_axis(number_BxT, place_BxK, 1), axis=1)
    return Batch(x_BxTxF, end - 1, target_B)


def _make_first(
    drawn_BxN: jax.Array, drawn: jax.Array, length: jax.Array, steps: int
) -> Batch:
    """Makes perm."""
    del drawn, steps
    label_B = _choose(drawn_BxN[:, 0], 0, 2)
    symbol_BxT = _choose(drawn_BxN, 2, 100).at[:, 0].set(label_B)
    return Batch(_one_hot(symbol_BxT, length, kinds=100), length - 1, label_B)


def _make_memories(
    drawn_BxN: jax.Array, drawn: jax.Array, length: jax.Array, steps: int
) -> Batch:
    """Makes mem: labels after the end are `PADDING`."""
    del drawn
    memory_BxM = _choose(drawn_BxN, 0, BLANK)
    cue = MEMORIES + length
    end = cue + MEMORIES
    blank_BxT = jnp.full((len(memory_BxM), steps), BLANK)
    symbol_BxT = blank_BxT.at[:, :MEMORIES].set(memory_BxM).at[:, cue].set(CUE)
    label_BxT = jax.lax.dynamic_update_slice(blank_BxT, memory_BxM, (0, cue))
    known_1xT = (jnp.arange(steps) < end)[None]
    label_BxT = jnp.where(known_1xT, label_BxT, PADDING)
    return Batch(_one_hot(symbol_BxT, end, kinds=7), None, label_BxT)


def _score_labels(y: jax.Array, label: jax.Array) -> Score:
    """Scores logits, (B, C) or (B, T, C): a sequence is wrong if any step is."""
    asked = label != PADDING
    losses = optax.softmax_cross_entropy_with_integer_labels(y, jnp.maximum(label, 0))
    wrong = (jnp.argmax(y, -1) != label) | jnp.isnan(y).any(-1)
    wrong_B = (wrong & asked).reshape(len(label), -1).any(-1)
    return Score(jnp.mean(losses, where=asked), jnp.mean(wrong_B))


def _score_numbers(y_Bx1: jax.Array, target_B: jax.Array) -> Score:
    square_B = (y_Bx1[:, 0] - target_B) ** 2
    return Score(jnp.mean(square_B), jnp.mean(~(square_B <= TOLERANCE)))


def _order(*intervals: Interval) -> Rule:
    return Rule(
        draws=lambda steps: steps + 2 * len(intervals),
        make=functools.partial(_make_order, intervals),
        score=_score_labels,
        features=6,
        outputs=2 ** len(intervals),
        unit="nats",
        shortest=10,
        steps=lambda length: length,
    )


def _numbers(combine: Callable[..., jax.Array]) -> Rule:
    return Rule(
        draws=lambda steps: steps + len(MARKED),
        make=functools.partial(_make_numbers, combine),
        score=_score_numbers,
        features=2,
        outputs=1,
        unit="squared error",
        shortest=10,
        steps=lambda length: length + length // 10 - 1,
    )


TASKS = {
    "torder": _order((1, 1), (5, 1)),
    "torder3": _order((1, 1), (3, 1), (6, 1)),
    "add": _numbers(jnp.mean),
    "mul": _numbers(jnp.prod),
    "perm": Rule(
        draws=lambda steps: steps,
        make=_make_first,
        score=_score_labels,
        features=100,
        outputs=100,
        unit="nats",
        shortest=1,
        steps=lambda length: length,
    ),
    "mem": Rule(
        draws=lambda steps: MEMORIES,
        make=_make_memories,
        score=_score_labels,
        features=7,
        outputs=6,
        unit="nats",
        shortest=0,
        steps=lambda length: length + 2 * MEMORIES,
    ),
}
