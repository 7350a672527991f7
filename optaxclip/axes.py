"""Which slices of a parameter feed one output: the units of unit-wise clipping.

A *unit* is what one output sees: a column of a Dense kernel `(in, out)`, the patch of a
convolution kernel behind one output channel, a whole bias. Which axes a unit spans
depends on the layer and the layout of its framework, so every place that takes `axis`
takes any of

* None: chosen by rank, as optax does (`by_rank`);
* an int or a plain tuple of ints: the axes reduced, the same for every leaf;
* a pytree prefix of the params holding these;
* a callable of the leaf's path (`"encoder/out/kernel"`) and the leaf: `flax`,
  `equinox`, `stacked(...)`, or your own.

`describe(params, axis)` shows what any of them does to a model.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _trees

Axes = int | tuple[int, ...] | None
AxesOf = Callable[[str, Any], Axes]


def by_rank(path: str, leaf: Any) -> tuple[int, ...]:
    """Chooses the axes of a unit by rank, as `optax.adaptive_grad_clip` does.

    Vectors, and arrays with at most one axis longer than 1, are one unit. Rank 2 and 3
    reduce axis 0, rank 4 reduces (0, 1, 2), rank 5 reduces (0, 1, 2, 3): right for
    Dense kernels, attention's query, key and value, Conv2D and Conv3D with the input
    axes first. **Wrong** for attention's output kernel, Conv1D, layers stacked by a
    scan, and layouts with the output axis first: use `flax`, `keras`, `equinox`,
    `stacked`.

    Args:
      path: name of the leaf; not used.
      leaf: anything with a shape.

    Returns:
      The axes to reduce.

    Raises:
      ValueError: for rank 6 and above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import axes
      >>> axes.by_rank("kernel", jnp.zeros((3, 3, 8, 16)))
      (0, 1, 2)
    """
    shape = jnp.shape(leaf)
    if sum(size != 1 for size in shape) <= 1:
        return tuple(range(len(shape)))
    if len(shape) > 5:
        raise ValueError(
            f"axes.by_rank: no default axes for rank {len(shape)}, got shape {shape} "
            f"at {path}. Pass axis=."
        )
    return (0,) if len(shape) <= 3 else tuple(range(len(shape) - 1))


def flax(path: str, leaf: Any) -> tuple[int, ...]:
    """Chooses the axes of a unit in a Flax model (Linen or NNX) by name and rank.

    | leaf | unit | axes reduced |
    |---|---|---|
    | `kernel` under `query`, `key`, `value` `(in, heads, dim)` | one feature | 0 |
    | any other `kernel` `(..., in, out)`: Dense, Conv, attention `out` | one output | all but the last |
    | `embedding` `(tokens, features)` | one token | the last |
    | anything else (`bias`, `scale`, ...) | the whole leaf | all |

    The LSTM and GRU cells hold Dense kernels: one matrix per gate, or all gates side by
    side (`nnx.OptimizedLSTMCell`); a unit is one column in both. A `DenseGeneral` with
    several output axes under another name than these needs axes of its own.

    Args:
      path: name of the leaf, `encoder/attention/out/kernel`.
      leaf: anything with a shape.

    Returns:
      The axes to reduce.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import axes
      >>> axes.flax("attention/out/kernel", jnp.zeros((4, 8, 32)))
      (0, 1)
      >>> axes.flax("attention/query/kernel", jnp.zeros((32, 4, 8)))
      (0,)
    """  # noqa: E501
    rank = jnp.ndim(leaf)
    # NNX and boxed params keep an array one step below its name.
    parent, name = ("/" + path.removesuffix("/value")).split("/")[-2:]
    if name == "kernel" and rank > 1:
        if rank == 3 and parent in ("query", "key", "value"):
            return (0,)
        return tuple(range(rank - 1))
    if name == "embedding" and rank > 1:
        return (rank - 1,)
    return tuple(range(rank))


def equinox(path: str, leaf: Any) -> tuple[int, ...]:
    """Chooses the axes of a unit in an Equinox model: the output axis comes first.

    Leaves named `weight...` reduce all axes but the first: rows of `Linear.weight`
    `(out, in)` and of the GRU and LSTM cells, `(out, in, *window)` of convolutions, one
    token of an `Embedding`. Any other leaf, and any vector, is one unit.

    Args:
      path: name of the leaf, `layers/0/weight`.
      leaf: anything with a shape.

    Returns:
      The axes to reduce.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import axes
      >>> axes.equinox("layers/0/weight", jnp.zeros((10, 784)))
      (1,)
    """
    rank = jnp.ndim(leaf)
    is_weight = path.split("/")[-1].startswith("weight")
    return tuple(range(1 if is_weight and rank > 1 else 0, rank))


def keras(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    """Chooses the axes of a unit for a list of Keras 3 variables.

    Keras' stateless API hands params around as a list, so the names live in the
    variables. By the last parts of `variable.path`:

    | variable | axes reduced |
    |---|---|
    | attention's `query`, `key`, `value` kernel `(in, heads, dim)` | 0 |
    | kernel of a `depthwise_conv` layer `(*window, in, multiplier)` | the window |
    | kernel of a `conv_transpose` layer `(*window, out, in)` | all but the one before last |
    | any other kernel: Dense, Conv, LSTM and GRU, attention's output | all but the last |
    | `embeddings` `(tokens, features)` | the last |
    | anything else | all |

    Args:
      variables: `model.trainable_variables`.

    Returns:
      A list of axes, for `axis=` where params are the list of the variables' values.

    Examples:
      >>> import types, jax.numpy as jnp
      >>> from optaxclip import axes
      >>> kernel = types.SimpleNamespace(path="conv1d/kernel", shape=(3, 8, 16))
      >>> axes.keras([kernel])
      [(0, 1)]
    """  # noqa: E501
    return [_keras(variable.path, len(variable.shape)) for variable in variables]


def stacked(axis: Axes | AxesOf, where: str | Callable[[str], bool]) -> AxesOf:
    """Makes axes for layers stacked along a leading axis, as `nn.scan` does.

    Leaves that `where` picks out hold one layer per entry of axis 0: the axes are
    chosen for one layer and moved by one, so that units never span layers.

    Args:
      axis: how the axes of one layer are chosen: None, an int, a tuple or a callable.
      where: part of the path of every stacked leaf, or a predicate of the path.

    Returns:
      A callable of path and leaf, for `axis=`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import axes
      >>> choose = axes.stacked(axes.flax, where="layers/")
      >>> choose("layers/Dense_0/kernel", jnp.zeros((12, 64, 64)))
      (1,)
    """
    picks = (lambda path: where in path) if isinstance(where, str) else where

    def choose(path: str, leaf: Any) -> tuple[int, ...]:
        if not picks(path):
            return _of_leaf(axis, path, leaf, "axes.stacked: axis")
        shape = jnp.shape(leaf)
        if not shape:
            raise ValueError(
                f"axes.stacked: a stacked leaf needs an axis of layers, got shape () "
                f"at {path}. Narrow where=."
            )
        layer = jax.ShapeDtypeStruct(shape[1:], jnp.float32)
        one = _of_leaf(axis, path, layer, "axes.stacked: axis")
        return tuple(i + 1 for i in one)

    return choose


def describe(params: Any, axis: Any = None) -> str:
    """Writes a table of the units of every leaf.

    Args:
      params: pytree of arrays or of `jax.ShapeDtypeStruct`s.
      axis: as for `scopes.unit`.

    Returns:
      One line per leaf: path, shape, axes reduced, number of units and elements each.

    Raises:
      ValueError: as `scopes.unit` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optaxclip import axes
      >>> params = {"Conv_0": {"kernel": jnp.zeros((3, 8, 16)), "bias": jnp.zeros(16)}}
      >>> print(axes.describe(params, axes.flax))
      leaf           shape       axes    units  elements
      Conv_0/bias    (16,)       (0,)        1        16
      Conv_0/kernel  (3, 8, 16)  (0, 1)     16        24
    """
    chosen = resolve(axis, params, "axes.describe: axis")
    rows = [("leaf", "shape", "axes", "units", "elements")]
    for (path, leaf), reduced in zip(_trees.named(params), chosen, strict=True):
        shape = tuple(jnp.shape(leaf))
        elements = math.prod(shape[i] for i in reduced)
        units = math.prod(n for i, n in enumerate(shape) if i not in reduced)
        rows.append((path, str(shape), str(reduced), str(units), str(elements)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = "  ".join(f"{{:<{width}}}" for width in widths[:3])
    right = "".join(f"  {{:>{width}}}" for width in widths[3:])
    return "\n".join((left + right).format(*row) for row in rows)


def resolve(axis: Any, tree: Any, who: str) -> list[tuple[int, ...]]:
    """Returns the axes to reduce, non-negative, for each leaf of a tree that counts.

    Args:
      axis: None, an int, a tuple of ints, a callable, or a prefix of `tree` of these.
      tree: pytree of anything with a shape and a dtype.
      who: function and argument, for messages.

    Raises:
      TypeError: if an axis is not a static int.
      ValueError: if one is out of range or repeated, or the prefix does not fit.
    """
    part = _trees.counted(tree)
    names = [_trees.name(path) for path in part.paths()]
    leaves = [(names[i], leaf) for i, leaf in zip(part.indices, part.arrays)]
    if _is_axes(axis):
        specs = [axis] * len(leaves)
    else:
        specs = _trees.spread(axis, part, who, is_leaf=_is_axes)
    return [
        _of_leaf(spec, path, leaf, who)
        for spec, (path, leaf) in zip(specs, leaves, strict=True)
    ]


def _of_leaf(spec: Any, path: str, leaf: Any, who: str) -> tuple[int, ...]:
    function, argument = who.split(": ")
    spec = spec(path, leaf) if callable(spec) else spec
    if spec is None:
        return by_rank(path, leaf)
    rank = jnp.ndim(leaf)
    wanted = spec if isinstance(spec, tuple) else (spec,)
    for i in wanted:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(
                f"{function}: {argument} must hold ints, got {i!r} at {path}. Axes are "
                "static: with inject_hyperparams, name them in static_args."
            )
        if not -rank <= i < rank:
            raise ValueError(
                f"{function}: {argument} must be in [{-rank}, {rank}), got {i} at "
                f"{path}, shape {jnp.shape(leaf)}. Give this leaf axes of its own: "
                "pass a tree of axes or a callable of path and leaf."
            )
    reduced = tuple(sorted(i % rank for i in wanted))
    if len(set(reduced)) < len(reduced):
        raise ValueError(
            f"{function}: {argument} must name each axis once, got {spec} at {path}, "
            f"shape {jnp.shape(leaf)}. Remove the repeated one."
        )
    return reduced


def _is_axes(node: Any) -> bool:
    if type(node) is tuple:
        return all(isinstance(i, int) for i in node)
    return node is None or isinstance(node, int) or _trees.is_function(node)


def _keras(path: str, rank: int) -> tuple[int, ...]:
    layer, name = ("/" + path).split("/")[-2:]
    if rank > 1 and name.endswith("kernel"):
        if rank == 3 and layer in ("query", "key", "value"):
            return (0,)
        if "depthwise_conv" in layer or name == "depthwise_kernel":
            return tuple(range(rank - 2))
        if "conv" in layer and "transpose" in layer:
            return (*range(rank - 2), rank - 1)
        return tuple(range(rank - 1))
    if rank > 1 and name == "embeddings":
        return (rank - 1,)
    return tuple(range(rank))
