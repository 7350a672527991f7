import hashlib
import itertools
import math
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import UsageError
from experiments.tasks import text

LENGTH = 4
# 200 characters: 180 train with kinds \n a b c d e, 10 valid, 10 test with others.
TRAINED = "abcde\n" * 20 + "aab\nbecd\nc" * 6
VALID = "abzé\nab\nca"
TEST = "a☃aaaaaaab"
KNOWN = {character: place for place, character in enumerate("\nabcde")}
OTHER = 6


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_bytes((TRAINED + VALID + TEST).encode())
    return path


def encoded(characters):
    return np.array([KNOWN.get(character, OTHER) for character in characters])


def cross_entropy(logits, labels):
    """In float64: log sum_k exp(y_k) - y_label."""
    logits = np.asarray(logits, np.float64)
    own = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - own


def test_characters_are_encoded_by_code_point_and_unseen_ones_are_one_symbol(path):
    task = text.load(path, LENGTH)
    np.testing.assert_array_equal(task.train_N, encoded(TRAINED))
    assert (task.features, task.outputs, task.unit) == (7, 7, "nats")


def test_windows_to_be_judged_follow_each_other(path):
    whole = encoded(VALID)
    np.testing.assert_array_equal(
        text.load(path, LENGTH).judged_WxT1, [whole[0:5], whole[4:9]]
    )
    np.testing.assert_array_equal(text.load(path, 9, examples=1).judged_WxT1, [whole])
    np.testing.assert_array_equal(
        text.load(path, LENGTH, examples=1).judged_WxT1, [whole[0:5]]
    )
    whole = encoded(TEST)
    np.testing.assert_array_equal(
        text.load(path, 3, "test").judged_WxT1, [whole[0:4], whole[3:7], whole[6:10]]
    )
    judged = text.load(path, LENGTH, "train").judged_WxT1
    np.testing.assert_array_equal(judged[:, :-1].ravel(), encoded(TRAINED)[:176])
    np.testing.assert_array_equal(judged[:, 1:].ravel(), encoded(TRAINED)[1:177])


@pytest.mark.usefixtures("strict")
def test_batches_are_windows_from_all_places_alike(tmp_path):
    path = tmp_path / "distinct.txt"
    path.write_text("".join(chr(1000 + place) for place in range(200)), "utf-8")
    sample = jax.jit(text.load(path, 9).sample, static_argnums=1)
    x_BxTxC, at, target_BxT = sample(jax.random.key(0), 3000)
    assert x_BxTxC.shape == (3000, 9, 181)
    assert x_BxTxC.dtype == jnp.float32
    assert at is None
    start_B = np.asarray(x_BxTxC)[:, 0].argmax(-1)
    place_BxT = start_B[:, None] + np.arange(9)
    np.testing.assert_array_equal(np.argmax(x_BxTxC, -1), place_BxT)
    np.testing.assert_array_equal(np.sum(x_BxTxC, -1), np.ones((3000, 9)))
    np.testing.assert_array_equal(target_BxT, place_BxT + 1)
    # Windows of 9 and the character after them start at 0 to 170: 17.5 of each, with a
    # standard deviation of 4.2, and the mean place has one of 0.9.
    np.testing.assert_array_equal(np.unique(start_B), np.arange(171))
    assert np.bincount(start_B).max() < 40
    np.testing.assert_allclose(start_B.mean(), 85, atol=4)
    again = sample(jax.random.key(0), 3000).target
    np.testing.assert_array_equal(again, target_BxT)
    assert (sample(jax.random.key(1), 3000).target != target_BxT).any()


@pytest.mark.usefixtures("strict")
def test_the_score_is_the_mean_cross_entropy_per_character_in_nats(path):
    task = text.load(path, LENGTH)
    y_BxTxC = np.random.default_rng(0).normal(0, 3, (2, 4, 7)).astype(np.float32)
    target_BxT = y_BxTxC.argmax(-1)
    target_BxT[0, :3] = (target_BxT[0, :3] + 1) % 7
    loss, error = jax.jit(task.score)(jnp.asarray(y_BxTxC), jnp.asarray(target_BxT))
    expected = cross_entropy(y_BxTxC, target_BxT).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(error, 3 / 8, rtol=1e-6)
    loss, error = jax.jit(task.score)(
        jnp.full((2, 4, 7), jnp.nan), jnp.asarray(target_BxT)
    )
    assert np.isnan(loss)
    assert error == 1


@pytest.mark.usefixtures("strict")
def test_every_window_is_judged_once(path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 7)  # 3 windows of 3 in 2 blocks of 2
    logits_CxC = np.random.default_rng(0).normal(0, 2, (7, 7)).astype(np.float32)

    def answer(x_BxTxC, at):
        assert at is None
        assert x_BxTxC.shape == (2, 3, 7)
        return x_BxTxC @ logits_CxC

    task = text.load(path, 3, "test")
    loss, error = jax.jit(lambda key: task.judge(answer, key))(jax.random.key(0))
    logits, after = logits_CxC[encoded(TEST[:9])], encoded(TEST[1:])
    expected = cross_entropy(logits, after).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(error, (logits.argmax(1) != after).mean(), rtol=1e-6)


def test_baselines_are_those_of_counts_from_train(path):
    def bits(probability):
        pairs = [(VALID[i], VALID[i + 1]) for i in range(8)]
        return -sum(math.log2(probability(*pair)) for pair in pairs) / 8

    def kind(character):
        return character if character in KNOWN else "other"

    train = list(TRAINED)
    pairs = list(itertools.pairwise(train))

    def unigram(i, j):
        return (train.count(kind(j)) + 0.1) / (180 + 0.7)

    def bigram(i, j):
        known = sum(before == kind(i) for before, _ in pairs)
        return (pairs.count((kind(i), kind(j))) + 0.1) / (known + 0.7)

    found = text.baselines(path, LENGTH)
    assert found == pytest.approx({"unigram": bits(unigram), "bigram": bits(bigram)})


def test_the_default_is_the_documentation_of_this_python():
    from pydoc_data.topics import topics

    content = "".join(topics[name] for name in sorted(topics))
    about = text.about(None, 64)
    assert f"pydoc_data.topics of Python {platform.python_version()}" in about
    assert hashlib.sha256(content.encode()).hexdigest() in about
    task = text.load(None, 64)
    assert task.train_N.size == len(content) * 90 // 100 > 300_000
    found = text.baselines(None, 64)
    assert 2 < found["bigram"] < found["unigram"] < math.log2(task.outputs)


def test_about_names_file_content_and_sizes(path):
    digest = hashlib.sha256((TRAINED + VALID + TEST).encode()).hexdigest()
    assert text.about(path, LENGTH) == (
        f"abc.txt, sha256 {digest}, characters in order: 180 train, 10 valid, 10 test; "
        "6 kinds in train, one symbol for others"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "has 0 characters. Windows of 4 take 100 or more"),
        (b"a" * 99, "has 99 characters"),
        ("é".encode() * 99, "has 99 characters"),
        (b"a" * 500 + b"\0", "is binary"),
        (b"a" * 500 + b"\xe9", "is not UTF-8 at byte 500"),
    ],
)
def test_what_is_no_text_or_too_short_is_refused_in_one_line(
    tmp_path, content, message
):
    path = tmp_path / "abc.txt"
    if content is not None:
        path.write_bytes(content)
    for read in (text.load, text.about):
        with pytest.raises(UsageError, match=message) as refusal:
            read(path, LENGTH)
        assert str(refusal.value).startswith(f"{path} ")
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [100, 101, 119])
def test_a_text_of_the_least_length_has_a_window_in_every_part(tmp_path, size):
    path = tmp_path / "abc.txt"
    path.write_bytes(b"a" * size)
    for split in ("train", "valid", "test"):
        assert text.load(path, LENGTH, split).judged_WxT1.shape[1] == LENGTH + 1
        assert len(text.load(path, LENGTH, split).judged_WxT1) >= 1


def test_a_python_without_its_documentation_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match="without its documentation") as refusal:
        text.load(None, LENGTH)
    assert "\n" not in str(refusal.value)
