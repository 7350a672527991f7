"""Every way of clipping a gradient, as an optax transformation.

A clip is three small parts, `clip_by(scope, bound, shape)`: what counts as one
magnitude (`optaxclip.scopes`), how large it may be (`optaxclip.bounds`), and what
becomes of it beyond (`optaxclip.shapes`). The named methods are such expressions.
"""

from optaxclip import axes, bounds, norms, scopes, shapes
from optaxclip.adaptive import (
    adaclip,
    adagc,
    adagn,
    adanorm,
    autoclip,
    ema_clip,
    mean_clip,
    median_clip,
    norm_growth_clip,
    percentile_clip,
    quantile_clip,
    spam_clip,
    zclip,
)
from optaxclip.beyond import acclip, clippy, scale_by_stable_adam
from optaxclip.clip import Clip, clip_by, recorded, sharded
from optaxclip.norms import unitwise_norm
from optaxclip.per_example import (
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
)
from optaxclip.recipes import (
    adaptive_grad_clip,
    adopt_clip,
    clip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    clip_by_trust_ratio,
    clip_by_unit_norm,
    clip_by_value,
    normalize_by_global_norm,
    normalize_by_leaf_norm,
    normalize_by_trust_ratio,
    unitwise_clip,
)
from optaxclip.records import Record, by_name, records
from optaxclip.wrappers import check_finite, skip_steps, zero_nonfinite

__version__ = "0.2.0"

__all__ = [
    "Clip",
    "Record",
    "acclip",
    "adaclip",
    "adagc",
    "adagn",
    "adanorm",
    "adaptive_grad_clip",
    "adopt_clip",
    "autoclip",
    "axes",
    "bounds",
    "by_name",
    "check_finite",
    "clip",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_trust_ratio",
    "clip_by_unit_norm",
    "clip_by_value",
    "clippy",
    "ema_clip",
    "mean_clip",
    "median_clip",
    "norm_growth_clip",
    "normalize_by_global_norm",
    "normalize_by_leaf_norm",
    "normalize_by_trust_ratio",
    "norms",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "percentile_clip",
    "quantile_clip",
    "recorded",
    "records",
    "scale_by_stable_adam",
    "scopes",
    "shapes",
    "sharded",
    "skip_steps",
    "spam_clip",
    "unitwise_clip",
    "unitwise_norm",
    "zclip",
    "zero_nonfinite",
]
