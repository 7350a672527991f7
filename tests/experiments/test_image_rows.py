import gzip
import hashlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments.config import UsageError
from experiments.tasks import image_rows

TRAIN = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
# Two images of 2 rows of 3 pixels, and their labels.
IMAGES = bytes.fromhex(
    "00000803 00000002 00000002 00000003 000102 0304ff 330000 0000ff"
)
LABELS = bytes.fromhex("00000801 00000002 0900")
ONE_IMAGE = bytes.fromhex("00000803 00000001 00000002 00000003 ff0000 00ff00")
ONE_LABEL = bytes.fromhex("00000801 00000001 07")


@pytest.fixture(scope="module")
def digits():
    return image_rows.load(None)


@pytest.fixture(scope="module")
def parts(digits):
    """Images and labels of the three splits."""
    judged = [image_rows.load(None, split) for split in ("valid", "test")]
    return [
        (np.asarray(digits.train_image_NxTxF), np.asarray(digits.train_label_N)),
        *(
            (np.asarray(task.judged_image_NxTxF), np.asarray(task.judged_label_N))
            for task in judged
        ),
    ]


@pytest.fixture
def directory(tmp_path):
    """Files as they are published, one of them unpacked."""
    for name, content in zip(TRAIN + TEST, (IMAGES, LABELS, ONE_IMAGE, ONE_LABEL)):
        if name == TEST[1]:
            (tmp_path / name).write_bytes(content)
        else:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    return tmp_path


def cross_entropy(logits, labels):
    """In float64: log sum_k exp(y_k) - y_label."""
    logits = np.asarray(logits, np.float64)
    own = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - own


def test_a_pixel_is_its_grey_level_over_16(digits, parts):
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
    levels, labels = map(np.concatenate, zip(*parts))
    (place,) = np.flatnonzero((levels == np.array(zero)).all((1, 2)))
    assert labels[place] == 0
    x_BxTxF = np.asarray(digits.sample(jax.random.key(0), 64).x_BxTxF)
    assert x_BxTxF.dtype == np.float32
    assert (x_BxTxF.min(), x_BxTxF.max()) == (0, 1)
    np.testing.assert_array_equal(x_BxTxF * 16, (x_BxTxF * 16).round())


def test_every_digit_is_in_one_split(parts):
    assert [images.shape for images, _ in parts] == [
        (1077, 8, 8),
        (360, 8, 8),
        (360, 8, 8),
    ]

    def sorted_rows(images, labels):
        flat = np.column_stack([np.asarray(images).reshape(-1, 64), labels])
        return flat[np.lexsort(flat.T)]

    images, labels = map(np.concatenate, zip(*parts))
    expected = sorted_rows(*load_digits(return_X_y=True))
    np.testing.assert_array_equal(sorted_rows(images, labels), expected)


def test_the_split_is_always_the_same(digits, parts):
    assert parts[2][1][:12].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2, 1, 1, 9]
    again = image_rows.load(None)
    for leaf, same in zip(jax.tree.leaves(digits), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(leaf, same)


@pytest.mark.usefixtures("strict")
def test_batches_are_training_images_with_their_labels_drawn_by_the_key(digits):
    known = {
        (image.tobytes(), int(label))
        for image, label in zip(
            np.asarray(digits.train_image_NxTxF), digits.train_label_N, strict=True
        )
    }
    sample = jax.jit(digits.sample, static_argnums=1)
    x_BxTxF, at, label_B = sample(jax.random.key(0), 64)
    assert x_BxTxF.shape == (64, 8, digits.features)
    assert at == 7
    levels = np.asarray(x_BxTxF * 16).astype(np.uint8)
    assert all((i.tobytes(), int(n)) in known for i, n in zip(levels, label_B))
    np.testing.assert_array_equal(x_BxTxF, sample(jax.random.key(0), 64).x_BxTxF)
    assert (label_B != sample(jax.random.key(1), 64).target).any()


@pytest.mark.usefixtures("strict")
def test_the_score_is_the_mean_cross_entropy_and_the_share_of_wrong_answers(digits):
    y_BxC = np.random.default_rng(0).normal(0, 3, (5, 10)).astype(np.float32)
    label_B = y_BxC.argmax(1)
    label_B[:2] = (label_B[:2] + 1) % 10
    loss, error = jax.jit(digits.score)(jnp.asarray(y_BxC), jnp.asarray(label_B))
    np.testing.assert_allclose(loss, cross_entropy(y_BxC, label_B).mean(), rtol=1e-6)
    np.testing.assert_allclose(error, 2 / 5, rtol=1e-6)
    loss, error = jax.jit(digits.score)(
        jnp.full((5, 10), jnp.nan), jnp.zeros(5, jnp.int32)
    )
    assert np.isnan(loss)
    assert error == 1


@pytest.mark.usefixtures("strict")
def test_every_judged_image_is_asked_once(digits, monkeypatch):
    monkeypatch.setattr(image_rows, "BLOCK", 11)  # 33 blocks of 11: 3 too many
    weights_FxC = np.random.default_rng(0).normal(0, 2, (8, 10)).astype(np.float32)

    def answer(x_BxTxF, at):
        return x_BxTxF[:, at] @ weights_FxC

    loss, error = jax.jit(lambda key: digits.judge(answer, key))(jax.random.key(0))
    last_rows = np.asarray(digits.judged_image_NxTxF)[:, 7] / 16
    logits, labels = last_rows @ weights_FxC, np.asarray(digits.judged_label_N)
    np.testing.assert_allclose(loss, cross_entropy(logits, labels).mean(), rtol=1e-5)
    np.testing.assert_allclose(error, (logits.argmax(1) != labels).mean(), rtol=1e-6)


def test_idx_files_are_read_as_they_are_published_and_unpacked(directory):
    task = image_rows.load(directory)
    final = image_rows.load(directory, "test")
    first, last = [[[0, 1, 2], [3, 4, 255]]], [[[0x33, 0, 0], [0, 0, 255]]]
    for images, labels, expected, label in (
        (task.train_image_NxTxF, task.train_label_N, first, 9),
        (final.train_image_NxTxF, final.train_label_N, first, 9),
        (task.judged_image_NxTxF, task.judged_label_N, last, 0),
        (
            final.judged_image_NxTxF,
            final.judged_label_N,
            [[[255, 0, 0], [0, 255, 0]]],
            7,
        ),
    ):
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, [label])
    assert (task.features, task.outputs, task.unit) == (3, 10, "nats")
    x_BxTxF, at, label_B = task.sample(jax.random.key(0), 8)
    assert at == 1
    assert (label_B == 9).all()
    grey = np.array(first * 8) / 255
    np.testing.assert_allclose(x_BxTxF, grey, rtol=1e-6)


@pytest.mark.parametrize(("count", "valid"), [(2, 1), (11, 1), (12, 2), (60, 10)])
def test_the_last_sixth_of_the_training_files_is_for_validation(
    directory, count, valid
):
    for name in TRAIN:
        (directory / f"{name}.gz").unlink()
    pixels = bytes(range(count))
    (directory / TRAIN[0]).write_bytes(
        struct.pack(">IIII", 0x803, count, 1, 1) + pixels
    )
    (directory / TRAIN[1]).write_bytes(struct.pack(">II", 0x801, count) + bytes(count))
    (directory / f"{TEST[0]}.gz").unlink()
    (directory / TEST[0]).write_bytes(struct.pack(">IIII", 0x803, 1, 1, 1) + b"\xff")
    task = image_rows.load(directory)
    assert task.train_image_NxTxF.ravel().tolist() == [*range(count - valid)]
    assert task.judged_image_NxTxF.ravel().tolist() == [*range(count - valid, count)]


def test_about_names_the_bytes_of_all_files(directory):
    digest = hashlib.sha256(IMAGES + LABELS + ONE_IMAGE + ONE_LABEL).hexdigest()
    about = image_rows.about(directory)
    assert digest in about
    assert (
        "2 rows of 3 pixels / 255, 1 images train, the last 1 of the same files "
        "validation, 1 test; sha256 of"
    ) in about
    assert "load_digits, 8 rows of 8 pixels" in image_rows.about(None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN[0], None, "is missing, with and without .gz"),
        (TRAIN[0], b"", "is no idx file of 3 dimensions: it begins with nothing"),
        (TRAIN[0], LABELS, "is no idx file of 3 dimensions: it begins with 00000801"),
        (TRAIN[0], IMAGES[:12], "is no idx file of 3 dimensions"),
        (TRAIN[0], IMAGES[:-1], "has 11 bytes after its head, which says 2 x 2 x 3"),
        (TRAIN[0], IMAGES + b"\0", "has 13 bytes after its head"),
        (TRAIN[0], struct.pack(">IIII", 0x803, 0, 28, 28), "is empty"),
        (TRAIN[1], ONE_LABEL, "has 1 labels, train-images-idx3-ubyte has 2 images"),
        (TRAIN[1], LABELS[:-1] + b"\n", "has the label 10, which is not below 10"),
        (
            TEST[0],
            struct.pack(">IIII", 0x803, 1, 1, 1) + b"\0",
            r"has images of \(1, 1\) pixels, train-images-idx3-ubyte of \(2, 3\)",
        ),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(directory, name, content, message):
    (directory / f"{name}.gz").unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    for read in (image_rows.load, image_rows.about):
        with pytest.raises(UsageError, match=message) as refusal:
            read(directory)
        line = str(refusal.value)
        assert line.startswith(f"{directory / name} ")
        assert line.endswith(
            "come from https://github.com/zalandoresearch/fashion-mnist."
        )
        assert "\n" not in line


@pytest.mark.parametrize(
    "content",
    [
        b"plain",
        gzip.compress(IMAGES)[:-9],
        gzip.compress(IMAGES)[:10] + b"\xff" * 9,
        gzip.compress(IMAGES) + b"plain",
    ],
    # Packed bytes hold the time: as names they would differ between workers.
    ids=["not packed", "cut short", "broken", "more after it"],
)
def test_what_gzip_cannot_unpack_is_refused_in_one_line(directory, content):
    packed = directory / f"{TRAIN[0]}.gz"
    packed.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be unpacked") as refusal:
        image_rows.load(directory)
    assert str(refusal.value).startswith(f"{packed} ")
    assert "\n" not in str(refusal.value)


def test_one_training_image_is_not_enough_to_validate_too(directory):
    for name, content in zip(TRAIN, (ONE_IMAGE, ONE_LABEL)):
        (directory / f"{name}.gz").unlink()
        (directory / name).write_bytes(content)
    with pytest.raises(UsageError, match="has 1 image, and 2 are needed") as refusal:
        image_rows.load(directory)
    assert str(refusal.value).startswith(f"{directory / TRAIN[0]} ")


def test_a_directory_that_is_none_is_refused(directory):
    with pytest.raises(UsageError, match="is missing"):
        image_rows.load(directory / "elsewhere")
