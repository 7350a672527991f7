"""The methods that learn, as dull float64 loops over lists, written from the papers.

A history is a list of the magnitudes learned from, oldest first, and a limit a function
of such a list: nothing is kept from step to step but the list, and every statistic is
computed from scratch. Two rules hold for all: only a magnitude that is finite and above
0 is learned from; and a limit of inf leaves a cell as it is, whatever it is, while
under any other limit a cell that is not finite becomes NaN.

Where all elements of a cell are multiplied by one factor, an oracle gives the factors.
"""

import math

import numpy as np
from oracles import norm

inf = math.inf


def usable(m):
    """Whether a magnitude is learned from."""
    return math.isfinite(m) and m > 0


def factor(m, limit, shape="hard"):
    """What the elements of a cell of magnitude m are multiplied by."""
    if limit == inf:
        return 1.0
    if not math.isfinite(m) or math.isnan(limit):
        return math.nan
    if m == 0:
        return 1.0
    new = {"hard": min(m, limit), "normalize": limit, "floor": max(m, limit)}
    return new[shape] / m


def factors(magnitudes, limit, observe, warmup=1, shape="hard"):
    """The factors of one cell whose limit is a function of its history.

    observe: "raw": history is what was measured; "kept": what came out; "current": what
    was measured, and the limit sees this update too. warmup: how long a history must be
    for there to be a limit.
    """
    history, found = [], []
    for m in magnitudes:
        if observe == "current" and usable(m):
            history.append(m)
        most = limit(history) if len(history) >= warmup else inf
        scale = factor(m, most, shape)
        if observe == "raw" and usable(m):
            history.append(m)
        if observe == "kept" and usable(m):
            history.append(min(m, most))
        found.append(scale)
    return found


# Limits as functions of a history.


def percentile(p, window):
    return lambda history: np.percentile(history[-window:], p)


def median_mad(k, window):
    def limit(history):
        last = history[-window:]
        median = np.median(last)
        distances = [abs(m - median) for m in last]
        return median + k * 1.4826 * np.median(distances)

    return limit


def mean(ratio):
    return lambda history: ratio * np.mean(history)


def deviation(k):
    """Of the sample, of which there must be two."""
    return lambda history: k * np.std(history, ddof=1) if len(history) > 1 else inf


def mean_std(k):
    def limit(history):
        if len(history) < 2:
            return inf
        return np.mean(history) + k * np.std(history, ddof=1)

    return limit


def ema(ratio, decay, start, warmup=1):
    """An average that starts as the mean or smallest of the first, or at 0."""
    warmup = max(warmup, 1)

    def limit(history):
        if start in ("mean", "min"):
            first, rest = history[:warmup], history[warmup:]
            e = np.mean(first) if start == "mean" else min(first)
        else:
            e, rest = 0.0, history
        for m in rest:
            e = decay * e + (1 - decay) * m
        if start == "debiased":
            e = e / (1 - decay ** len(history))
        return ratio * e

    return limit


def growth(ratio):
    return lambda history: ratio * history[-1]


def second_moment(threshold, decay):
    """Adam's v without debiasing."""

    def limit(history):
        v = 0.0
        for n in history:
            v = decay * v + (1 - decay) * n**2
        return math.sqrt(threshold * v)

    return limit


def mean_over_rms(mean_decay, rms_decay, eps):
    """The limit of AdaGN: the debiased m_hat / (sqrt(v_hat) + eps) of Adam."""

    def limit(history):
        m = v = 0.0
        for n in history:
            m = mean_decay * m + (1 - mean_decay) * n
            v = rms_decay * v + (1 - rms_decay) * n**2
        m_hat = m / (1 - mean_decay ** len(history))
        v_hat = v / (1 - rms_decay ** len(history))
        return m_hat / (math.sqrt(v_hat) + eps)

    return limit


def tracked_quantile(quantile, rate, initial, step):
    """Andrew et al., algorithm 1 with one norm per step and without noise."""

    def limit(history):
        c = initial
        for m in history:
            below = 1.0 if m <= c else 0.0
            if step == "geometric":
                c = c * math.exp(-rate * (below - quantile))
            else:
                c = max(c - rate * (below - quantile), 0.0)
        return c

    return limit


class P2:
    """Box 1 of Jain and Chlamtac, 1985; with up to five observations exact."""

    def __init__(self, p):
        self.p = p
        self.first = []
        self.q = []
        self.n = [1, 2, 3, 4, 5]
        self.count = 0

    def add(self, x):
        self.count += 1
        if self.count <= 5:
            self.first.append(x)
            self.q = sorted(self.first)
            return
        q, n = self.q, self.n
        if x < q[0]:
            q[0] = x
            k = 1
        elif x < q[1]:
            k = 1
        elif x < q[2]:
            k = 2
        elif x < q[3]:
            k = 3
        elif x <= q[4]:
            k = 4
        else:
            q[4] = x
            k = 4
        for i in range(k, 5):
            n[i] += 1
        shares = [0, self.p / 2, self.p, (1 + self.p) / 2, 1]
        for i in (1, 2, 3):
            d = 1 + (self.count - 1) * shares[i] - n[i]
            if (d >= 1 and n[i + 1] - n[i] > 1) or (d <= -1 and n[i - 1] - n[i] < -1):
                s = 1 if d > 0 else -1
                parabola = q[i] + s / (n[i + 1] - n[i - 1]) * (
                    (n[i] - n[i - 1] + s) * (q[i + 1] - q[i]) / (n[i + 1] - n[i])
                    + (n[i + 1] - n[i] - s) * (q[i] - q[i - 1]) / (n[i] - n[i - 1])
                )
                if q[i - 1] < parabola < q[i + 1]:
                    q[i] = parabola
                else:
                    q[i] = q[i] + s * (q[i + s] - q[i]) / (n[i + s] - n[i])
                n[i] += s

    def value(self):
        if self.count <= 5:
            return np.percentile(self.first, 100 * self.p)
        return self.q[2]


def streaming_quantile(p):
    """For the history of one cell, which only grows."""
    markers = P2(p)

    def limit(history):
        for m in history[markers.count :]:
            markers.add(m)
        return markers.value()

    return limit


# Rules that are more than a limit of the past.


def zscore(norms, z, decay, warmup, eps, beyond, max_norm=inf):
    """ZClip's `step`; dividing by n instead of n + 1e-6, and "limit" with eps."""
    buffer, mean, var = [], None, None
    found = []
    for n in norms:
        if mean is None:
            found.append(factor(n, max_norm))
            if usable(n):
                buffer.append(n)
            if len(buffer) == max(warmup, 2):
                mean, var = np.mean(buffer), np.var(buffer)
            continue
        if not math.isfinite(n):
            found.append(math.nan)
            continue
        std = math.sqrt(var)
        score = (n - mean) / (std + eps)
        c = n
        if score > z:
            c = {
                "reciprocal": mean + z * std * (z / score),
                "limit": mean + z * (std + eps),
                "mean": mean,
            }[beyond]
        found.append(factor(n, min(c, max_norm)))
        if usable(n):
            mean = decay * mean + (1 - decay) * c
            var = decay * var + (1 - decay) * (c - mean) ** 2
    return found


def median_clip(norms, k, warmup):
    """Median by P2 plus k standard deviations, of all norms with this one."""
    median, spread = streaming_quantile(0.5), deviation(k)
    return factors(norms, lambda h: median(h) + spread(h), "current", max(warmup, 2))


def jointly(cells, limit, observe, warmup=1):
    """One factor for all cells, of their common norm; `cells` are lists of norms."""
    totals = [norm([list(step)]) for step in zip(*cells, strict=True)]
    return factors(totals, limit, observe, warmup)


def phases(norms, before, limit, warmup):
    """A number until the limit, which learns what was kept, has seen enough."""
    history, found = [], []
    for n in norms:
        scale = factor(n, limit(history) if len(history) >= warmup else before)
        if usable(n):
            history.append(n * scale)
        found.append(scale)
    return found


def relative(norms, sizes, limit, observe, floor, warmup=1):
    """A limit of norm / max(size, floor); without a floor a size of 0 is free."""
    shares = []
    for n, size in zip(norms, sizes, strict=True):
        raised = size if floor is None else max(size, floor)
        shares.append(n / raised if raised else 0.0)
    found = factors(shares, limit, observe, warmup)
    free = [floor is None and size == 0 for size in sizes]
    return [1.0 if skip else scale for scale, skip in zip(found, free, strict=True)]


def adagc(cells, ratio, decay, warmup, max_norm):
    """AdaGC, with the late warm-up of an array that had no gradients at first."""
    seen = [0 for _ in cells]
    gamma = [inf for _ in cells]
    found = [[] for _ in cells]
    for norms in zip(*cells, strict=True):
        joint = factor(norm([list(norms)]), max_norm)
        for i, n in enumerate(norms):
            starting = seen[i] < warmup
            scale = joint if starting else factor(n, ratio * gamma[i])
            found[i].append(scale)
            kept = n * scale
            if not usable(n) or not usable(kept):
                continue
            seen[i] += 1
            if starting:
                gamma[i] = min(gamma[i], kept)
            else:
                gamma[i] = decay * gamma[i] + (1 - decay) * kept
    return found


def trust_ratio(norms, sizes, ratio, shape):
    """`ratio |w| / |u|` of LARS and LAMB; 1 where |w| is 0."""
    return [
        1.0 if size == 0 else factor(n, ratio * size, shape)
        for n, size in zip(norms, sizes, strict=True)
    ]


# Rules of elements: for an array of (steps, elements), what comes out.


def adaclip(values, decay, rescale):
    """AdaClip of Stable-SPAM, or its clamp; the peak of an array is its magnitude."""
    history, found = [], []
    average = ema(1.0, decay, "debiased")
    for row in values.tolist():
        peak = norm([row], inf)
        if usable(peak):
            history.append(peak)
        most = average(history) if history else inf
        new = []
        for x in row:
            if most == inf:
                new.append(x)
            elif not math.isfinite(peak):
                new.append(math.nan)
            elif abs(x) <= most:
                new.append(x)
            elif rescale:
                new.append(x * most / peak)
            else:
                new.append(math.copysign(most, x))
        found.append(new)
    return found


def spam_clip(values, threshold, decay, warmup):
    """SPAM's cut of elements; v as Adam keeps it, of what comes out; t counts all."""
    v, found = [0.0] * values.shape[1], []
    for t, row in enumerate(values.tolist(), start=1):
        new = []
        for i, x in enumerate(row):
            cut = x
            if t > warmup and v[i] > 0 and x**2 > threshold * v[i]:
                cut = math.copysign(math.sqrt(threshold * v[i]), x)
            if usable(abs(x)):
                v[i] = decay * v[i] + (1 - decay) * cut**2
            new.append(cut)
        found.append(new)
    return found


def adopt_clip(values, exponent):
    """ADOPT's clip; t counts from 1."""
    found = []
    for t, row in enumerate(values.tolist(), start=1):
        most = t**exponent
        found.append([x if math.isnan(x) else max(-most, min(x, most)) for x in row])
    return found


def acclip(values, alpha, momentum_decay, decay, eps):
    """ACClip, algorithm 2 of the paper, element by element."""
    size = values.shape[1]
    m, tau = [0.0] * size, [0.0] * size  # tau is already to the power of alpha
    found = []
    for row in values.tolist():
        new = []
        for i, x in enumerate(row):
            if not math.isfinite(x):
                new.append(math.nan)
                continue
            m[i] = momentum_decay * m[i] + (1 - momentum_decay) * x
            if x != 0:
                tau[i] = decay * tau[i] + (1 - decay) * abs(x) ** alpha
            level = tau[i] ** (1 / alpha)
            total = abs(m[i]) + eps
            new.append(m[i] * min(1.0, level / total) if total else 0.0)
        found.append(new)
    return found


def stable_adam(values, b1, b2, eps):
    """Adam over max(1, RMS) of StableAdamW, for one array."""
    size = values.shape[1]
    m, v = [0.0] * size, [0.0] * size
    found = []
    for t, row in enumerate(values.tolist(), start=1):
        squares, adam = [], []
        for i, g in enumerate(row):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            m_hat = m[i] / (1 - b1**t)
            v_hat = v[i] / (1 - b2**t)
            squares.append(g**2 / max(v_hat, eps**2))
            adam.append(m_hat / (math.sqrt(v_hat) + eps))
        rms = math.sqrt(np.mean(squares))
        found.append([a / max(1.0, rms) for a in adam])
    return found


def clippy(values, params, ratio, absolute):
    """Clippy's one factor for an array: an element of 0 counts as 1."""
    found = []
    for row, own in zip(values.tolist(), params.tolist(), strict=True):
        if not all(math.isfinite(x) for x in row):
            found.append([math.nan] * len(row))
            continue
        reach = [
            (ratio * abs(w) + absolute) / abs(x) if x else 1.0
            for x, w in zip(row, own, strict=True)
        ]
        scale = min(1.0, *reach)
        found.append([x * scale for x in row])
    return found
