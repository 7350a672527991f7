import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks import sequences

NAMES = list(sequences.TASKS)
ORDERS = ["torder", "torder3"]
NUMBERS = ["add", "mul"]
PADDING = -1
LENGTHS, BATCHES, BATCH = (10, 30), 1000, 8


def solve_order(x, xp):
    """The k-th of A and B counts 2^k if it is B."""
    found = x[..., 0] + x[..., 1]
    return (x[..., 1] * 2 ** (found.cumsum(1) - found)).sum(1).astype(int)


def solve_mem(x, xp):
    cue_Bx1 = x[..., 6].argmax(1)[:, None]
    step_1xT = xp.arange(x.shape[1])[None]
    since_BxT = xp.maximum(step_1xT - cue_Bx1, 0)
    memory_BxT = xp.take_along_axis(x.argmax(-1), since_BxT, 1)
    return xp.where(step_1xT < cue_Bx1, 5, memory_BxT)


SOLVE = {
    "torder": solve_order,
    "torder3": solve_order,
    "add": lambda x, xp: (x[..., 0] * x[..., 1]).sum(1) / 2,
    "mul": lambda x, xp: xp.where(x[..., 0] == 1, x[..., 1], 1).prod(1),
    "perm": lambda x, xp: x[:, 0].argmax(-1),
    "mem": solve_mem,
}


def letters(text):
    return np.eye(6)[["ABcdef".index(letter) for letter in text]]


MEMORY = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
LITERALS = [
    ("torder", letters("cAdefAcdef"), 0),
    ("torder", letters("fBecdAcddf"), 1),
    ("torder", letters("cAdefBcdef"), 2),
    ("torder", letters("eBffcBdede"), 3),
    ("torder3", letters("cAdBefAcde"), 2),
    ("torder3", letters("cBdAefBcde"), 5),
    ("add", np.array([(1, 0.5), (0, 0.875), (1, 0.25), (0, 0.125)]), 0.375),
    ("mul", np.array([(1, 0.5), (0, 0.875), (1, 0.25), (0, 0.125)]), 0.125),
    ("perm", np.eye(100)[[1, 7, 99, 2]], 1),
    ("perm", np.eye(100)[[0, 2, 2]], 0),
    ("mem", np.eye(7)[[*MEMORY, 5, 5, 6, *[5] * 9]], [*[5] * 12, *MEMORY]),
]


# Nothing here is about speed, but compiling takes most of the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def sampler(name, length):
    task = sequences.make(name, length)
    sample = jit(jax.vmap(functools.partial(task.sample, batch=BATCH)))
    return lambda keys: jax.device_get(sample(keys))


@functools.cache
def drawn(name, length=LENGTHS):
    """Returns batches of fresh keys, along the first axis."""
    return sampler(name, length)(jax.random.split(jax.random.key(0), BATCHES))


@functools.cache
def scorer(name):
    return jit(sequences.make(name, 10).score)


def places(name, x):
    """Returns where A, B or a marker stands, in order: (B, K)."""
    marked = x[..., 0] if name in NUMBERS else x[..., 0] + x[..., 1]
    count = {"torder3": 3}.get(name, 2)
    np.testing.assert_array_equal(marked.sum(-1), count)
    return np.nonzero(marked)[-1].reshape(*marked.shape[:-1], count)


def assert_uniform(values, kinds):
    """Each of the kinds is as frequent as the others, within 5 standard deviations."""
    found, counts = np.unique(values, return_counts=True)
    np.testing.assert_array_equal(found, kinds)
    expected = values.size / len(kinds)
    deviation = math.sqrt(expected * (1 - 1 / len(kinds)))
    np.testing.assert_allclose(counts, expected, atol=5 * deviation)


def confident(label, outputs):
    return 50 * jax.nn.one_hot(label, outputs)


@pytest.mark.parametrize(("name", "x", "answer"), LITERALS)
def test_the_oracles_answer_literal_sequences(name, x, answer):
    np.testing.assert_array_equal(SOLVE[name](x[None], np), [answer])


@pytest.mark.parametrize("name", NAMES)
def test_the_target_follows_from_the_inputs(name):
    x, _, target = drawn(name)
    x, target = np.concatenate(x), np.concatenate(target)
    answer = np.where(target == PADDING, PADDING, SOLVE[name](x, np))
    np.testing.assert_allclose(answer, target, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [
        ("torder", 10, [{1}, {5}]),
        ("torder", 29, [{2, 3}, {14, 15}]),
        ("torder3", 19, [{1}, {5}, {11}]),
        ("torder3", 29, [{2, 3}, {8, 9}, {17, 18}]),
        ("add", 10, [{0}, {1, 2, 3, 4}]),
        ("add", 29, [{0, 1}, {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}]),
        ("mul", 19, [{0}, {1, 2, 3, 4, 5, 6, 7}]),
    ],
)
def test_places_are_all_those_of_their_intervals(name, length, expected):
    x, at, _ = drawn(name)
    places_BxK = places(name, np.concatenate(x[at == length - 1]))
    for place_B, interval in zip(places_BxK.T, expected):
        assert_uniform(place_B, sorted(interval))


@pytest.mark.parametrize(
    ("name", "begins", "widths"),
    [
        ("torder", [0.1, 0.5], [0.1, 0.1]),
        ("torder3", [0.1, 0.3, 0.6], [0.1, 0.1, 0.1]),
        ("add", [0.0, 0.1], [0.1, 0.4]),
        ("mul", [0.0, 0.1], [0.1, 0.4]),
    ],
)
def test_places_move_with_the_length_of_the_batch(name, begins, widths):
    """The intervals are written with floats, as published."""
    x, at, _ = drawn(name)
    for places_BxK, length in zip(places(name, x), at + 1):
        for place_B, begin, width in zip(places_BxK.T, begins, widths):
            first = int(length * begin)
            assert (first <= place_B).all()
            assert (place_B < first + int(length * width)).all()


@pytest.mark.parametrize("count", [1, 2, 3, 98, 1000, 4097, 2**23 - 1])
def test_the_largest_number_below_1_gives_the_last_of_the_integers(count):
    below = np.nextafter(np.float32(1), np.float32(0))
    assert sequences._choose(below, 5, 5 + count) == 5 + count - 1
    assert sequences._choose(np.float32(0), 5, 5 + count) == 5


@pytest.mark.parametrize("count", [1, 3, 4, 5, 6])
def test_tenths_of_integers_are_those_of_floats_rounded_down(count):
    for length in range(1001):
        assert sequences.tenths(count, length) == int(length * (count / 10))


@pytest.mark.parametrize("name", ORDERS)
def test_noise_and_what_stands_in_it_are_uniform(name):
    x, _, label = drawn(name)
    symbol = x.argmax(-1)
    assert_uniform(symbol[symbol >= 2], [2, 3, 4, 5])
    assert_uniform(label, range({"torder": 4, "torder3": 8}[name]))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_uniform(name):
    x, at, _ = drawn(name)
    number = x[:, :, : at.min() + 1, 1]
    assert number.min() >= 0
    assert number.max() < 1
    assert_uniform(np.floor(number * 16), range(16))


def test_the_first_symbol_of_perm_is_one_of_two_and_the_others_are_not():
    x, at, _ = drawn("perm")
    symbol = x[:, :, : at.min() + 1].argmax(-1)
    assert_uniform(symbol[:, :, 0], [0, 1])
    assert_uniform(symbol[:, :, 1:], range(2, 100))


def test_mem_shows_ten_symbols_then_blanks_with_a_cue():
    x, at, _ = drawn("mem")
    assert at is None
    assert_uniform(x[:, :, :10].argmax(-1), range(5))
    cue = x[..., 6]
    np.testing.assert_array_equal(cue.sum(-1), 1)
    length = cue.argmax(-1) - 10
    assert_uniform(length[:, 0], range(*LENGTHS))
    step = np.arange(x.shape[2] - 10)
    blank = (step < length[..., None] + 10) & (step != length[..., None])
    np.testing.assert_array_equal(x[:, :, 10:, 5], blank)


@pytest.mark.parametrize(
    ("name", "length", "ends"),
    [
        ("torder", LENGTHS, range(10, 30)),
        ("torder3", LENGTHS, range(10, 30)),
        ("perm", LENGTHS, range(10, 30)),
        ("add", 30, [30, 31, 32]),
    ],
)
def test_a_batch_has_one_length_out_of_all(name, length, ends):
    _, at, _ = drawn(name, length)
    assert at.dtype == np.int32
    assert_uniform(at + 1, ends)


@pytest.mark.parametrize("name", NAMES)
def test_steps_after_the_end_are_zeros(name):
    x, at, target = drawn(name)
    if name == "mem":
        at = x[..., 6].argmax(-1)[:, 0] + 9
        after = np.arange(x.shape[2]) > at[:, None, None]
        np.testing.assert_array_equal(target == PADDING, after.repeat(BATCH, 1))
    after_NxT = np.arange(x.shape[2]) > at[:, None]
    np.testing.assert_array_equal((x == 0).all((1, 3)), after_NxT)
    if name not in NUMBERS:
        ones = np.broadcast_to(~after_NxT[:, None], x.shape[:3])
        np.testing.assert_array_equal(x.sum(-1), ones)


@pytest.mark.parametrize(
    ("name", "length", "shape"),
    [
        ("torder", 30, (30, 6)),
        ("torder3", (10, 41), (40, 6)),
        ("add", 30, (32, 2)),
        ("mul", (10, 41), (43, 2)),
        ("perm", 1, (1, 100)),
        ("mem", 30, (50, 7)),
    ],
)
def test_shapes_are_static_and_those_of_the_longest(strict, name, length, shape):
    task = sequences.make(name, length)
    sample = jax.vmap(functools.partial(task.sample, batch=4))
    x, _, target = jax.eval_shape(sample, jax.random.split(jax.random.key(0), 3))
    assert x.shape == (3, 4, *shape)
    assert x.dtype == np.float32
    assert target.shape == ((3, 4, shape[0]) if name == "mem" else (3, 4))
    assert task.features == shape[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_key_decides(name):
    first = drawn(name)
    again, other = (
        sampler(name, LENGTHS)(jax.random.split(jax.random.key(seed), BATCHES))
        for seed in (0, 1)
    )
    for old, same in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(old, same)
    assert (first.x_BxTxF != other.x_BxTxF).any((2, 3)).mean() > 0.99


@pytest.mark.parametrize("name", [*ORDERS, "perm"])
def test_labels_are_scored_by_cross_entropy_and_argmax(name):
    outputs = sequences.make(name, 10).outputs
    label_B = jnp.array([0, 1, 2, 3])
    right = confident(label_B, outputs)
    np.testing.assert_allclose(scorer(name)(right, label_B), (0, 0), atol=1e-6)
    one_wrong = confident(label_B.at[2].set(1), outputs)
    np.testing.assert_allclose(scorer(name)(one_wrong, label_B), (50 / 4, 1 / 4))
    np.testing.assert_allclose(
        scorer(name)(0 * right, label_B), (math.log(outputs), 3 / 4), rtol=1e-6
    )


def test_a_sequence_of_mem_is_wrong_if_any_step_is():
    label_BxT = jnp.array([[*[5] * 12, *MEMORY], [*[5] * 12, *MEMORY[::-1]]])
    right = confident(label_BxT, 6)
    np.testing.assert_allclose(scorer("mem")(right, label_BxT), (0, 0), atol=1e-6)
    for steps in ([0], [13], [3, 21]):
        given = label_BxT.at[1, jnp.array(steps)].add(-1) % 6
        score = scorer("mem")(confident(given, 6), label_BxT)
        np.testing.assert_allclose(score, (50 * len(steps) / 44, 1 / 2), rtol=1e-6)
    equal = scorer("mem")(0 * right, label_BxT)
    np.testing.assert_allclose(equal, (math.log(6), 1), rtol=1e-6)


def test_answers_of_mem_after_the_end_do_not_matter():
    label_BxT = jnp.array([[*[5] * 10, *MEMORY, -1, -1]])
    y = jnp.asarray(np.random.default_rng(0).normal(size=(1, 22, 6)), jnp.float32)
    ended = scorer("mem")(y[:, :20], label_BxT[:, :20])
    np.testing.assert_allclose(scorer("mem")(y, label_BxT), ended, rtol=1e-6)
    assert scorer("mem")(confident(label_BxT, 6), label_BxT).error == 0
    score = sequences.make("mem", 10).score
    slope = jit(jax.grad(lambda y: score(y, label_BxT).loss))(y)
    np.testing.assert_array_equal((slope != 0).any((0, 2)), [True] * 20 + [False] * 2)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_wrong_if_their_squared_error_is_above_4_hundredths(name):
    target_B = jnp.array([0.5, 0.9, 0.25, 0.0])
    assert scorer(name)(target_B[:, None], target_B) == (0, 0)
    y_Bx1 = jnp.array([[0.5], [0.71], [0.46], [0.0]])
    expected = ((0.19**2 + 0.21**2) / 4, 1 / 4)
    np.testing.assert_allclose(scorer(name)(y_Bx1, target_B), expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_wrong(name):
    target = jnp.zeros((2, 22) if name == "mem" else 4, int)
    y = jnp.full((*target.shape, sequences.make(name, 10).outputs), jnp.nan)
    assert scorer(name)(y, target).error == 1


@pytest.mark.parametrize(
    ("name", "constant", "loss", "error"),
    [
        ("torder", 0, math.log(4), 3 / 4),
        ("torder3", 0, math.log(8), 7 / 8),
        # The mean of two has density 4y up to 1/2 and its mirror image above; the
        # product has density -log y.
        ("add", 1 / 2, 1 / 24, 2 * 2 * 0.3**2),
        (
            "mul",
            1 / 4,
            1 / 9 - 1 / 16,
            0.05 * (1 - math.log(0.05)) + 1 - 0.45 * (1 - math.log(0.45)),
        ),
        ("perm", 0, math.log(100), 1 / 2),
        ("mem", 0, math.log(6), 1),
    ],
)
def test_a_perfect_model_is_never_wrong_and_a_constant_one_by_chance(
    name, constant, loss, error
):
    keys, examples = jax.random.split(jax.random.key(0)), 6000
    task = sequences.make(name, (10, 21), examples)

    def judge(key, perfect):
        def answer(x, at):
            right = SOLVE[name](x, jnp)
            y = right[:, None] if name in NUMBERS else confident(right, task.outputs)
            return jnp.where(perfect, y, constant)

        return task.judge(answer, key)

    both = jax.vmap(jax.vmap(judge, (0, None)), (None, 0))
    found = jit(both)(keys, jnp.array([True, False]))
    np.testing.assert_allclose([part[0] for part in found], 0, atol=1e-6)
    deviation = math.sqrt(error * (1 - error) / examples)
    np.testing.assert_allclose(found.error[1], error, atol=5 * deviation)
    np.testing.assert_allclose(found.loss[1], loss, atol=0.005)
    if deviation:
        # Were all blocks of 100 the same, it would be in whole percents.
        percent = 100 * found.error[1]
        assert abs(percent - percent.round()).max() > 1e-3


@pytest.mark.parametrize(
    ("examples", "block"), [(7, 7), (100, 100), (200, 100), (10_000, 100)]
)
def test_models_are_judged_on_the_examples_in_blocks(examples, block):
    task = sequences.make("torder", 10, examples)
    assert task.blocks == examples // block

    def answer(x, at):
        assert x.shape == (block, 10, 6)
        assert at.shape == ()
        return jnp.zeros((block, 4))

    jax.eval_shape(functools.partial(task.judge, answer), jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("torder", 10),
        ("torder3", 10),
        ("add", 10),
        ("mul", 10),
        ("perm", 1),
        ("mem", 0),
    ],
)
def test_too_short_lengths_are_refused(name, smallest):
    sequences.check_length(name, smallest)
    sequences.check_length(name, (smallest, smallest + 1))
    for length in (smallest - 1, (smallest - 1, 100)):
        with pytest.raises(ValueError) as refusal:
            sequences.make(name, length)
        assert str(refusal.value) == (
            f"length of {name} must be >= {smallest}, got length={length}."
        )


def test_ranges_without_a_length_are_refused():
    with pytest.raises(ValueError, match=r"got length=\(20, 20\)\.$"):
        sequences.check_length("add", (20, 20))


@pytest.mark.parametrize("examples", [0, 101, 250])
def test_numbers_of_examples_that_make_no_blocks_are_refused(examples):
    with pytest.raises(ValueError, match=f"got examples={examples}\\.$"):
        sequences.make("add", 20, examples)
