"""Running a transformation so that its next state is chosen where it is made."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Literal

from optaxclip import _compat, _trees

PyTree = Any


def choose_state(
    run: Callable[[], tuple[PyTree, PyTree]],
    before: PyTree,
    choose: Callable[[int, Any, Any], Any],
    *,
    traced: bool,
    who: str,
) -> tuple[PyTree, PyTree]:
    """Runs `() -> (updates, state)` and chooses between the new state and the old.

    In traced code the updates are computed from the chosen state and not from the new.
    That is the same whenever the new one is chosen, and otherwise they are not wanted.
    Computed from a new state that may not be stored, they would have to be computed
    from the old a second time, and XLA:CPU, which must not write over that meanwhile,
    would copy it: for Adam 16 passes over the parameters instead of 11, and up to two
    temporaries of their size instead of none.

    Args:
      run: the update; it is staged, and its equations are evaluated one by one.
      before: the state before it.
      choose: `(i, new, old) -> leaf` for the i-th leaf of the state, of the same shape
        and dtype as the new leaf.
      traced: whether this is traced code. Elsewhere nothing is gained.
      who: "function: argument" of the transformation, for messages.

    Returns:
      The updates, and the chosen state.

    Raises:
      ValueError: if the new state has another structure.
    """
    if not traced:
        updates, after = run()
        _check_structure(before, after, who)
        leaves, treedef = jax.tree.flatten(after)
        pairs = enumerate(zip(leaves, jax.tree.leaves(before), strict=True))
        chosen = [choose(i, new, old) for i, (new, old) in pairs]
        return updates, jax.tree.unflatten(treedef, chosen)
    closed, (updates, after) = jax.make_jaxpr(run, return_shape=True)()
    _check_structure(before, after, who)
    jaxpr, treedef = closed.jaxpr, jax.tree.structure((updates, after))
    count = len(jax.tree.leaves(updates))
    old = jax.tree.leaves(before)
    # By identity, for what is no variable, a literal, is given back as well. No
    # derivative of the updates flows back by the state that is not left.
    held = {
        id(var): (i, lax.stop_gradient(x))
        for i, (var, x) in enumerate(zip(jaxpr.outvars[count:], old, strict=True))
    }
    new, chosen = {}, {}

    def read(var, values):
        return var.val if isinstance(var, Literal) else values[var]

    def write(var, value):
        new[var] = value
        chosen[var] = value
        if id(var) in held:
            i, x = held[id(var)]
            chosen[var] = choose(i, value, x)

    for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
        write(var, value)
    for eqn in jaxpr.eqns:
        arguments = [read(var, chosen) for var in eqn.invars]
        found = _compat.bind(eqn, arguments)
        for var, value in zip(eqn.outvars, found, strict=True):
            write(var, value)
    made = [read(var, chosen) for var in jaxpr.outvars[:count]]
    stored = [
        choose(i, read(var, new), x)
        for i, (var, x) in enumerate(zip(jaxpr.outvars[count:], old, strict=True))
    ]
    return jax.tree.unflatten(treedef, made + stored)


def _check_structure(before: PyTree, after: PyTree, who: str) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        function, argument = who.split(": ")
        where = _trees.first_difference(before, after, "old state", "new state")
        raise ValueError(
            f"{function}: {argument} must keep the structure of the state that its "
            f"init made, {where}. Mend its init, or put it outside of {function}."
        )
