"""The composer: scope x bound x shape makes a gradient transformation."""

from collections.abc import Callable
from typing import overload

import jax
import optax

from optaxclip import _mesh, bounds, shapes
from optaxclip.scopes import Scope

Shape = Callable[[jax.Array, jax.Array], jax.Array]


class Clip(optax.GradientTransformationExtraArgs):
    """A gradient transformation that knows what it was made of.

    Attributes:
      scope: what counts as one magnitude.
      bound: how large it may be.
      shape: what becomes of it beyond.
      axis_name: over which mesh axes leaves are split, if types do not tell.
    """

    scope: Scope
    bound: bounds.Bound
    shape: Shape
    axis_name: _mesh.AxisName


def clip_by(
    scope: Scope,
    bound: bounds.BoundLike,
    shape: Shape = shapes.hard,
    *,
    axis_name: _mesh.AxisName = None,
) -> Clip:
    """Bounds the magnitudes of the updates and puts the directions back.

        updates --scope--> magnitudes --bound--> limits --shape--> new magnitudes
                                                        --scope--> updates

    Every clip of this library is one call of this function.

    Guarantee: measured by the scope, no new magnitude exceeds what the shape gives,
    within a few units in the last place of the leaf dtype; a cell that the shape does
    not change, or whose limit is inf, comes out bit for bit as it went in; structure,
    shapes, dtypes and weak types are unchanged.

    Args:
      scope: what counts as one magnitude; see `optaxclip.scopes`.
      bound: how large it may be: a number, a schedule, a bound, or a pytree prefix of
        these; see `optaxclip.bounds`.
      shape: what becomes of it beyond; see `optaxclip.shapes`.
      axis_name: over which mesh axes leaves are split; see `optaxclip.sharded`.

    Returns:
      A transformation whose state is what the bound has learned: `optax.EmptyState` for
      a number. Its update takes `norm=`, the global norm if the caller knows it, which
      the `tree` scope then does not measure again; other extra arguments are ignored.

    Raises:
      TypeError, ValueError: for a bound that is not one; for one that remembers a
        window, if the cells are elements; by `init` and `update`, for trees that do not
        fit; by `update`, inside `shard_map` and `pmap`, for what cannot be right there.

    Examples:
      Every column of a kernel at most a tenth of its own norm, smoothly:

      >>> import jax.numpy as jnp
      >>> from optaxclip import bounds, clip_by, scopes, shapes
      >>> tx = clip_by(scopes.unit(), bounds.relative(0.1), shapes.sqrt)
      >>> params = jnp.array([[3.0, 0.0], [4.0, 1.0]])
      >>> updates, _ = tx.update(10 * params, tx.init(params), params)
      >>> print(jnp.linalg.norm(updates, axis=0).round(3))
      [0.5 0.1]
    """
    if not isinstance(scope, Scope) or not callable(shape):
        raise TypeError(
            "clip_by: scope and shape must be a Scope and a function, got "
            f"scope={scope!r} and shape={shape!r}. Call the scope, as in "
            "scopes.tree(), but not the shape, as in shapes.tanh."
        )
    bound = bounds.of(bound, "clip_by: bound")
    if scope.elementwise and bound.window:
        raise ValueError(
            "clip_by: bound must not remember a window of magnitudes if every element "
            f"is a cell, got window={bound.window}: {bound.window} copies of the "
            "params. Use bounds.tracked_quantile, which takes one, or a coarser scope."
        )

    axis_name = _mesh.check_axis_name(axis_name, "clip_by")

    def init(params):
        with _mesh.bounding(axis_name):
            return bound.init(scope.described(params, axis_name))

    def update(updates, state, params=None, *, norm=None, **extra_args):
        del extra_args
        partners = None if scope.elementwise else params
        updates = _mesh.aligned(updates, partners, "clip_by")
        seen, rebuild = scope.split(updates, norm, axis_name)
        own = lambda who: scope.own(params, updates, axis_name, who)
        with _mesh.bounding(axis_name):
            limits, learn = bound.limit(state, seen, own)
            updates, kept = rebuild.bent(shape, limits)
            return updates, learn(kept)

    clip = Clip(init, update)
    clip.scope, clip.bound, clip.shape, clip.axis_name = scope, bound, shape, axis_name
    return clip


def sharded(clip: Clip, axis_name: _mesh.AxisName) -> Clip:
    """Makes the same clip, which is told over which mesh axes leaves are split.

    Under `jit` there is nothing to tell, and inside `shard_map` with `check_vma=True`
    the types of the leaves tell. It is needed

    * with `check_vma=False` and in `pmap`, where they do not;
    * for norms of slices (`scopes.unit`, as in `adaptive_grad_clip`) of a leaf that is
      split, for types do not tell along which dimension;
    * where leaves vary over devices and are no parts of something: a training run of
      its own on each device, examples of a batch that is split. Types do not tell these
      from parts, and one norm would be measured of all of them. For the same reason
      give `update` the params as they are split, not a copy that `lax.pcast` made vary.

    Args:
      clip: what a named method or `clip_by` made.
      axis_name: the `PartitionSpec`s of the updates, one for all or a pytree prefix, as
        the `in_specs` of `shard_map`; or the name or names of mesh axes that every leaf
        is split over. `()` says that every device has all of every leaf and measures
        for itself: averaged data-parallel gradients in `pmap`, or runs of their own. A
        single name cannot be checked where types do not tell: a leaf that is not split
        would count several times. Outside of `shard_map` specs change nothing, so that
        one clip serves there too.

    Returns:
      The same clip with an `axis_name`.

    Raises:
      TypeError: for what is not a clip, or no axis name.
      ValueError: by `update`, for an axis that does not exist, specs of another
        structure, and, where types tell, for what disagrees with them.

    Examples:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
      >>> clip = optaxclip.sharded(optaxclip.clip_by_unit_norm(1.0), P("d"))
      >>> run = lambda updates: clip.update(updates, None)[0]
      >>> run = jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
      >>> print(run(jnp.array([[3.0, 0.0], [4.0, 0.5]])))
      [[0.6 0. ]
       [0.8 0.5]]

    References:
      The axes that types tell of: https://docs.jax.dev/en/latest/notebooks/shard_map.html
    """
    if not (isinstance(clip, Clip) and hasattr(clip, "scope")):
        raise TypeError(
            f"sharded: clip must be made by clip_by, as the named methods are, got "
            f"{type(clip).__name__}. Tell each clip inside of it; other functions that "
            "measure take axis_name."
        )
    axis_name = _mesh.check_axis_name(axis_name, "sharded")
    return clip_by(clip.scope, clip.bound, clip.shape, axis_name=axis_name)


@overload
def recorded(clip: Clip) -> Clip: ...  # pyright: ignore[reportOverlappingOverload]
@overload
def recorded(clip: bounds.BoundLike) -> bounds.Bound: ...
def recorded(clip):
    """Makes the same clip, or the same bound, which also remembers what was done.

    For a clip it is `clip_by(clip.scope, bounds.recorded(clip.bound), clip.shape)`. See
    `bounds.recorded` for what is remembered.

    Args:
      clip: what a named method or `clip_by` made; or a number, a schedule, a bound, or
        a pytree prefix of these.

    Returns:
      The same clip, or a bound, with a `Record` in its state, which `records` finds in
      any optimizer state.

    Raises:
      TypeError, ValueError: for what is none of these.

    Examples:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.recorded(optaxclip.autoclip(50)), optax.sgd(0.1))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 5.0):
      ...     _, state = tx.update(jnp.array([norm]), state)
      >>> (record,) = optaxclip.records(state)
      >>> print(f"{record.norm:.1f} {record.limit:.1f} {record.clipped_steps}")
      5.0 3.0 1
    """
    if isinstance(clip, Clip) and hasattr(clip, "bound"):
        rule = bounds.recorded(clip.bound)
        return clip_by(clip.scope, rule, clip.shape, axis_name=clip.axis_name)
    if isinstance(clip, optax.GradientTransformation):
        raise TypeError(
            "recorded: clip must be made by clip_by, as the named methods are, got "
            "another gradient transformation. Record the clip inside of it."
        )
    return bounds.recorded(clip)
