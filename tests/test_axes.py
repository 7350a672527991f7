"""Units are right for real layers, whichever way `axis` is given.

A unit is what one output of a layer sees. The oracles say it twice: with NumPy loops in
float64 over slices that the test writes down by hand, and, for layers that map inputs
to outputs, with the Jacobian of the layer itself.
"""

import functools
import math
import types

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.transforms
import pytest
from flax import nnx
from tables import as_tree

import optaxclip
from optaxclip import axes, scopes

KEY = jax.random.key(7)


def fill(tree, seed=0):
    """The tree with other values, so that no two units have the same norm."""
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(tree)
    values = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return treedef.unflatten(values)


def linen(module, *inputs):
    """The shapes of the params of a Linen module."""
    return jax.eval_shape(module.init, KEY, *inputs)["params"]


def nnx_params(make):
    """The shapes of the params of an NNX module."""
    return nnx.state(nnx.eval_shape(make), nnx.Param)


def equinox(make):
    """The shapes of the arrays of an Equinox module."""
    model = eqx.filter_eval_shape(make, KEY)
    return eqx.filter(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))


def by_path(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}


def norms_by_hand(x, outputs):
    """One norm per entry of the axes `outputs`: loops, float64, nothing else."""
    x = np.asarray(x, np.float64)
    result = np.zeros([n if i in outputs else 1 for i, n in enumerate(x.shape)])
    for index in np.ndindex(*x.shape):
        cell = tuple(j if i in outputs else 0 for i, j in enumerate(index))
        result[cell] += x[index] * x[index]
    return np.sqrt(result)


def check_units(params, axis, expected):
    """Compares magnitudes, resolved axes, the table and a clip with the hand count.

    `expected` maps the path of every leaf to the axes that tell its outputs apart and
    the number of units; leaves that are not in it are one unit.
    """
    params = fill(params)
    leaves = by_path(params)
    assert set(expected) <= set(leaves), sorted(leaves)
    resolved = axes.resolve(axis, params, "test: axis")
    rows = axes.describe(params, axis).splitlines()[1:]

    @jax.jit
    def run(params):
        tx = optaxclip.clip_by_unit_norm(0.25, axis=axis)
        return as_tree(scopes.unit(axis).split(params, None)[0]), tx.update(
            params, None
        )[0]

    seen, clipped = map(by_path, run(params))
    assert list(seen) == list(leaves)
    for (path, leaf), reduced, row in zip(leaves.items(), resolved, rows, strict=True):
        outputs, units = expected.get(path, ((), 1))
        norms = norms_by_hand(leaf, outputs)
        assert norms.size == units, path
        assert seen[path].shape == norms.shape, path
        np.testing.assert_allclose(seen[path], norms, rtol=1e-6, err_msg=path)
        kept = tuple(i for i in range(leaf.ndim) if i not in outputs)
        assert reduced == kept, path
        assert row.split()[0] == path
        assert row.split()[-2:] == [str(units), str(leaf.size // units)], row
        wanted = np.asarray(leaf, np.float64) * np.minimum(1, 0.25 / norms)
        np.testing.assert_allclose(clipped[path], wanted, rtol=1e-5, err_msg=path)


def units_from_jacobian(layer, kernel):
    """Which unit each element of a kernel is in, by what each output depends on."""
    outputs = jax.eval_shape(layer, kernel)
    jacobian = np.asarray(jax.jit(jax.jacrev(layer))(kernel))
    features = outputs.shape[-1]
    jacobian = jacobian.reshape(-1, features, *kernel.shape)
    depends = (jacobian != 0).any(axis=0)
    unit_of = np.full(kernel.shape, -1)
    for j in range(features):
        assert (unit_of[depends[j]] == -1).all(), "outputs share elements"
        unit_of[depends[j]] = j
    assert (unit_of >= 0).all(), "an element feeds no output"
    return unit_of


def check_units_by_jacobian(layer, kernel, reduced):
    unit_of = units_from_jacobian(layer, kernel)
    x = np.asarray(kernel, np.float64)
    norms = np.sqrt(np.bincount(unit_of.ravel(), weights=x.ravel() ** 2))
    summed = np.sqrt((x * x).sum(axis=reduced, keepdims=True))
    wanted = norms[unit_of]
    np.testing.assert_allclose(np.broadcast_to(summed, x.shape), wanted, rtol=1e-12)


# The wrong cases that USERS.md (pain 9) measured in optax.


def attention_params():
    layer = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=8, out_features=6)
    return linen(layer, jnp.ones((2, 3, 10)))


def test_attention_out_kernel_has_6_units_where_rank_gives_12():
    out = fill(attention_params())["out"]["kernel"]
    assert out.shape == (4, 2, 6)
    assert axes.by_rank("out/kernel", out) == (0,)
    by_rank = as_tree(scopes.unit().split({"out": {"kernel": out}}, None)[0])
    assert by_rank["out"]["kernel"].size == 12
    cells, _ = scopes.unit(axes.flax).split({"out": {"kernel": out}}, None)
    named = as_tree(cells)
    assert named["out"]["kernel"].shape == (1, 1, 6)
    wanted = norms_by_hand(out, (2,))
    np.testing.assert_allclose(named["out"]["kernel"], wanted, rtol=1e-6)


def test_conv1d_kernel_has_8_units_where_rank_gives_24():
    params = fill(linen(nn.Conv(8, (5,)), jnp.ones((1, 9, 3))))
    assert params["kernel"].shape == (5, 3, 8)
    assert as_tree(scopes.unit().split(params, None)[0])["kernel"].size == 24
    named = as_tree(scopes.unit(axes.flax).split(params, None)[0])
    assert named["kernel"].shape == (1, 1, 8)
    wanted = norms_by_hand(params["kernel"], (2,))
    np.testing.assert_allclose(named["kernel"], wanted, rtol=1e-6)


class Layer(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(self.features)(x), None


class Stack(nn.Module):
    length: int
    features: int

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.length,
        )
        return nn.Dense(3)(scanned(self.features, name="layers")(x, None)[0])


def test_scanned_dense_has_24_units_and_none_across_layers_where_rank_gives_30():
    stack = fill(np.zeros((4, 5, 6)))
    params = {"layers": {"Dense_0": {"kernel": stack}}}
    cells = as_tree(scopes.unit().split(params, None)[0])
    across = cells["layers"]["Dense_0"]["kernel"]
    assert across.size == 30
    choose = axes.stacked(axes.flax, where="layers/")
    cells = as_tree(scopes.unit(choose).split(params, None)[0])
    units = cells["layers"]["Dense_0"]["kernel"]
    assert units.shape == (4, 1, 6)
    wanted = np.stack([norms_by_hand(layer, (1,)) for layer in stack])
    np.testing.assert_allclose(units, wanted, rtol=1e-6)


def test_a_tuple_axis_that_a_bias_does_not_have_is_refused_naming_the_bias():
    params = {"params": fill(linen(nn.Dense(4), jnp.ones((1, 3))))}
    tx = optaxclip.adaptive_grad_clip(0.1, axis=(0, 1))
    with pytest.raises(ValueError) as refused:
        tx.update(params, tx.init(params), params)
    assert str(refused.value) == (
        "scopes.unit: axis must be in [-1, 1), got 1 at params/bias, shape (4,). Give "
        "this leaf axes of its own: pass a tree of axes or a callable of path and leaf."
    )


GATES = [first + gate for first in "hi" for gate in "figo"]


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell])
def test_units_of_linen_lstm_cells_with_one_kernel_per_gate(cell):
    cell = cell(features=5)
    carry = cell.initialize_carry(KEY, (2, 3))
    params = linen(cell, carry, jnp.ones((2, 3)))
    assert len(jax.tree.leaves(params)) == 12
    check_units(params, axes.flax, {f"{gate}/kernel": ((1,), 5) for gate in GATES})


def test_units_of_nnx_lstm_cell_with_one_kernel_per_gate():
    params = nnx_params(lambda: nnx.LSTMCell(3, 5, rngs=nnx.Rngs(0)))
    assert len(jax.tree.leaves(params)) == 12
    names = ["if_" if gate == "if" else gate for gate in GATES]
    check_units(params, axes.flax, {f"{g}/kernel/value": ((1,), 5) for g in names})


def test_units_of_nnx_optimized_lstm_cell_with_all_gates_in_one_kernel():
    params = nnx_params(lambda: nnx.OptimizedLSTMCell(3, 5, rngs=nnx.Rngs(0)))
    assert len(jax.tree.leaves(params)) == 3
    expected = {f"dense_{d}/kernel/value": ((1,), 20) for d in "hi"}
    check_units(params, axes.flax, expected)


def test_both_lstm_layouts_have_the_same_units():
    """Side by side or apart, a gate's column is one unit: 20 + 20 columns."""

    def kernel_units(cell):
        params = nnx_params(lambda: cell(3, 5, rngs=nnx.Rngs(0)))
        seen = by_path(
            jax.eval_shape(
                lambda p: as_tree(scopes.unit(axes.flax).split(p, None)[0]), params
            )
        )
        return sum(m.size for path, m in seen.items() if "kernel" in path)

    assert kernel_units(nnx.LSTMCell) == kernel_units(nnx.OptimizedLSTMCell) == 40


# Flax.

ATTENTION = {
    "query/kernel": ((1, 2), 8),
    "key/kernel": ((1, 2), 8),
    "value/kernel": ((1, 2), 8),
    "out/kernel": ((2,), 6),
}


def test_units_of_linen_attention():
    check_units(attention_params(), axes.flax, ATTENTION)


def test_units_of_nnx_attention():
    params = nnx_params(
        lambda: nnx.MultiHeadAttention(
            num_heads=4,
            in_features=10,
            qkv_features=8,
            out_features=6,
            decode=False,
            rngs=nnx.Rngs(0),
        )
    )
    expected = {f"{path}/value": units for path, units in ATTENTION.items()}
    check_units(params, axes.flax, expected)


@pytest.mark.parametrize("window", [(3,), (3, 2), (3, 2, 2)])
def test_units_of_flax_convolutions(window):
    rank = len(window) + 2
    expected = ((rank - 1,), 5)
    x = jnp.ones((1, *[4] * len(window), 2))
    params = linen(nn.Conv(5, window), x)
    check_units(params, axes.flax, {"kernel": expected})
    state = nnx_params(lambda: nnx.Conv(2, 5, window, rngs=nnx.Rngs(0)))
    check_units(state, axes.flax, {"kernel/value": expected})


def test_units_of_flax_dense_and_embedding():
    dense = linen(nn.Dense(4), jnp.ones((1, 3)))
    check_units(dense, axes.flax, {"kernel": ((1,), 4)})
    embed = linen(nn.Embed(7, 3), jnp.zeros(1, int))
    check_units(embed, axes.flax, {"embedding": ((0,), 7)})
    state = nnx_params(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    check_units(state, axes.flax, {"kernel/value": ((1,), 4)})
    state = nnx_params(lambda: nnx.Embed(7, 3, rngs=nnx.Rngs(0)))
    check_units(state, axes.flax, {"embedding/value": ((0,), 7)})


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.SimpleCell, nn.MGUCell])
def test_units_of_linen_recurrent_cells(cell):
    cell = cell(features=4)
    carry = cell.initialize_carry(KEY, (2, 3))
    params = linen(cell, carry, jnp.ones((2, 3)))
    kernels = [path for path in by_path(params) if path.endswith("kernel")]
    assert kernels
    check_units(params, axes.flax, {path: ((1,), 4) for path in kernels})


def test_normalisation_layers_are_one_unit_per_leaf():
    params = linen(nn.LayerNorm(), jnp.ones((2, 5)))
    assert sorted(params) == ["bias", "scale"]
    check_units(params, axes.flax, {})


def test_units_of_a_real_scanned_stack_and_the_layer_after_it():
    params = linen(Stack(length=4, features=6), jnp.ones((2, 6)))
    expected = {
        "layers/Dense_0/kernel": ((0, 2), 24),
        "layers/Dense_0/bias": ((0,), 4),
        "Dense_0/kernel": ((1,), 3),
    }
    check_units(params, axes.stacked(axes.flax, where="layers/"), expected)


def test_units_of_an_nnx_stack_made_by_vmap():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(5, 6, rngs=nnx.Rngs(key))

    class Model(nnx.Module):
        def __init__(self):
            self.layers = make(jax.random.split(KEY, 4))

    params = nnx_params(Model)
    expected = {
        "layers/kernel/value": ((0, 2), 24),
        "layers/bias/value": ((0,), 4),
    }
    check_units(params, axes.stacked(axes.flax, where="layers/"), expected)


def test_units_in_lists_of_nnx_layers_whose_path_has_integers():
    def make():
        rngs = nnx.Rngs(0)
        first, last = nnx.Linear(3, 4, rngs=rngs), nnx.Conv(4, 5, (2,), rngs=rngs)
        return nnx.Sequential(first, nnx.relu, last)

    expected = {
        "layers/0/kernel/value": ((1,), 4),
        "layers/2/kernel/value": ((2,), 5),
    }
    check_units(nnx_params(make), axes.flax, expected)


@pytest.mark.parametrize("form", ["state", "pure dict", "graph state"])
def test_every_form_of_nnx_params_gives_the_same_units(form):
    model = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(
            num_heads=2, in_features=6, decode=False, rngs=nnx.Rngs(0)
        )
    )
    state = nnx.state(model, nnx.Param)
    if form == "pure dict":
        params, end = nnx.to_pure_dict(state), ""
    elif form == "graph state":
        params, end = nnx.split(model, nnx.Param, ...)[1], "/value"
    else:
        params, end = state, "/value"
    expected = {
        f"query/kernel{end}": ((1, 2), 6),
        f"key/kernel{end}": ((1, 2), 6),
        f"value/kernel{end}": ((1, 2), 6),
        f"out/kernel{end}": ((2,), 6),
    }
    check_units(params, axes.flax, expected)


def test_units_of_linen_params_boxed_for_partitioning():
    init = nn.with_partitioning(nn.initializers.normal(), (None, None, "model"))
    conv = nn.Conv(5, (3,), kernel_init=init)
    params = linen(conv, jnp.ones((1, 4, 2)))
    assert "kernel/value" in by_path(params)
    check_units(params, axes.flax, {"kernel/value": ((2,), 5)})


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Dense(4), (2, 3)),
        (nn.Dense(4), (2, 1)),
        (nn.Dense(1), (2, 3)),
        (nn.Conv(4, (3,)), (2, 5, 2)),
        (nn.Conv(3, (2, 2)), (1, 3, 3, 2)),
        (nn.Conv(4, (2, 2), feature_group_count=2), (1, 3, 3, 2)),
        (nn.Conv(2, (2, 2, 1)), (1, 2, 2, 2, 2)),
        (nn.ConvTranspose(4, (3,)), (2, 5, 2)),
    ],
)
def test_a_flax_unit_is_what_one_output_depends_on(layer, shape):
    x = fill(np.zeros(shape), 1) + np.float32(3)
    params = fill(linen(layer, x))

    def outputs(kernel):
        return layer.apply({"params": params | {"kernel": kernel}}, x)

    reduced = axes.flax("layer/kernel", params["kernel"])
    check_units_by_jacobian(outputs, params["kernel"], reduced)


@pytest.mark.parametrize("name, shape", [("query", (10, 4, 2)), ("value", (10, 4, 2))])
def test_a_unit_of_attention_projections_is_what_one_feature_depends_on(name, shape):
    kernel = fill(np.zeros(shape))
    x = fill(np.zeros((3, 10)), 1) + np.float32(3)
    layer = nn.DenseGeneral((4, 2), use_bias=False)

    def outputs(kernel):
        return layer.apply({"params": {"kernel": kernel}}, x).reshape(3, 8)

    reduced = axes.flax(f"attention/{name}/kernel", kernel)
    check_units_by_jacobian(outputs, kernel, reduced)


def test_a_unit_of_attention_output_is_what_one_feature_depends_on():
    kernel = fill(np.zeros((4, 2, 6)))
    x = fill(np.zeros((3, 4, 2)), 1) + np.float32(3)
    layer = nn.DenseGeneral(6, axis=(-2, -1), use_bias=False)

    def outputs(kernel):
        return layer.apply({"params": {"kernel": kernel}}, x)

    check_units_by_jacobian(outputs, kernel, axes.flax("attention/out/kernel", kernel))


# Equinox.


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda k: eqx.nn.Linear(3, 4, key=k), {"weight": ((0,), 4)}),
        (lambda k: eqx.nn.Conv1d(3, 4, 5, key=k), {"weight": ((0,), 4)}),
        (lambda k: eqx.nn.Conv2d(3, 4, 2, key=k), {"weight": ((0,), 4)}),
        (lambda k: eqx.nn.Embedding(7, 3, key=k), {"weight": ((0,), 7)}),
        (
            lambda k: eqx.nn.GRUCell(3, 4, key=k),
            {"weight_ih": ((0,), 12), "weight_hh": ((0,), 12)},
        ),
        (
            lambda k: eqx.nn.LSTMCell(3, 4, key=k),
            {"weight_ih": ((0,), 16), "weight_hh": ((0,), 16)},
        ),
        (
            lambda k: eqx.nn.MultiheadAttention(2, 6, output_size=5, key=k),
            {
                "query_proj/weight": ((0,), 6),
                "key_proj/weight": ((0,), 6),
                "value_proj/weight": ((0,), 6),
                "output_proj/weight": ((0,), 5),
            },
        ),
        (
            lambda k: eqx.nn.MLP(2, 3, 4, 1, key=k),
            {"layers/0/weight": ((0,), 4), "layers/1/weight": ((0,), 3)},
        ),
        (lambda k: eqx.nn.LayerNorm(4), {}),
    ],
    ids="linear conv1d conv2d embedding gru lstm attention mlp norm".split(),
)
def test_units_of_equinox_layers(make, expected):
    check_units(equinox(make), axes.equinox, expected)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda k: eqx.nn.Linear(3, 4, key=k), (3,)),
        (lambda k: eqx.nn.Linear(1, 4, key=k), (1,)),
        (lambda k: eqx.nn.Linear(3, 1, key=k), (3,)),
        (lambda k: eqx.nn.Conv1d(2, 4, 3, key=k), (2, 5)),
        (lambda k: eqx.nn.Conv1d(1, 4, 1, key=k), (1, 5)),
        (lambda k: eqx.nn.Conv2d(2, 3, 2, key=k), (2, 3, 3)),
        (lambda k: eqx.nn.Conv2d(2, 4, 2, groups=2, key=k), (2, 3, 3)),
        (lambda k: eqx.nn.ConvTranspose1d(2, 4, 3, key=k), (2, 5)),
    ],
    ids="3to4 1to4 3to1 conv1d conv1to4 conv2d grouped transposed".split(),
)
def test_an_equinox_unit_is_what_one_output_depends_on(make, shape):
    layer = eqx.filter_eval_shape(make, KEY)
    layer = eqx.combine(fill(equinox(make)), layer)
    x = fill(np.zeros(shape), 1) + np.float32(3)

    def outputs(weight):
        y = eqx.tree_at(lambda m: m.weight, layer, weight)(x)
        return jnp.moveaxis(y, 0, -1)

    reduced = axes.equinox("layer/weight", layer.weight)
    check_units_by_jacobian(outputs, layer.weight, reduced)


def test_units_of_an_equinox_stack_made_by_vmap():
    def make(key):
        one = eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 6, key=key))
        layers = one(jax.random.split(key, 4))
        return {"layers": layers, "head": eqx.nn.Linear(6, 2, key=key)}

    expected = {
        "layers/weight": ((0, 1), 24),
        "layers/bias": ((0,), 4),
        "head/weight": ((0,), 2),
    }
    check_units(equinox(make), axes.stacked(axes.equinox, where="layers/"), expected)


# Keras.

KERAS = [
    ("sequential/dense/kernel", (3, 4), (1,), 4),
    ("sequential/dense/bias", (4,), (), 1),
    ("model/conv1d/kernel", (5, 3, 8), (2,), 8),
    ("model/conv2d/kernel", (3, 3, 2, 8), (3,), 8),
    ("model/conv2d/bias", (8,), (), 1),
    ("model/conv3d_1/kernel", (2, 2, 2, 2, 4), (4,), 4),
    ("model/depthwise_conv2d/kernel", (3, 3, 4, 2), (2, 3), 8),
    ("model/depthwise_conv1d_2/kernel", (3, 4, 2), (1, 2), 8),
    ("model/separable_conv2d/depthwise_kernel", (3, 3, 4, 2), (2, 3), 8),
    ("model/separable_conv2d/pointwise_kernel", (1, 1, 8, 5), (3,), 5),
    ("model/conv1d_transpose/kernel", (5, 6, 3), (1,), 6),
    ("model/conv2d_transpose_1/kernel", (3, 3, 6, 2), (2,), 6),
    ("model/multi_head_attention/query/kernel", (10, 4, 2), (1, 2), 8),
    ("model/multi_head_attention/query/bias", (4, 2), (), 1),
    ("model/multi_head_attention/key/kernel", (10, 4, 2), (1, 2), 8),
    ("model/multi_head_attention/value/kernel", (10, 4, 2), (1, 2), 8),
    ("model/multi_head_attention/attention_output/kernel", (4, 2, 6), (2,), 6),
    ("model/lstm/lstm_cell/kernel", (3, 20), (1,), 20),
    ("model/lstm/lstm_cell/recurrent_kernel", (5, 20), (1,), 20),
    ("model/lstm/lstm_cell/bias", (20,), (), 1),
    ("model/gru/gru_cell/bias", (2, 15), (), 1),
    ("model/embedding/embeddings", (7, 3), (0,), 7),
    ("model/batch_normalization/gamma", (8,), (), 1),
    ("kernel", (3, 4), (1,), 4),
]


def test_units_of_keras_variables():
    variables = [types.SimpleNamespace(path=p, shape=s) for p, s, _, _ in KERAS]
    chosen = axes.keras(variables)
    params = [jnp.zeros(shape) for _, shape, _, _ in KERAS]
    expected = {str(i): (row[2], row[3]) for i, row in enumerate(KERAS)}
    check_units(params, chosen, expected)


def test_units_of_one_keras_variable_are_those_of_its_row():
    for path, shape, outputs, _ in KERAS:
        (reduced,) = axes.keras([types.SimpleNamespace(path=path, shape=shape)])
        assert reduced == tuple(i for i in range(len(shape)) if i not in outputs), path


# By rank, as optax.


SHAPES = [
    (), (4,), (1,), (0,),
    (3, 4), (1, 4), (4, 1), (1, 1), (0, 4),
    (2, 3, 4), (1, 3, 4), (2, 1, 4), (2, 3, 1), (1, 1, 4),
    (2, 3, 2, 4), (1, 1, 2, 4), (1, 1, 1, 4), (2, 1, 1, 1),
    (2, 2, 2, 2, 3), (1, 1, 1, 2, 3), (1, 1, 1, 1, 3),
    (1, 1, 1, 1, 1, 3), (1, 1, 1, 1, 1, 1, 1),
]  # fmt: skip


@functools.cache
def unitwise_norms():
    """Ours and optax's for an array of every shape, in one compilation."""
    arrays = fill([np.zeros(shape) for shape in SHAPES])
    both = (optaxclip.unitwise_norm, optax.transforms.unitwise_norm)
    ours, theirs = jax.jit(lambda arrays: [list(map(f, arrays)) for f in both])(arrays)
    return dict(zip(SHAPES, zip(arrays, ours, theirs, strict=True), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_by_rank_is_what_optax_does(shape):
    x, found, wanted = unitwise_norms()[shape]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found.shape == shape
    outputs = [i for i in range(len(shape)) if i not in axes.by_rank("w", x)]
    np.testing.assert_allclose(
        np.broadcast_to(norms_by_hand(x, outputs), shape), wanted, rtol=1e-6
    )


@pytest.mark.parametrize("shape", [(2, 2, 2, 2, 2, 2), (1, 1, 1, 1, 2, 2), (2,) * 7])
def test_by_rank_refuses_ranks_above_5_as_optax_does(shape):
    with pytest.raises(ValueError):
        optax.transforms.unitwise_norm(jnp.ones(shape))
    with pytest.raises(ValueError) as refused:
        axes.by_rank("conv/kernel", jnp.ones(shape))
    assert str(refused.value) == (
        f"axes.by_rank: no default axes for rank {len(shape)}, got shape {shape} at "
        "conv/kernel. Pass axis=."
    )
    with pytest.raises(ValueError, match=r"at conv/kernel\. Pass axis="):
        scopes.unit().split({"conv": {"kernel": jnp.ones(shape)}}, None)
    with pytest.raises(ValueError, match="no default axes for rank"):
        optaxclip.unitwise_norm(jnp.ones(shape))


def test_rank_6_is_fine_with_axes_of_its_own():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2,) * 6), jnp.float32)
    (seen,) = jax.tree.leaves(scopes.unit((0, 1, 2, 3, 4)).split(x, None)[0])
    np.testing.assert_allclose(seen, norms_by_hand(x, (5,)), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, -1, (0, 2), (-1, 0), ()])
def test_unitwise_norm_over_given_axes_is_what_optax_does(axis):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), jnp.float32)
    wanted = optax.transforms.unitwise_norm(x, axis)
    np.testing.assert_allclose(optaxclip.unitwise_norm(x, axis), wanted, rtol=1e-6)


# All ways of saying the same.

PARAMS = {
    "cell": {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(6.0).reshape(3, 2)},
    "head": [jnp.arange(6.0).reshape(2, 3)],
}

SAME = {
    "rank": None,
    "int": 0,
    "negative": -2,
    "tuple": (0,),
    "negative tuple": (-2,),
    "callable": lambda path, leaf: 0,
    "callable of shape": lambda path, leaf: (jnp.ndim(leaf) - 2,),
    "callable by rank": axes.by_rank,
    "flax": lambda path, leaf: axes.flax("kernel", leaf),
    "tree": {"cell": {"a": 0, "b": -2}, "head": [(0,)]},
    "prefix": {"cell": 0, "head": None},
    "prefix of callables": {"cell": axes.by_rank, "head": [lambda path, leaf: -2]},
    "stacked nowhere": axes.stacked(None, where="no such layer"),
}


@pytest.mark.parametrize("name", SAME)
def test_axes_that_mean_the_same_give_the_same(name):
    assert axes.resolve(SAME[name], PARAMS, "test: axis") == [(0,), (0,), (0,)]
    tx = optaxclip.adaptive_grad_clip(0.1, axis=SAME[name])
    updates = fill(PARAMS, 3)
    clipped, _ = tx.update(updates, tx.init(PARAMS), PARAMS)
    for u, p, c in zip(*map(jax.tree.leaves, (updates, PARAMS, clipped)), strict=True):
        limit = 0.1 * np.maximum(norms_by_hand(p, (1,)), 1e-3)
        factor = np.minimum(1, limit / norms_by_hand(u, (1,)))
        np.testing.assert_allclose(c, np.asarray(u, np.float64) * factor, rtol=1e-5)


def test_the_order_of_axes_does_not_matter():
    x = {"w": jnp.zeros((2, 3, 4))}
    for axis in [(0, 2), (2, 0), (-1, 0), (0, -1), (-3, -1)]:
        assert axes.resolve(axis, x, "test: axis") == [(0, 2)]


def test_no_axes_make_every_element_a_unit():
    x = {"w": jnp.array([[3.0, -4.0]]), "s": jnp.array(-2.0)}
    seen = as_tree(scopes.unit(()).split(x, None)[0])
    assert seen["w"].tolist() == [[3.0, 4.0]]
    assert float(seen["s"]) == 2.0


def test_a_callable_gets_the_path_and_the_leaf():
    heard = []

    def choose(path, leaf):
        heard.append((path, leaf.shape))
        return ()

    axes.resolve(choose, PARAMS, "test: axis")
    assert heard == [("cell/a", (3, 4)), ("cell/b", (3, 2)), ("head/0", (2, 3))]


def test_a_stacked_leaf_is_chosen_by_part_of_its_path_or_a_predicate():
    x = {"layers": {"w": jnp.zeros((5, 3, 4))}, "w": jnp.zeros((5, 3, 4))}
    for where in ("layers/", lambda path: path.startswith("layers")):
        choose = axes.stacked(0, where=where)
        assert axes.resolve(choose, x, "test: axis") == [(1,), (0,)]
    for one in (-1, (-1,), lambda path, leaf: leaf.ndim - 1):
        choose = axes.stacked(one, where="layers/")
        assert axes.resolve(choose, x, "test: axis") == [(2,), (2,)]


def test_the_prefix_may_stop_at_or_name_leaves_that_do_not_count():
    """Buffers of integers and masked leaves have no units, in any tree of axes."""
    tree = {"w": jnp.ones((2, 3)), "n": jnp.arange(3), "m": None}
    for axis in ({"w": 0, "n": 0, "m": 0}, {"w": 0, "n": None, "m": None}):
        assert axes.resolve(axis, tree, "test: axis") == [(0,)]
    assert axes.resolve({"x": 0}, {"x": tree}, "test: axis") == [(0,)]
    assert axes.resolve({"x": None}, {"x": tree}, "test: axis") == [(0,)]


def test_keras_axes_fit_a_list_that_holds_an_integer_variable():
    paths = [("dense/kernel", (2, 3)), ("seed_generator/state", (2,))]
    variables = [types.SimpleNamespace(path=p, shape=s) for p, s in paths]
    params = [jnp.ones((2, 3)), jnp.zeros(2, jnp.uint32)]
    assert axes.resolve(axes.keras(variables), params, "test: axis") == [(0,)]


# Refusals.


def refusal(axis, tree=None, error=ValueError):
    tree = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)} if tree is None else tree
    messages = set()
    for call in (
        lambda: scopes.unit(axis).split(tree, None),
        lambda: optaxclip.clip_by_unit_norm(1.0, axis=axis).init(tree),
        lambda: optaxclip.clip_by_unit_norm(1.0, axis=axis).update(tree, None),
        lambda: optaxclip.adaptive_grad_clip(1.0, axis=axis).update(tree, None, tree),
    ):
        with pytest.raises(error) as refused:
            call()
        messages.add(str(refused.value))
    (message,) = messages
    with pytest.raises(error) as refused:
        axes.describe(tree, axis)
    assert str(refused.value) == message.replace("scopes.unit", "axes.describe")
    return message


OWN = (
    " Give this leaf axes of its own: pass a tree of axes or a callable of path and "
    "leaf."
)
STATIC = " Axes are static: with inject_hyperparams, name them in static_args."


@pytest.mark.parametrize(
    "axis, got",
    [
        (1, "[-1, 1), got 1 at b, shape (3,)."),
        (-2, "[-1, 1), got -2 at b, shape (3,)."),
        ((0, 1), "[-1, 1), got 1 at b, shape (3,)."),
        ({"w": 2, "b": 0}, "[-2, 2), got 2 at w, shape (2, 3)."),
        ({"w": (0, -3), "b": 0}, "[-2, 2), got -3 at w, shape (2, 3)."),
        (lambda path, leaf: 1, "[-1, 1), got 1 at b, shape (3,)."),
    ],
)
def test_an_axis_out_of_range_is_refused_naming_the_leaf(axis, got):
    assert refusal(axis) == f"scopes.unit: axis must be in {got}{OWN}"


def test_a_scalar_has_no_axis():
    message = refusal(0, {"s": jnp.array(1.0)})
    assert message == f"scopes.unit: axis must be in [0, 0), got 0 at s, shape ().{OWN}"


@pytest.mark.parametrize("axis", [(0, 0), (0, -2), (1, -1, 0)])
def test_a_repeated_axis_is_refused_naming_the_leaf(axis):
    message = refusal({"w": axis, "b": 0})
    assert message == (
        f"scopes.unit: axis must name each axis once, got {axis} at w, shape (2, 3). "
        "Remove the repeated one."
    )


@pytest.mark.parametrize(
    "axis, at",
    [
        (True, "True at b"),
        (1.5, "1.5 at b"),
        ("flax", "'flax' at b"),
        ({"w": (0, True), "b": 0}, "True at w"),
        (lambda path, leaf: [0], "[0] at b"),
        (lambda path, leaf: 0.0, "0.0 at b"),
    ],
)
def test_what_is_no_int_is_refused_naming_the_leaf(axis, at):
    message = refusal(axis, error=TypeError)
    assert message == f"scopes.unit: axis must hold ints, got {at}.{STATIC}"


@pytest.mark.parametrize("jit", [False, True])
def test_an_axis_traced_by_inject_hyperparams_is_refused_with_the_way_out(jit):
    params = {"w": jnp.ones((2, 3))}
    wrapped = optax.inject_hyperparams(optaxclip.clip_by_unit_norm)
    init = wrapped(max_norm=1.0, axis=0).init
    with pytest.raises(TypeError) as refused:
        (jax.jit(init) if jit else init)(params)
    message = str(refused.value)
    assert message.startswith("scopes.unit: axis must hold ints, got ")
    assert message.endswith(f" at w.{STATIC}")
    static = optax.inject_hyperparams(
        optaxclip.clip_by_unit_norm, static_args=("axis",)
    )(max_norm=1.0, axis=0)
    state = (jax.jit(static.init) if jit else static.init)(params)
    clipped, _ = static.update(params, state)
    np.testing.assert_allclose(clipped["w"], np.full((2, 3), math.sqrt(0.5)), rtol=1e-6)


def test_a_prefix_without_a_leaf_is_refused_naming_the_leaf():
    assert refusal({"w": 0}) == (
        "scopes.unit: axis has no value for b, got values for w. Add one for it or for "
        "a branch above it, or pass one value for all."
    )
    assert refusal({"w": 0, "b": {"x": 0}}) == (
        "scopes.unit: axis has no value for b, got values for b/x, w. Add one for it "
        "or for a branch above it, or pass one value for all."
    )


def test_a_prefix_with_a_leaf_too_many_is_refused_naming_the_leaf():
    assert refusal({"w": 0, "b": 0, "c": 0}) == (
        "scopes.unit: axis has a value for c, which does not exist; there are b, w. "
        "Remove it or correct its name."
    )


def test_other_containers_than_the_tree_are_refused():
    message = refusal([0], [jnp.ones((2, 3)), jnp.ones(3)])
    assert message.startswith("scopes.unit: axis has no value for 1, got values for 0.")


def test_a_scalar_cannot_be_stacked():
    choose = axes.stacked(None, where="layers/")
    with pytest.raises(ValueError) as refused:
        axes.resolve(choose, {"layers": {"s": jnp.array(1.0)}}, "test: axis")
    assert str(refused.value) == (
        "axes.stacked: a stacked leaf needs an axis of layers, got shape () at "
        "layers/s. Narrow where=."
    )


def test_axes_of_a_stacked_layer_are_those_of_one_layer():
    choose = axes.stacked(2, where="layers/")
    with pytest.raises(ValueError) as refused:
        axes.resolve(choose, {"layers": {"w": jnp.ones((5, 3, 4))}}, "test: axis")
    assert str(refused.value).startswith(
        "axes.stacked: axis must be in [-2, 2), got 2 at layers/w, shape (3, 4)."
    )


# The table.


def test_describe_writes_one_row_per_leaf_with_units():
    tree = {
        "Embed_0": {"embedding": jax.ShapeDtypeStruct((1000, 64), jnp.bfloat16)},
        "attention": {
            "out": {"kernel": jax.ShapeDtypeStruct((4, 16, 64), jnp.float32)},
            "query": {
                "bias": jax.ShapeDtypeStruct((4, 16), jnp.float32),
                "kernel": jax.ShapeDtypeStruct((64, 4, 16), jnp.float32),
            },
        },
        "scale": jax.ShapeDtypeStruct((), jnp.float32),
        "steps": jax.ShapeDtypeStruct((3,), jnp.int32),
        "unused": None,
    }
    assert axes.describe(tree, axes.flax).splitlines() == [
        "leaf                    shape        axes    units  elements",
        "Embed_0/embedding       (1000, 64)   (1,)     1000        64",
        "attention/out/kernel    (4, 16, 64)  (0, 1)     64        64",
        "attention/query/bias    (4, 16)      (0, 1)      1        64",
        "attention/query/kernel  (64, 4, 16)  (0,)       64        64",
        "scale                   ()           ()          1         1",
    ]


def test_describe_needs_no_arrays_and_makes_none():
    model = nn.Dense(4096)
    shapes = jax.eval_shape(model.init, KEY, jnp.ones((1, 2048)))
    assert axes.describe(shapes, axes.flax).splitlines() == [
        "leaf           shape         axes  units  elements",
        "params/bias    (4096,)       (0,)      1      4096",
        "params/kernel  (2048, 4096)  (0,)   4096      2048",
    ]


def test_describe_without_axis_shows_what_rank_gives():
    params = {"Conv_0": {"kernel": np.zeros((3, 8, 16), np.float32)}}
    assert axes.describe(params).splitlines() == [
        "leaf           shape       axes  units  elements",
        "Conv_0/kernel  (3, 8, 16)  (0,)    128         3",
    ]


def test_describe_of_one_array_and_of_nothing():
    assert axes.describe(jnp.zeros((2, 3))).splitlines() == [
        "leaf  shape   axes  units  elements",
        ".     (2, 3)  (0,)      3         2",
    ]
    assert axes.describe({}) == "leaf  shape  axes  units  elements"


def test_describe_of_an_empty_array_has_no_elements():
    row = axes.describe({"w": jnp.zeros((0, 3))}).splitlines()[1]
    assert row.split()[-2:] == ["3", "0"]
