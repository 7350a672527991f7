import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments.tasks import digits_rows


@pytest.fixture(scope="module")
def task():
    return digits_rows.load()


def test_a_pixel_is_its_grey_level_over_16(task):
    for x_NxTxF in (task.train_x_NxTxF, task.test_x_NxTxF):
        assert x_NxTxF.dtype == np.float32
        assert x_NxTxF.min() == 0
        assert x_NxTxF.max() == 1
        levels = np.asarray(x_NxTxF) * 16
        np.testing.assert_array_equal(levels, levels.round())


def test_time_steps_are_the_rows_from_top_to_bottom(task):
    zero = [
        [0, 0, 5, 13, 9, 1, 0, 0],
        [0, 0, 13, 15, 10, 15, 5, 0],
        [0, 3, 15, 2, 0, 11, 8, 0],
        [0, 4, 12, 0, 0, 8, 8, 0],
        [0, 5, 8, 0, 0, 9, 8, 0],
        [0, 4, 11, 0, 1, 12, 7, 0],
        [0, 2, 14, 5, 10, 12, 0, 0],
        [0, 0, 6, 13, 10, 0, 0, 0],
    ]
    images = np.concatenate([task.train_x_NxTxF, task.test_x_NxTxF])
    labels = np.concatenate([task.train_label_N, task.test_label_N])
    (place,) = np.flatnonzero((images == np.array(zero) / 16).all((1, 2)))
    assert labels[place] == 0


def test_every_image_is_on_one_side_of_the_split(task):
    assert task.train_x_NxTxF.shape == (1437, 8, 8)
    assert task.test_x_NxTxF.shape == (360, 8, 8)

    def sorted_rows(x, label):
        flat = np.column_stack([np.asarray(x).reshape(-1, 64) * 16, label])
        return flat[np.lexsort(flat.T)]

    both = np.concatenate(
        [
            sorted_rows(task.train_x_NxTxF, task.train_label_N),
            sorted_rows(task.test_x_NxTxF, task.test_label_N),
        ]
    )
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted_rows(pixels / 16, labels)
    np.testing.assert_array_equal(both[np.lexsort(both.T)], expected)


def test_the_split_is_always_the_same(task):
    assert task.test_label_N[:12].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2, 1, 1, 9]
    again = digits_rows.load()
    for leaf, same in zip(jax.tree.leaves(task), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(leaf, same)


def test_batches_are_training_images_with_their_labels_drawn_by_the_key(task):
    known = {
        (image.tobytes(), int(label))
        for image, label in zip(
            np.asarray(task.train_x_NxTxF), task.train_label_N, strict=True
        )
    }
    sample = jax.jit(task.sample, static_argnums=1)
    x_BxTxF, label_B = sample(jax.random.key(0), 64)
    assert x_BxTxF.shape == (64, 8, 8)
    batch = zip(np.asarray(x_BxTxF), label_B, strict=True)
    assert all((image.tobytes(), int(label)) in known for image, label in batch)
    np.testing.assert_array_equal(x_BxTxF, sample(jax.random.key(0), 64)[0])
    assert (label_B != sample(jax.random.key(1), 64)[1]).any()
