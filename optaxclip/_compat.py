"""What differs between the versions of JAX that are supported, 0.7.2 to the newest.

Everything here is public in the newest JAX but for one thing: whether the compiler will
partition a program is read from the context of its lowering. Where that cannot be read,
a program counts as partitioned, which is right everywhere and only slower on a GPU.
"""

import importlib
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

enable_x64: Any = getattr(jax, "enable_x64", None)
if enable_x64 is None:  # before JAX 0.8
    enable_x64 = importlib.import_module("jax.experimental").enable_x64

__all__ = ["bind", "enable_x64", "may_be_partitioned", "unreduced", "vary", "varying"]


def varying(kind: Any) -> frozenset[str]:
    """Returns the manual mesh axes that a type says its arrays vary over."""
    if hasattr(kind, "manual_axis_type"):
        manual = kind.manual_axis_type
        return frozenset() if manual is None else frozenset(manual.varying)
    return frozenset(getattr(kind, "vma", None) or ())  # before JAX 0.10


def unreduced(kind: Any) -> frozenset[str]:
    """Returns the mesh axes over which a type says its arrays are partial sums."""
    manual = getattr(kind, "manual_axis_type", None)
    spec = getattr(kind.sharding, "spec", None)
    return frozenset(getattr(manual, "unreduced", None) or ()) | frozenset(
        getattr(spec, "unreduced", None) or ()
    )


def vary(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns the same values as a type that also varies over some manual axes."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, names, to="varying")
    return getattr(lax, "pvary")(x, names)  # noqa: B009 - before JAX 0.8


def bind(eqn: Any, arguments: list[Any]) -> list[Any]:
    """Evaluates one equation of a jaxpr."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ([], params)
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*functions, *arguments, **params)
    return list(found) if eqn.primitive.multiple_results else [found]


def may_be_partitioned() -> jax.Array:
    """Returns whether the compiler may split the arrays of this program, a constant.

    It is known when the program is lowered: a `lax.cond` on it costs nothing, for the
    branch that is not taken is dropped before the program is partitioned.
    """
    return _may_be_partitioned_p.bind()


def _lower(ctx: Any) -> list[Any]:
    context: Any = getattr(ctx.module_context, "axis_context", None)
    split = True
    if hasattr(context, "num_devices"):  # jit: arrays are split if there are several
        split = context.num_devices != 1
    elif hasattr(context, "manual_axes"):  # shard_map: or if an axis is not manual
        split = frozenset(context.manual_axes) != frozenset(context.mesh.axis_names)
    return [mlir.ir_constant(np.array(split))]


_may_be_partitioned_p = Primitive("may_be_partitioned")
_may_be_partitioned_p.def_abstract_eval(lambda: jax.typeof(np.bool_(False)))
_may_be_partitioned_p.def_impl(lambda: np.bool_(True))
mlir.register_lowering(_may_be_partitioned_p, _lower)
