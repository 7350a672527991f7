"""Prints the seconds one clip takes to trace, lower and compile: a process of its own.

python -m benchmarks.compile_once optax|optaxclip LEAVES
"""

import sys
import time

import jax
import jax.numpy as jnp
import optax

import optaxclip
from benchmarks.gates import many_leaves, stateless

LIBRARIES = {"optax": optax, "optaxclip": optaxclip}


def main(library: str, leaves: str) -> None:
    """Compiles a clip by global norm of so many small leaves, as the first thing."""
    jax.jit(lambda x: x + 1)(jnp.zeros(()))  # the backend starts before the clock
    clip = LIBRARIES[library].clip_by_global_norm(1.0)
    params = many_leaves(int(leaves))
    start = time.perf_counter()
    jax.jit(stateless(clip), donate_argnums=0).lower(params).compile()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
