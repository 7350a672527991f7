"""Clipping the gradient of every example of a batch, then summing: as optax does.

Nothing here claims differential privacy: for that see the jax-privacy library.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _mesh, _trees, norms
from optaxclip._checks import check_number
from optaxclip._numerics import quotient

PyTree = Any


def per_example_global_norm_clip(
    grads: PyTree, l2_norm_clip: jax.typing.ArrayLike
) -> tuple[PyTree, jax.Array]:
    """Scales the gradient of every example by its global norm, then sums them.

    `sum_i g_i min(1, l2_norm_clip / |g_i|)`.

    Args:
      grads: pytree of arrays with the examples along axis 0; integers are taken as
        float32.
      l2_norm_clip: largest Euclidean norm of one example's gradient; 0 gives zeros,
        inf the plain sum. A traced value below 0 counts as 0.

    Returns:
      The sum, without axis 0 and in the dtypes of `grads`, and the number of examples
      that were clipped (int32). An example with NaN or inf makes the sum NaN.

    Raises:
      TypeError, ValueError: if `l2_norm_clip` is not a number >= 0, or the leaves do
        not share the length of axis 0.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> grads = [jnp.array([[0.0, 0.0], [3.0, 4.0]])]
      >>> total, clipped = optaxclip.per_example_global_norm_clip(grads, 1.0)
      >>> print(total[0], clipped)
      [0.6 0.8] 1

    References:
      Abadi et al., Deep learning with differential privacy, 2016,
      https://arxiv.org/abs/1607.00133. `optax.per_example_global_norm_clip`. Differs: a
      NaN example is not let through at full weight.
    """
    who = "per_example_global_norm_clip"
    check_number(l2_norm_clip, f"{who}: l2_norm_clip")
    leaves, treedef = _examples(grads, who)
    sums, clipped = _clipped_sum(leaves, l2_norm_clip)
    return treedef.unflatten(sums), clipped


def per_example_layer_norm_clip(
    grads: PyTree, global_l2_norm_clip: jax.typing.ArrayLike, uniform: bool = True
) -> tuple[PyTree, PyTree]:
    """Scales the gradient of every example layer by layer, then sums them.

    `sum_i g_il min(1, C_l / |g_il|)` for each leaf l, with `C_l = C / sqrt(K)` for K
    leaves or, if not `uniform`, `C sqrt(d_l / d)` for a leaf with d_l of d elements:
    the norm over all leaves is then at most C.

    Args:
      grads: pytree of arrays with the examples along axis 0; integers are taken as
        float32.
      global_l2_norm_clip: C, largest Euclidean norm of one example's gradient.
      uniform: whether every leaf has the same share of C.

    Returns:
      The sum, without axis 0 and in the dtypes of `grads`, and for each leaf the number
      of examples that were clipped (int32).

    Raises:
      TypeError, ValueError: as `per_example_global_norm_clip`.

    Examples:
      >>> import jax.numpy as jnp, optaxclip
      >>> grads = [jnp.array([[3.0, 4.0]]), jnp.array([[0.5]])]
      >>> total, clipped = optaxclip.per_example_layer_norm_clip(grads, 2.0**0.5)
      >>> print(total[0], total[1], clipped[0], clipped[1])
      [0.6 0.8] [0.5] 1 0

    References:
      McMahan et al., Learning differentially private recurrent language models, 2017,
      https://arxiv.org/abs/1710.06963. `optax.per_example_layer_norm_clip`.
    """
    who = "per_example_layer_norm_clip"
    check_number(global_l2_norm_clip, f"{who}: global_l2_norm_clip")
    leaves, treedef = _examples(grads, who)
    sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]
    sums, clipped = [], []
    for leaf, size in zip(leaves, sizes, strict=True):
        share = 1 / len(leaves) if uniform else size / max(sum(sizes), 1)
        one, count = _clipped_sum([leaf], global_l2_norm_clip * math.sqrt(share))
        sums += one
        clipped.append(count)
    return treedef.unflatten(sums), treedef.unflatten(clipped)


def _examples(grads: PyTree, who: str) -> tuple[list[jax.Array], Any]:
    leaves, treedef = jax.tree.flatten(grads)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if not _mesh.replicated(leaves):
        raise ValueError(
            f"{who}: grads must be whole, got one device's part of them. Call it under "
            "jit, outside shard_map and pmap; shardings are followed there."
        )
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(lengths) != 1 or None in lengths:
        shapes = [leaf.shape for leaf in leaves]
        raise ValueError(
            f"{who}: grads must have one batch dimension in the 0th axis, got shapes "
            f"{shapes}. Take them with jax.vmap(jax.grad(loss), (None, 0))."
        )
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    leaves = [
        leaf if kept else leaf.astype(jnp.float32)
        for leaf, kept in zip(leaves, inexact, strict=True)
    ]
    return leaves, treedef


def _clipped_sum(leaves, limit) -> tuple[list[jax.Array], jax.Array]:
    seen = jax.vmap(lambda example: norms.tree_norm(example, axis_name=()))(leaves)
    limit = jnp.maximum(jnp.asarray(limit).astype(seen.dtype), 0)
    alone = (seen <= limit) | (limit == jnp.inf)
    factor = quotient(limit, jnp.where(alone, 1, seen))
    factor = jnp.where(alone, 1, jnp.where(jnp.isfinite(seen), factor, jnp.nan))
    sums = []
    for leaf in leaves:
        wide = _trees.widened(leaf.dtype, factor.dtype)
        weights = factor.astype(wide)
        total = jnp.tensordot(
            weights, leaf.astype(wide), axes=1, precision=jax.lax.Precision.HIGHEST
        )
        sums.append(total.astype(leaf.dtype))
    return sums, jnp.sum(~alone, dtype=jnp.int32)
