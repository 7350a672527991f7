"""Around a clip or an optimizer: what to do about updates that are damaged."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental import checkify

from optaxclip import _cells, _forms, _mesh, _trees, bounds, norms, scopes
from optaxclip._checks import check_count
from optaxclip._numerics import count_if
from optaxclip._staged import choose_state
from optaxclip.bounds._learned import enough

PyTree = Any


class ZeroNonfiniteState(NamedTuple):
    """State of `zero_nonfinite`."""

    zeroed: jax.Array  # elements replaced in the last update; shape=(), int32
    total: jax.Array  # elements replaced so far, at most 2^31 - 1; shape=(), int32


def zero_nonfinite(
    *, axis_name: _mesh.AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces every NaN and inf element by 0, and counts them.

    `u -> u if isfinite(u) else 0`. Put it before a clip to go on with the finite part
    of a damaged gradient: the norm is then that of what is left.

    A complex element is replaced if either part is not finite. Leaves that are not
    floating point pass through.

    Args:
      axis_name: over which mesh axes leaves are split; see `optaxclip.sharded`. The
        counts are those of all devices.

    Returns:
      A transformation with a `ZeroNonfiniteState`.

    Raises:
      TypeError: for an `axis_name` that is none.
      ValueError: by `update`, if it is not known how a leaf is split.

    Examples:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> clip = optaxclip.clip_by_global_norm(1.0)
      >>> tx = optax.chain(optaxclip.zero_nonfinite(), clip)
      >>> updates = jnp.array([3.0, jnp.nan, 4.0, jnp.inf])
      >>> clipped, state = tx.update(updates, tx.init(updates))
      >>> print(clipped.round(3), state[0].zeroed)
      [0.6 0.  0.8 0. ] 2
    """
    axis_name = _mesh.check_axis_name(axis_name, "zero_nonfinite")

    def init(params):
        fresh = ZeroNonfiniteState(
            zeroed=jnp.zeros((), jnp.int32), total=jnp.zeros((), jnp.int32)
        )
        whole = scopes.tree().described(params, axis_name)
        return _mesh.varying_like(fresh, whole)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        part = _trees.counted(_mesh.aligned(updates, None, "zero_nonfinite"))
        over = _mesh.layout(part, axis_name, "zero_nonfinite")
        finite = [jnp.isfinite(u) for u in part.arrays]
        counts = [jnp.sum(~f, dtype=jnp.int32) for f in finite]
        zeroed = norms.total(counts, over)
        kept = [
            jnp.where(f, u, jnp.zeros_like(u))
            for f, u in zip(finite, part.arrays, strict=True)
        ]
        room = jnp.iinfo(jnp.int32).max - state.total
        total = state.total + jnp.minimum(zeroed, room)
        return part.replace(kept), ZeroNonfiniteState(zeroed=zeroed, total=total)

    return optax.GradientTransformationExtraArgs(init, update)


def check_finite() -> optax.GradientTransformationExtraArgs:
    """Raises if an element is NaN or inf, naming the leaf, inside jitted code.

    PyTorch's `error_if_nonfinite` for JAX. It checks only in a function that is
    transformed by `jax.experimental.checkify.checkify` and is not there otherwise, so
    it may stay in the chain of a production run.

    Returns:
      A transformation without state that gives back the updates as they are.

    Examples:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> from jax.experimental import checkify
      >>> tx = optaxclip.check_finite()
      >>> update = lambda updates: tx.update(updates, tx.init(updates))[0]
      >>> checked = jax.jit(checkify.checkify(update))
      >>> error, _ = checked({"w": jnp.array([1.0, jnp.nan])})
      >>> print(error.get().split(" (")[0])
      check_finite: updates must be finite, got 1 of 2 elements NaN or inf at w
    """

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        updates = _mesh.aligned(updates, None, "check_finite")
        for path, leaf in _trees.named(updates):
            bad = jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32)
            checkify.debug_check(
                bad == 0,
                "check_finite: updates must be finite, got {bad} of {size} elements "
                f"NaN or inf at {_escaped(path)}",
                bad=bad,
                size=jnp.int32(jnp.size(leaf)),
            )
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


class SkipStepsState(NamedTuple):
    """State of `skip_steps`. Counts are at most 2^31 - 1."""

    skipped: jax.Array  # updates skipped so far; shape=(), int32
    in_a_row: jax.Array  # updates skipped since one was applied; shape=(), int32
    steps: jax.Array  # updates seen; shape=(), int32
    bound: PyTree  # what the bound has learned
    inner: PyTree  # state of the inner transformation


def skip_steps(
    inner: optax.GradientTransformation,
    bound: bounds.BoundLike = math.inf,
    *,
    warmup: jax.typing.ArrayLike = 0,
    axis_name: _mesh.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips the updates whose global norm is not within a bound.

    With n the Euclidean norm of all updates together:

        n finite and n <= bound:  inner's update, inner's next state
        otherwise:                zeros,          the state that inner had

    A skipped update is one that never was: the parameters stay, and so do the moments,
    the counters and the schedules of the optimizer. (Behind a clip that makes an update
    zero, momentum still moves the parameters and moments decay.) An update with a NaN
    or inf element is always skipped, however many there are in a row, which `inf`, the
    default, leaves it at.

    Put it around all else, `skip_steps(chain(clip, adam))`: there it sees the gradient
    before a clip can hide what is wrong with it, and a clip that learns is protected
    too. Under `masked` and `partition` n is the norm of that part only, and every part
    decides for itself. Around `MultiSteps` it leaves a damaged micro-batch out of the
    mean; inside, it judges the mean.

    | case | what happens |
    |---|---|
    | norm exactly at the bound | applied |
    | bound 0 | all is skipped but updates of zeros |
    | bound traced and negative / NaN | as 0 / all is skipped |
    | no floating point leaves | applied: the norm is 0 |
    | float32 elements are finite, their norm is above 3.4e38 | skipped |
    | integers, bools in inner's update / PRNG keys, float0 | zeros / as inner has it |

    What a learned bound sees of a skipped update: one that learns what was measured
    (`percentile`, `median_mad`, `streaming_quantile`, `tracked_quantile`, `mean`,
    `mean_std`, and `ema` with `observe="raw"`) learns its norm if that is finite, and
    so follows a lasting rise. One that learns what was kept (`ema`, `growth` and
    `second_moment` as they are) learns nothing, for nothing was kept: *after a lasting
    rise it skips for ever*. So does `zscore`, which learns what it would have kept, but
    with `beyond="limit"`. `recorded(bound)` counts what was skipped as clipped.

    It never gives up and never raises; `in_a_row` is there for the caller to stop by:

        if optax.tree.get(opt_state, "in_a_row") >= 100:
            raise RuntimeError("100 updates in a row were damaged")

    or, in jitted code, `checkify.check(in_a_row < 100, "...")`.

    Derivatives through an applied update are those of inner. Through a skipped one
    they are 0, and that of the state is the identity, whatever inner's are there.

    Args:
      inner: what is to be skipped: an optimizer, a chain. It is called every time, with
        zeros for an update that is skipped, and its result is then not taken.
      bound: of the norm: a number, a schedule or any bound, such as
        `bounds.percentile(99)`. `bounds.relative` sees the norm of the params.
      warmup: number of updates that are applied, if they are finite, before the bound
        counts; it learns meanwhile. Learned bounds have a warm-up of their own.
      axis_name: over which mesh axes leaves are split; see `optaxclip.sharded`. All
        devices decide alike, by the norm of all parts.

    Returns:
      A transformation with a `SkipStepsState`. Its update takes `norm=`, the global
      norm if the caller knows it, which is then trusted and not measured; inner is
      given it too, and all other extra arguments.

    Raises:
      TypeError, ValueError: for an `inner` that is no gradient transformation, a bound
        that is not one, and a `warmup` that is not a whole number >= 0; by `update`,
        for a state that `init` did not make, for params that the bound needs and are
        missing, for an inner whose state changes structure, and inside `shard_map` and
        `pmap` for what cannot be right there.

    Examples:
      Momentum does not see the two bad gradients, one too long and one damaged:

      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_steps(optax.sgd(1.0, momentum=0.5), 10.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (4.0, 400.0, jnp.nan, 4.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates, state.skipped, state.in_a_row)
      [-4.] 0 0
      [0.] 1 1
      [0.] 2 2
      [-6.] 2 0

    References:
      The skipped steps of Paxml, `skip_step_gradient_norm_value`,
      https://github.com/google/paxml, and of Megatron-LM, `grad_norm_skip_threshold`,
      https://github.com/NVIDIA/Megatron-LM/pull/3460, whose threshold is a number; of
      OLMo-core, https://github.com/allenai/OLMo-core, which is a z-score of a window.
      Differs: what is not finite is never learned from.
      optax.apply_if_finite. Differs: it has no bound; it applies a NaN after so many in
      a row; it decides by a `cond` on what a device holds, so that inside `shard_map`
      devices part ways, or wait for each other for ever.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "skip_steps: inner must be an optax.GradientTransformation, got "
            f"inner={inner!r}. Pass an optimizer, such as optax.adam(1e-3)."
        )
    rule = bounds.of(bound, "skip_steps: bound")
    check_count(warmup, "skip_steps: warmup")
    axis_name = _mesh.check_axis_name(axis_name, "skip_steps")
    inner = optax.with_extra_args_support(inner)
    scope = scopes.tree()

    def init(params):
        whole = scope.described(params, axis_name)
        fresh = SkipStepsState(
            skipped=jnp.zeros((), jnp.int32),
            in_a_row=jnp.zeros((), jnp.int32),
            steps=jnp.zeros((), jnp.int32),
            bound=None,
            inner=inner.init(params),
        )
        return _mesh.varying_like(fresh, whole)._replace(bound=rule.init(whole))

    def update(updates, state, params=None, *, norm=None, **extra_args):
        if not isinstance(state, SkipStepsState):
            raise ValueError(
                "skip_steps: state must be a SkipStepsState, got "
                f"state={state!r:.80}. Pass the state that tx.init made."
            )
        updates = _mesh.aligned(updates, params, "skip_steps")
        cells, _ = scope.split(updates, norm, axis_name)
        own = lambda who: scope.own(params, updates, axis_name, who)
        limits, learn = rule.limit(state.bound, cells, own)
        (seen,), (limit,) = cells.arrays, limits.arrays
        applied_before = state.steps - state.skipped
        starting = ~enough(applied_before, warmup, least=0)
        applied = jnp.isfinite(seen) & (starting | (seen <= limit))
        kept = jnp.where(applied, seen, 0)

        if norm is not None:
            extra_args["norm"] = jnp.where(applied, norm, 0)
        traced = isinstance(applied, jax.core.Tracer)
        leaves = max(map(len, map(jax.tree.leaves, (updates, state.inner))))
        # On a GPU leaves whose flags come out of one vector share their kernels.
        flags = [applied] * leaves
        if traced and leaves > 1:
            flags = _forms.entries(applied, range(leaves))
        run = functools.partial(
            inner.update,
            _zero_unless(flags, updates),
            _constant_unless(applied, state.inner),
            _constant_unless(applied, params),
            **extra_args,
        )
        new, after = choose_state(
            run,
            state.inner,
            lambda i, new, old: _chosen(flags[i], new, old),
            traced=traced,
            who="skip_steps: inner",
        )
        out, treedef = jax.tree.flatten(new)
        flags += [applied] * len(out)
        out = [_chosen(flag, u) for flag, u in zip(flags, out)]
        return jax.tree.unflatten(treedef, out), SkipStepsState(
            skipped=count_if(~applied, state.skipped),
            in_a_row=jnp.where(applied, 0, count_if(~applied, state.in_a_row)),
            steps=count_if(True, state.steps),
            bound=learn(_cells.like(cells, [kept])),
            inner=after,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _zero_unless(flags: list[jax.Array], tree: PyTree) -> PyTree:
    """The tree with zeros for its arrays unless their flags are set."""
    part = _trees.counted(tree)
    return part.replace([_chosen(flag, x) for flag, x in zip(flags, part.arrays)])


def _constant_unless(flag: jax.Array, tree: PyTree) -> PyTree:
    """The same tree, whose derivative is 0 unless the flag is set.

    A derivative of the inner transformation at zeros may be inf or NaN, and would be
    NaN after a product with the zeros that come from a result that is not taken.
    """
    part = _trees.counted(tree)
    return part.replace(
        [lax.select(flag, x, lax.stop_gradient(x)) for x in part.arrays]
    )


def _chosen(flag: jax.Array, new: Any, old: Any = None) -> Any:
    """The new leaf if the flag is set, else the old one, or zeros if there is none.

    What is no number cannot be zero, and is given back as it is.
    """
    dtype = getattr(new, "dtype", None)
    if dtype == jax.dtypes.float0:
        return new
    if old is None and dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended):
        return new
    new = jnp.asarray(new)
    old = lax.full_like(new, 0) if old is None else jnp.asarray(old)
    return lax.select(
        flag, new, old if old.dtype == new.dtype else old.astype(new.dtype)
    )


def _escaped(path: str) -> str:
    return path.replace("{", "{{").replace("}", "}}")
