"""Handwritten digits, read row by row.

The 1,797 images of scikit-learn's `load_digits` (8 x 8 pixels with values 0 to 16: the
test set of UCI's "Optical recognition of handwritten digits") are sequences of 8 rows,
each of 8 pixels in [0, 1]. The answer, given after the last row, is the digit. Nothing
is downloaded: scikit-learn ships the images.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

TEST_IMAGES = 360
SPLIT_SEED = 0
ABOUT = (
    "scikit-learn load_digits, 8 rows of 8 pixels / 16; a permutation by NumPy's "
    f"default_rng({SPLIT_SEED}): first {TEST_IMAGES} images test, the other train"
)


@flax.struct.dataclass
class DigitsRows:
    """Images in [0, 1] and labels in 0..9, split into train and test."""

    train_x_NxTxF: jax.Array
    train_label_N: jax.Array
    test_x_NxTxF: jax.Array
    test_label_N: jax.Array
    classes: int = flax.struct.field(pytree_node=False, default=10)

    def sample(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """Draws training images with replacement.

        Args:
          key: PRNG key.
          batch: number of images B.

        Returns:
          Images of shape (B, 8, 8) and labels of shape (B,).
        """
        index_B = jax.random.randint(key, (batch,), 0, len(self.train_label_N))
        x_BxTxF, label_B = self.train_x_NxTxF[index_B], self.train_label_N[index_B]
        chex.assert_shape(x_BxTxF, (batch, 8, 8))
        chex.assert_shape(label_B, (batch,))
        return x_BxTxF, label_B

    def test(self) -> tuple[jax.Array, jax.Array]:
        """Returns all test images, of shape (360, 8, 8), and labels, (360,)."""
        return self.test_x_NxTxF, self.test_label_N


def load() -> DigitsRows:
    """Loads the images and splits them, always alike."""
    images, labels = load_digits(return_X_y=True)
    x_NxTxF = (images / 16).reshape(-1, 8, 8).astype(np.float32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return DigitsRows(
        train_x_NxTxF=jnp.asarray(x_NxTxF[train]),
        train_label_N=jnp.asarray(labels[train], jnp.int32),
        test_x_NxTxF=jnp.asarray(x_NxTxF[test]),
        test_label_N=jnp.asarray(labels[test], jnp.int32),
    )
