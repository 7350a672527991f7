import hashlib
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

from experiments.config import UsageError
from experiments.tasks import piano_rolls

STEPS = {"train": (1, 2, 5, 9), "valid": (4, 1, 8, 2), "test": (3,)}


def make_tunes():
    """Tunes whose steps have at least one key down."""
    rng = np.random.default_rng(0)
    rolls = {
        split: [(rng.random((count, 88)) < 0.2).astype(np.uint8) for count in counts]
        for split, counts in STEPS.items()
    }
    for tunes in rolls.values():
        for tune in tunes:
            tune[:, 40] = 1
            tune[:, 87] = 0
    return rolls


TUNES = make_tunes()


def arrays():
    """The tunes as an .npz file has them."""
    rolls = {f"{split}_roll": np.concatenate(tunes) for split, tunes in TUNES.items()}
    lengths = {f"{split}_lengths": np.array(counts) for split, counts in STEPS.items()}
    return {**rolls, **lengths}


def cells():
    """The tunes as a .mat file has them."""
    found = {}
    for split, tunes in TUNES.items():
        found[f"{split}data"] = np.empty((1, len(tunes)), object)
        found[f"{split}data"][0] = [*map(np.float64, tunes)]
    return found


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tunes.npz"
    np.savez(path, **arrays())
    return path


def transitions(split):
    tunes = TUNES[split]
    before = np.concatenate([tune[:-1] for tune in tunes])
    return before, np.concatenate([tune[1:] for tune in tunes])


def loss_and_error(logits, after):
    """In float64, of steps (N, 88): the mean loss per step, and the share wrong."""
    logits = np.asarray(logits, np.float64)
    probability = 1 / (1 + np.exp(-logits))
    right = np.where(after, probability, 1 - probability)
    taken, down = logits > 0, after > 0
    error = (taken != down).sum() / (taken | down).sum()
    return -np.log(right).sum(1).mean(), error


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_file_of_either_form_gives_the_same_task(path, split):
    from_npz = piano_rolls.load(path, 3, split)
    scipy.io.savemat(path.with_suffix(".mat"), cells())
    from_mat = piano_rolls.load(path.with_suffix(".mat"), 3, split)
    assert jax.tree.structure(from_npz) == jax.tree.structure(from_mat)
    for leaf, same in zip(jax.tree.leaves(from_npz), jax.tree.leaves(from_mat)):
        assert leaf.dtype == same.dtype
        np.testing.assert_array_equal(leaf, same)
    judged = np.concatenate(TUNES[split])
    np.testing.assert_array_equal(from_npz.judged.roll_NxK, judged)
    assert (from_npz.features, from_npz.outputs) == (88, 88)
    assert from_npz.unit == "nats per step"


@pytest.mark.usefixtures("strict")
def test_batches_are_windows_from_all_places_in_all_tunes_alike(path):
    sample = jax.jit(piano_rolls.load(path, 4).sample, static_argnums=1)
    batch = sample(jax.random.key(0), 3500)
    assert batch.x_BxTxF.shape == (3500, 4, 88)
    assert batch.x_BxTxF.dtype == jnp.float32
    assert batch.at is None

    def window(x_TxK, next_TxK, asked_T):
        return np.uint8(x_TxK).tobytes(), np.uint8(next_TxK).tobytes(), tuple(asked_T)

    _, two, five, nine = TUNES["train"]
    padding = np.zeros((3, 88))
    expected = [
        window(np.vstack([two[:1], padding]), two[1:], (True, False, False, False)),
        window(five[:4], five[1:], (True,) * 4),
        *(window(nine[s : s + 4], nine[s + 1 : s + 5], (True,) * 4) for s in range(5)),
    ]
    found = Counter(
        window(x_TxK, next_TxK[asked_T], asked_T.tolist())
        for x_TxK, next_TxK, asked_T in zip(
            np.asarray(batch.x_BxTxF),
            np.asarray(batch.target.roll_BxTxK),
            np.asarray(batch.target.asked_BxT),
        )
    )
    assert found.keys() == set(expected)
    # 500 each, with a standard deviation of 21.
    np.testing.assert_allclose([*found.values()], 500, atol=100)
    for leaf, same in zip(
        jax.tree.leaves(batch), jax.tree.leaves(sample(jax.random.key(0), 3500))
    ):
        np.testing.assert_array_equal(leaf, same)
    assert (sample(jax.random.key(1), 3500).x_BxTxF != batch.x_BxTxF).any()


@pytest.mark.usefixtures("strict")
def test_every_step_that_is_asked_weighs_the_same(path):
    task = piano_rolls.load(path, 4)
    rng = np.random.default_rng(1)
    y_BxTxK = rng.normal(0, 2, (3, 4, 88)).astype(np.float32)
    roll_BxTxK = rng.integers(0, 2, (3, 4, 88)).astype(np.uint8)
    asked_BxT = np.arange(4) < np.array([[4], [1], [2]])
    y_BxTxK[~asked_BxT] = np.nan
    target = piano_rolls.Target(jnp.asarray(roll_BxTxK), jnp.asarray(asked_BxT))
    loss, error = jax.jit(task.score)(jnp.asarray(y_BxTxK), target)
    expected = loss_and_error(y_BxTxK[asked_BxT], roll_BxTxK[asked_BxT])
    np.testing.assert_allclose((loss, error), expected, rtol=1e-5)

    silent = target._replace(roll_BxTxK=jnp.zeros((3, 4, 88), jnp.uint8))
    loss, error = jax.jit(task.score)(jnp.zeros((3, 4, 88)), silent)
    np.testing.assert_allclose(loss, 88 * math.log(2), rtol=1e-5)
    assert error == 0


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_every_step_but_the_first_of_a_tune_is_judged_once(
    path, monkeypatch, split, length
):
    """A model without memory must do the same whatever the windows."""
    monkeypatch.setattr(piano_rolls, "BLOCK", 2 * length)
    weights_KxK = np.random.default_rng(2).normal(0, 1, (88, 88)).astype(np.float32)

    def answer(x_BxTxK, at):
        assert at is None
        assert x_BxTxK.shape[0] <= 2
        padding_BxTx1 = jnp.sum(x_BxTxK, -1, keepdims=True) == 0
        return jnp.where(padding_BxTx1, jnp.nan, x_BxTxK @ weights_KxK)

    task = piano_rolls.load(path, length, split)
    score = jax.jit(lambda key: task.judge(answer, key))(jax.random.key(0))
    before, after = transitions(split)
    expected = loss_and_error(before @ weights_KxK, after)
    np.testing.assert_allclose(score, expected, rtol=1e-5)


def test_a_window_starts_where_the_one_before_it_ended(path):
    task = piano_rolls.load(path, 3)
    # Tunes of 4, 1, 8 and 2 steps start at 0, 4, 5 and 13.
    assert task.judged.start_W.tolist() == [0, 5, 8, 11, 13]
    assert task.judged.steps_W.tolist() == [3, 3, 3, 1, 1]


def test_baselines_are_those_of_counts_from_train(path):
    before_train, after_train = transitions("train")
    before, after = transitions("valid")

    def bits(down, chances, is_down):
        rate = (down + 0.5) / (chances + 1)
        return -math.log(rate if is_down else 1 - rate)

    rate = markov = 0.0
    for key in range(88):
        pairs = [*zip(before_train[:, key], after_train[:, key])]
        for was, comes in zip(before[:, key], after[:, key]):
            rate += bits(sum(j for _, j in pairs), len(pairs), comes)
            same = [j for i, j in pairs if i == was]
            markov += bits(sum(same), len(same), comes)
    steps = 3 + 7 + 1
    assert piano_rolls.baselines(path) == pytest.approx(
        {"rate per key": rate / steps, "Markov per key": markov / steps}
    )
    assert piano_rolls.baselines(path, "test") != piano_rolls.baselines(path)


def test_about_names_file_content_and_sizes(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert piano_rolls.about(path) == (
        f"tunes.npz, sha256 {digest}, train 4 tunes / 17 steps, "
        "valid 4 tunes / 15 steps, test 1 tunes / 3 steps"
    )


def test_without_a_file_rolls_are_generated_always_alike():
    about = piano_rolls.about(None)
    assert about.startswith("generated rolls, no real music")
    assert "train 200 tunes" in about
    assert "valid 50 tunes" in about
    assert piano_rolls.about(None) == about
    task = piano_rolls.load(None, 1000)
    for rolls in task.train, task.judged:
        roll_NxK = np.asarray(rolls.roll_NxK)
        np.testing.assert_array_equal(roll_NxK.sum(1), 4)
        steps = np.asarray(rolls.steps_W) + 1
        assert steps.sum() == len(roll_NxK)
        assert 40 <= steps.min() < steps.max() <= 120
    found = piano_rolls.baselines(None)
    assert found["Markov per key"] < 0.6 * found["rate per key"]


NPZ = "It must have arrays SPLIT_roll (steps, 88) of 0 and 1 and SPLIT_lengths, "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_lengths": None}, "has no valid_lengths"),
        ({"test_roll": None}, "has no test_roll"),
        ({"test_roll": np.array([{}])}, "is no .npz file of arrays without objects"),
        ({"test_lengths": np.array([4])}, "has test_lengths with the sum 4"),
        ({"test_lengths": np.array([4, -1])}, "has test_lengths which are no list"),
        ({"test_lengths": np.array([3.0])}, "has test_lengths which are no list"),
        ({"test_lengths": np.array(3)}, "has test_lengths which are no list"),
        ({"test_roll": np.array(1)}, r"test_roll with the shape \(\)"),
        ({"test_roll": np.zeros((3, 87))}, r"tune of shape \(3, 87\) and type float64"),
        ({"test_roll": np.zeros(3)}, r"has a tune of shape \(3,\)"),
        ({"test_roll": np.full((3, 88), "1")}, "and type <U1 in test"),
        ({"test_roll": np.full((3, 88), 0.5)}, "has values other than 0 and 1 in test"),
        ({"test_roll": np.full((3, 88), 2)}, "has values other than 0 and 1 in test"),
        ({"test_roll": np.full((3, 88), np.nan)}, "has values other than 0 and 1"),
        (
            {"test_lengths": np.array([1, 1, 1])},
            "has no tune of 2 or more steps in test",
        ),
        (
            {"test_roll": np.zeros((0, 88)), "test_lengths": np.zeros(0, int)},
            "has no tune of 2 or more steps in test",
        ),
    ],
)
def test_another_layout_is_refused_in_one_line(path, changes, message):
    changed = {**arrays(), **changes}
    np.savez(path, **{name: a for name, a in changed.items() if a is not None})
    for read in (lambda path: piano_rolls.load(path, 4), piano_rolls.about):
        with pytest.raises(UsageError, match=message) as refusal:
            read(path)
        line = str(refusal.value)
        assert line.startswith(f"{path} ")
        assert line.endswith(f"{NPZ}SPLIT: train, valid, test.")
        assert "\n" not in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"traindata": None}, "has no cell array traindata"),
        ({"testdata": np.zeros((3, 88))}, "has no cell array testdata"),
        ({"testdata": np.array([[np.zeros((3, 4)), 0]], object)}, r"shape \(3, 4\)"),
        (
            {"testdata": np.array([[np.zeros((3, 88)), np.zeros((0, 88))]], object)},
            r"has a tune of shape \(0, 88\)",
        ),
    ],
)
def test_another_mat_file_is_refused_in_one_line(tmp_path, changes, message):
    path = tmp_path / "tunes.mat"
    changed = {**cells(), **changes}
    scipy.io.savemat(path, {name: a for name, a in changed.items() if a is not None})
    with pytest.raises(UsageError, match=message) as refusal:
        piano_rolls.load(path, 4)
    assert "cell arrays SPLITdata of matrices (steps, 88)" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tunes.npz", None, "cannot be read: No such file or directory"),
        ("tunes.npz", b"", "is no .npz file"),
        ("tunes.npz", b"PK\x03\x04 and no more", "is no .npz file"),
        ("tunes.npz", b"anything else", "is no .npz file"),
        ("tunes.npy", np.lib.format.magic(1, 0), "is no .npz file"),
        ("tunes.mat", b"", "is no .mat file"),
        ("tunes.mat", b"anything else" * 50, "is no .mat file"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as refusal:
        piano_rolls.load(path, 4)
    assert str(refusal.value).startswith(f"{path} ")
    assert "\n" not in str(refusal.value)


def test_one_array_is_no_npz_file(tmp_path):
    np.save(tmp_path / "tunes.npy", np.zeros((3, 88)))
    with pytest.raises(UsageError, match=r"is no \.npz file"):
        piano_rolls.load(tmp_path / "tunes.npy", 4)
