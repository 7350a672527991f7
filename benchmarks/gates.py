"""What the compiler says: bytes, temporaries, lines of program, host callbacks.

Nothing is run and no array is made, so the figures are the same on every run.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr

import optaxclip
from benchmarks.measure import Cost, Figure, cost

PyTree = Any

_LINE_SHAPES = ((8, 16), (16,), (16, 16), (4, 8, 2), (32,))
HOST = ("callback", "debug_print", "infeed", "outfeed")


def abstract(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """Describes float32 arrays without making them."""
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def transformer() -> list[jax.ShapeDtypeStruct]:
    """Describes 196 leaves, 102M parameters: 12 layers of width 768."""
    attention = [(768, 768), (768,)] * 4
    mlp = [(768, 3072), (3072,), (3072, 768), (768,)]
    norms = [(768,)] * 4
    embeddings = [(21_504, 768), (1024, 768), (768,), (768,)]
    return abstract(*(attention + mlp + norms) * 12, *embeddings)


SIZES = {
    "1 x 32M": abstract((32_000_000,)),
    "2 x 4096^2": abstract(*[(4096, 4096)] * 2),
    "40 x 512^2": abstract(*[(512, 512)] * 40),
    "196 leaves, 102M": transformer(),
}


def many_leaves(count: int) -> list[jax.ShapeDtypeStruct]:
    """Describes so many small leaves of five shapes in turn."""
    return abstract(*(_LINE_SHAPES[i % len(_LINE_SHAPES)] for i in range(count)))


def adam_step(params: PyTree, clip: optax.GradientTransformation | None = None) -> Cost:
    """Costs an update by Adam, behind a clip, of gradients that are given."""
    adam = optax.adam(1e-3)
    tx = adam if clip is None else optax.chain(clip, adam)

    def step(params, state, updates):
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return cost(step, params, state, params, size=nbytes(params), donate=(0, 1))


def alone(params: PyTree, clip: optax.GradientTransformation) -> Cost:
    """Costs a clip by itself, in place."""
    update = stateless(clip)
    return cost(update, params, size=nbytes(params), donate=(0,))


def lines(params: PyTree, clip: optax.GradientTransformation) -> int:
    """Counts the lines of the program that is handed to the compiler."""
    return jax.jit(stateless(clip)).lower(params).as_text().count("\n")


def stateless(clip: optax.GradientTransformation) -> Callable[[PyTree], PyTree]:
    """Returns the update of a clip without state as a function of the updates."""
    return lambda updates: clip.update(updates, optax.EmptyState())[0]


def nbytes(params: PyTree) -> int:
    """Returns the bytes that arrays of these shapes take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def chain_adam_bytes() -> Iterator[Figure]:
    """Bytes and temporaries of clip_by_global_norm in front of Adam."""
    for name, params in SIZES.items():
        adam = adam_step(params)
        theirs = adam_step(params, optax.clip_by_global_norm(1.0))
        recorded = optaxclip.recorded(1.0)
        for label, bound in (("", 1.0), (", recorded", recorded)):
            ours = adam_step(params, optaxclip.clip_by_global_norm(bound))
            what = f"{name}{label}"
            peers = {"adam alone": adam.passes, "optax": theirs.passes}
            most = adam.passes + (1.1 if label else 1.05)
            yield Figure(what, ours.passes, "passes", most, peers)
            peers = {"adam alone": adam.temp, "optax": theirs.temp}
            yield Figure(what, ours.temp, "temp / params", adam.temp + 0.01, peers)


def stablehlo_lines() -> Iterator[Figure]:
    """Lines of StableHLO of clip_by_global_norm of many leaves."""
    leaves = many_leaves(1000)
    ours = lines(leaves, optaxclip.clip_by_global_norm(1.0))
    theirs = lines(leaves, optax.clip_by_global_norm(1.0))
    peers: dict[str, float] = {"optaxclip": ours, "optax": theirs}
    yield Figure("1000 leaves", ours / theirs, "x optax", 0.55, peers)


def no_host_callbacks() -> Iterator[Figure]:
    """Host callbacks in the update of every public factory."""
    counts = {
        name: len(named_primitives(update_jaxpr(tx), HOST))
        for name, tx in factories().items()
    }
    guilty: dict[str, float] = {name: count for name, count in counts.items() if count}
    what = f"{len(counts)} factories"
    yield Figure(what, sum(counts.values()), "callbacks", 0, guilty)


def no_sorts() -> Iterator[Figure]:
    """Sorts in the update of every public factory, for a tree of two leaves."""
    counts = {
        name: len(named_primitives(update_jaxpr(tx), ("sort",)))
        for name, tx in factories().items()
    }
    guilty: dict[str, float] = {name: count for name, count in counts.items() if count}
    yield Figure(f"{len(counts)} factories", sum(counts.values()), "sorts", 0, guilty)


def factories() -> dict[str, optax.GradientTransformation]:
    """Makes one transformation by every public factory and every public bound.

    Arguments are chosen by name; a factory that asks for a new one gets it here.

    Raises:
      KeyError: if an argument has no value here.
    """
    made: dict[str, optax.GradientTransformation] = {}
    public = {name: getattr(optaxclip, name) for name in optaxclip.__all__}
    rules = vars(optaxclip.bounds).items()
    public |= {f"bounds.{name}": rule for name, rule in rules if name[0] != "_"}
    for name, factory in public.items():
        returned = _returned(factory)
        if issubclass(returned, optax.GradientTransformation):
            made[name] = factory(*_arguments(factory))
        elif issubclass(returned, optaxclip.bounds.Bound):
            bound = factory(*_arguments(factory))
            made[name] = optaxclip.clip_by(optaxclip.scopes.leaf(), bound)
    return made


def update_jaxpr(tx: optax.GradientTransformation) -> Jaxpr:
    """Traces an update of two leaves."""
    params = dict(zip(("kernel", "bias"), abstract((4, 3), (3,)), strict=True))
    state = jax.eval_shape(tx.init, params)
    return jax.make_jaxpr(tx.update)(params, state, params).jaxpr


def named_primitives(jaxpr: Jaxpr, words: Sequence[str]) -> list[str]:
    """Lists the primitives with one of the words in their name, however deep inside."""
    found = []
    for eqn in jaxpr.eqns:
        if any(word in eqn.primitive.name for word in words):
            found.append(eqn.primitive.name)
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if isinstance(inner, ClosedJaxpr):
                inner = inner.jaxpr
            if isinstance(inner, Jaxpr):
                found += named_primitives(inner, words)
    return found


def _returned(function: Any) -> type:
    """The class that a public function says it returns; `object` for all others."""
    if not inspect.isfunction(function):
        return object
    returned = get_type_hints(function).get("return")
    return returned if inspect.isclass(returned) else object


def _arguments(factory: Callable) -> list[Any]:
    values = {
        "after": 2.0,
        "axis_name": (),
        "before": 1.0,
        "bound": 1.0,
        "clip": optaxclip.clip_by_global_norm(1.0),
        "clipping": 0.1,
        "inner": optax.adam(1e-3),
        "labels": {"kernel": "a", "bias": "b"},
        "max_delta": 1.0,
        "max_norm": 1.0,
        "max_norms": {"a": 1.0, "b": 2.0},
        "max_value": 1.0,
        "min_value": -1.0,
        "ratio": 2.0,
        "scope": optaxclip.scopes.tree(),
        "threshold": 1.0,
        "value": 1.0,
        "values": 1.0,
    }
    if factory is optaxclip.bounds.schedule:
        return [optax.constant_schedule(1.0)]
    parameters = inspect.signature(factory).parameters.values()
    return [
        values[p.name]
        for p in parameters
        if p.default is p.empty and p.kind is not p.KEYWORD_ONLY
    ]


CASES = {
    case.__name__: case
    for case in (chain_adam_bytes, stablehlo_lines, no_host_callbacks, no_sorts)
}
