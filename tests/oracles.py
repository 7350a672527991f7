"""Norms and clips as dull float64 NumPy, written from their definitions."""

import math

import numpy as np


def wide(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def norm(values, ord=2):
    """The norm of a flat list of arrays taken as one vector."""
    moduli = [abs(v) for array in values for v in wide(array).ravel()]
    if not moduli:
        return 0.0
    if any(math.isnan(m) for m in moduli):
        return math.nan
    if ord == "rms":
        return norm(values, 2) / math.sqrt(len(moduli))
    if ord == math.inf:
        return max(moduli)
    if ord == 2:
        return math.hypot(*moduli)
    largest = max(moduli)
    if largest in (0.0, math.inf):
        return largest
    return largest * math.fsum((m / largest) ** ord for m in moduli) ** (1 / ord)


def units(x, ord=2):
    """The norm of every column, for ranks 0 to 2 as optax chooses units."""
    x = wide(x)
    if sum(size != 1 for size in x.shape) <= 1:
        return [norm([x], ord)]
    assert x.ndim == 2
    return [norm([x[:, i]], ord) for i in range(x.shape[1])]


def agc_ratio(update, param, eps=1e-3):
    return [u / max(p, eps) for u, p in zip(units(update), units(param), strict=True)]


def new_magnitude(shape, m, c):
    """The table of shapes, one scalar at a time."""
    if math.isnan(m):
        return math.nan
    if c == math.inf:
        return m
    if m == 0:
        return 0.0
    return {
        "hard": lambda: min(m, c),
        "rational": lambda: m * c / (m + c) if m < math.inf else c,
        "sqrt": lambda: (
            0.0 if c == 0 else m / math.hypot(1, m / c) if m < math.inf else c
        ),
        "tanh": lambda: 0.0 if c == 0 else c * math.tanh(m / c),
        "normalize": lambda: c,
        "drop": lambda: m if m <= c else 0.0,
        "floor": lambda: max(m, c),
        "reciprocal": lambda: m if m <= c else c * c / m,
    }[shape]()
