"""Under jit, with any sharding: the result of one device, and no array gathered."""

import re

import jax
import pytest
from jax.sharding import AxisType
from meshes import (
    SPECS,
    all_reduced,
    check_equal,
    leading,
    learned_on_one_device,
    learning,
    mesh,
    placed,
    scans_of,
    sequence,
    stateless,
    stateless_on_one_device,
    steps_of,
    updates,
)

# The most cells of a leaf that elements on several devices belong to.
UNITS = 10
KINDS = [AxisType.Auto, AxisType.Explicit]


@pytest.mark.parametrize("kind", KINDS)
def test_every_factory_equals_one_device(kind):
    with jax.set_mesh(mesh(kind)):
        arguments = [placed(updates(seed), kind) for seed in (0, 1)]
        compiled = jax.jit(steps_of(stateless())).lower(*arguments).compile()
        got = compiled(*arguments)
    check_equal(got, stateless_on_one_device())
    check_shardings([out for out, _ in got.values()], arguments[0])
    check_sums(compiled.as_text())


@pytest.mark.parametrize("kind", KINDS)
def test_what_learns_equals_one_device(kind):
    with jax.set_mesh(mesh(kind)):
        grads = placed(sequence(), kind, leading(SPECS))
        arguments = [grads, placed(updates(1), kind)]
        compiled = jax.jit(scans_of(learning())).lower(*arguments).compile()
        states, outs = compiled(*arguments)
    check_equal((states, outs), learned_on_one_device())
    check_shardings(outs.values(), grads)
    check_sums(compiled.as_text())


def check_shardings(outs, like):
    """Every update lies where its gradient does."""
    for out in outs:
        for got, want in zip(jax.tree.leaves(out), jax.tree.leaves(like), strict=True):
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def check_sums(text):
    """Devices exchange nothing but sums and maxima of cells."""
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    sizes = [n for sizes in all_reduced(text) for n in sizes]
    assert sizes and max(sizes) <= UNITS
