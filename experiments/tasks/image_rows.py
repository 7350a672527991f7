"""Images, read row by row.

An image of T rows of F pixels is a sequence of T steps of F values in [0, 1]. The
answer, given after the last row, is its class; the loss is the cross entropy in nats.

Without files these are the 1,797 handwritten digits of scikit-learn's `load_digits`
(8 x 8 pixels with values 0 to 16: the test set of UCI's "Optical recognition of
handwritten digits"), which it ships. With files they are Fashion-MNIST (Xiao, Rasul,
Vollgraf, https://arxiv.org/abs/1708.07747), MNIST, or what else has their form: idx
files of 28 x 28 pixels with values 0 to 255.
"""

import gzip
import hashlib
import math
import zlib
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

CLASSES = 10
VALID_DIGITS, TEST_DIGITS = 360, 360
SPLIT_SEED = 0
# One in so many training images of files is put aside, the last ones: 10,000 of 60,000.
VALID_SHARE = 6
# Names of the files with images and with labels.
TRAIN = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
ORIGIN = "https://github.com/zalandoresearch/fashion-mnist"
# Most images a model is asked at once.
BLOCK = 500


@flax.struct.dataclass
class ImageRows:
    """Images and their classes 0..9.

    Attributes:
      train_image_NxTxF: grey levels, uint8.
      train_label_N: their classes, int32.
      judged_image_NxTxF: grey levels on which models are judged, uint8.
      judged_label_N: their classes, int32.
      white: grey level which becomes 1.
    """

    train_image_NxTxF: jax.Array
    train_label_N: jax.Array
    judged_image_NxTxF: jax.Array
    judged_label_N: jax.Array
    white: int = flax.struct.field(pytree_node=False)
    outputs: int = flax.struct.field(pytree_node=False, default=CLASSES)
    unit: str = flax.struct.field(pytree_node=False, default="nats")

    @property
    def features(self) -> int:
        """Number of pixels in a row."""
        return self.train_image_NxTxF.shape[-1]

    def sample(self, key: jax.Array, batch: int) -> Batch:
        """Draws training images with replacement.

        Args:
          key: PRNG key.
          batch: number of images B.

        Returns:
          Images of shape (B, T, F); the target is labels of shape (B,).
        """
        index_B = jax.random.randint(key, (batch,), 0, len(self.train_label_N))
        return self._batch(self.train_image_NxTxF, self.train_label_N, index_B)

    def score(self, y_BxC: jax.Array, label_B: jax.Array) -> Score:
        """Compares logits with labels."""
        counts_B = jnp.ones(label_B.shape, bool)
        return data_sets.classified(y_BxC, label_B, counts_B).score()

    def judge(
        self, answer: Callable[[jax.Array, jax.Array | None], jax.Array], key: jax.Array
    ) -> Score:
        """Puts all images to be judged to a model; the key is ignored."""
        del key

        def totals(index_B, counts_B):
            x_BxTxF, at, label_B = self._batch(
                self.judged_image_NxTxF, self.judged_label_N, index_B
            )
            return data_sets.classified(answer(x_BxTxF, at), label_B, counts_B)

        return data_sets.add_up(totals, len(self.judged_label_N), BLOCK).score()

    def _batch(
        self, image_NxTxF: jax.Array, label_N: jax.Array, index_B: jax.Array
    ) -> Batch:
        _, rows, pixels = image_NxTxF.shape
        x_BxTxF = image_NxTxF[index_B].astype(jnp.float32) / self.white
        chex.assert_shape(x_BxTxF, (len(index_B), rows, pixels))
        return Batch(x_BxTxF, jnp.int32(rows - 1), label_N[index_B])


class Images(NamedTuple):
    """Images (N, T, F) and labels (N,), both uint8."""

    image_NxTxF: np.ndarray
    label_N: np.ndarray


def load(data: Path | None, split: Split = "valid") -> ImageRows:
    """Loads images, always split alike.

    Args:
      data: directory with the files `TRAIN` and `TEST`, as they are or with gzip (then
        their names end in .gz); None: the digits of scikit-learn.
      split: on which images models are judged.

    Returns:
      The task.

    Raises:
      UsageError: if a file is missing or malformed.
    """
    images = _digits() if data is None else _read_splits(data)
    train, judged = images["train"], images[split]
    return ImageRows(
        train_image_NxTxF=jnp.asarray(train.image_NxTxF),
        train_label_N=jnp.asarray(train.label_N, jnp.int32),
        judged_image_NxTxF=jnp.asarray(judged.image_NxTxF),
        judged_label_N=jnp.asarray(judged.label_N, jnp.int32),
        white=16 if data is None else 255,
    )


def about(data: Path | None) -> str:
    """Says which images `load` loads."""
    if data is None:
        return (
            "scikit-learn load_digits, 8 rows of 8 pixels / 16; a permutation by "
            f"NumPy's default_rng({SPLIT_SEED}): first {TEST_DIGITS} images test, next "
            f"{VALID_DIGITS} validation, the other train"
        )
    images = _read_splits(data)
    digest = hashlib.sha256(b"".join(_unpack(data, name) for name in TRAIN + TEST))
    _, rows, pixels = images["train"].image_NxTxF.shape
    train, valid, test = (f"{len(part.label_N):,}" for part in images.values())
    return (
        f"idx files in {data.resolve().name}, {rows} rows of {pixels} pixels / 255, "
        f"{train} images train, the last {valid} of the same files validation, {test} "
        f"test; sha256 of {', '.join(TRAIN + TEST)}, unpacked, one after another: "
        f"{digest.hexdigest()}"
    )


def _digits() -> dict[Split, Images]:
    """Returns the digits of scikit-learn."""
    # It takes a second to import, which other experiments need not wait for.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    levels_NxTxF = images.reshape(-1, 8, 8).astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    labels = labels.astype(np.uint8)
    test, valid, train = np.split(order, [TEST_DIGITS, TEST_DIGITS + VALID_DIGITS])
    places: dict[Split, np.ndarray] = {"train": train, "valid": valid, "test": test}
    return {
        split: Images(levels_NxTxF[index], labels[index])
        for split, index in places.items()
    }


def _read_splits(directory: Path) -> dict[Split, Images]:
    """Reads idx files."""
    train, test = _read_images(directory, *TRAIN), _read_images(directory, *TEST)
    sizes = train.image_NxTxF.shape[1:], test.image_NxTxF.shape[1:]
    if sizes[0] != sizes[1]:
        raise _unfit(
            directory / TEST[0],
            f"has images of {sizes[1]} pixels, {TRAIN[0]} of {sizes[0]}",
        )
    count = len(train.label_N)
    if count < 2:
        raise _unfit(
            directory / TRAIN[0],
            "has 1 image, and 2 are needed: to train, and to validate",
        )
    first = count - max(count // VALID_SHARE, 1)
    return {
        "train": Images(train.image_NxTxF[:first], train.label_N[:first]),
        "valid": Images(train.image_NxTxF[first:], train.label_N[first:]),
        "test": test,
    }


def _read_images(directory: Path, images: str, labels: str) -> Images:
    image_NxTxF = _read_idx(directory, images, dimensions=3)
    label_N = _read_idx(directory, labels, dimensions=1)
    if image_NxTxF.size == 0:
        raise _unfit(directory / images, f"is empty: its shape is {image_NxTxF.shape}")
    if len(label_N) != len(image_NxTxF):
        raise _unfit(
            directory / labels,
            f"has {len(label_N)} labels, {images} has {len(image_NxTxF)} images",
        )
    if label_N.max() >= CLASSES:
        raise _unfit(
            directory / labels,
            f"has the label {label_N.max()}, which is not below {CLASSES}",
        )
    return Images(image_NxTxF, label_N)


def _read_idx(directory: Path, name: str, dimensions: int) -> np.ndarray:
    """Reads an array of unsigned bytes from an idx file.

    It begins with two zeros, 8 (unsigned bytes) and the number of dimensions; these
    follow as big-endian 32-bit integers, then the bytes.
    """
    content = _unpack(directory, name)
    head = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic or len(content) < head:
        raise _unfit(
            directory / name,
            f"is no idx file of {dimensions} dimensions: it begins with "
            f"{content[:head].hex() or 'nothing'}",
        )
    shape = [int(length) for length in np.frombuffer(content[4:head], ">u4")]
    if len(content) != head + math.prod(shape):
        raise _unfit(
            directory / name,
            f"has {len(content) - head} bytes after its head, which says "
            f"{' x '.join(map(str, shape))}",
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _unpack(directory: Path, name: str) -> bytes:
    """Returns what a file holds, which may be there with gzip only."""
    plain, packed = directory / name, directory / f"{name}.gz"
    if plain.is_file():
        return data_sets.read(plain)
    if not packed.is_file():
        raise _unfit(plain, "is missing, with and without .gz")
    try:
        return gzip.decompress(data_sets.read(packed))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _unfit(packed, f"cannot be unpacked: {error}") from error


def _unfit(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} {why}. The files come from {ORIGIN}.")
