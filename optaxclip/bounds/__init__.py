"""How large a magnitude may be at this step: the limits, and what they learn.

A bound is to magnitudes what a gradient transformation is to updates:

    state = bound.init(magnitudes)
    limits, learn = bound.limit(state, magnitudes, own)
    state = learn(new_magnitudes)

`limits` broadcast against the magnitudes cell by cell. `own(who)` measures the
parameters in the same scope; only a bound that calls it needs params. `learn` runs
after the shape, so a bound may learn from what was seen, what was kept, or both. The
state has the structure, shapes and dtypes that `init` gives, always, and is
`optax.EmptyState` for a bound that learns nothing: such a clip accepts `state=None`.

Wherever a clip takes a bound it takes

* a number >= 0: 0 lets nothing through, inf everything. A Python number that is
  negative or NaN is refused when the clip is made; a traced one is clamped at 0, and
  NaN makes the updates NaN;
* an optax schedule of the step;
* a `Bound`;
* a pytree of these that is a prefix of the magnitudes: of the updates for `element`,
  `unit` and `leaf`, a dict by label for `group`.

The learned ones:

| bound | limit | sees | learns from |
|---|---|---|---|
| `percentile` | percentile of a window | this update too | what was measured |
| `streaming_quantile` | quantile of all history, by 5 markers | this update too | what was measured |
| `tracked_quantile` | up or down by a step | the past | what was measured |
| `median_mad` | median + k 1.4826 MAD of a window | the past | what was measured |
| `mean` | ratio * mean of all history | the past | what was measured |
| `mean_std` | mean + k std of all history | the past | what was measured |
| `deviation` | k std of all history | the past | what was measured |
| `zscore` | mean + z std, running | the past | what it would keep |
| `ema` | ratio * running mean | the past | what was kept |
| `growth` | factor * the last | the past | what was kept |
| `second_moment` | sqrt(threshold * running mean square) | the past | what was kept |
| `mean_over_rms` | running mean / running root mean square | this update too | what was measured |

`observe` changes the last two columns where a bound has it. All obey: a magnitude that
is NaN or inf leaves no trace in what is learned, to the bit; nor does an exact 0, so
that nothing is pulled down to a limit of 0 that it could not leave; a cell that has seen
too little has no limit (inf). Traced arguments outside their range are moved to its
end; under `optax.inject_hyperparams` of bfloat16 params, which rounds a decay of 0.999
to 1, pass `hyperparam_dtype=jnp.float32`.

What a state holds of cells of whole leaves is one vector, with an entry for every leaf
of the params, `None` and what is not floating point included; of labels, an entry for
each in sorted order; `optaxclip.by_name` gives them their names. Of units it is a tuple
with an array for every leaf. Of elements it has the structure of the params, so
`optax.tree_map_params` takes its arrays for slots of params. A leaf that has no update
at a step keeps its entry.
"""  # noqa: E501

from optaxclip.bounds._averages import (
    GrowthState,
    MeanOverRmsState,
    MeanState,
    SecondMomentState,
    ema,
    growth,
    mean,
    mean_over_rms,
    second_moment,
)
from optaxclip.bounds._combined import (
    at_least,
    at_most,
    jointly,
    phases,
    plus,
    recorded,
    relative,
)
from optaxclip.bounds._deviations import SpreadState, deviation, mean_std, zscore
from optaxclip.bounds._quantiles import (
    StreamingState,
    TrackedState,
    streaming_quantile,
    tracked_quantile,
)
from optaxclip.bounds._rules import (
    Bound,
    BoundLike,
    ScheduleState,
    constant,
    of,
    parts,
    schedule,
)
from optaxclip.bounds._windows import WindowState, median_mad, percentile

__all__ = [
    "Bound",
    "BoundLike",
    "GrowthState",
    "MeanOverRmsState",
    "MeanState",
    "ScheduleState",
    "SecondMomentState",
    "SpreadState",
    "StreamingState",
    "TrackedState",
    "WindowState",
    "at_least",
    "at_most",
    "constant",
    "deviation",
    "ema",
    "growth",
    "jointly",
    "mean",
    "mean_over_rms",
    "mean_std",
    "median_mad",
    "of",
    "parts",
    "percentile",
    "phases",
    "plus",
    "recorded",
    "relative",
    "schedule",
    "second_moment",
    "streaming_quantile",
    "tracked_quantile",
    "zscore",
]
