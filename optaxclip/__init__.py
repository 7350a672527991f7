"""Every way of clipping a gradient, as an optax transformation.

A clip is three small parts, `clip_by(scope, bound, shape)`: what counts as one
magnitude (`optaxclip.scopes`), how large it may be (`optaxclip.bounds`), and what
becomes of it beyond (`optaxclip.shapes`). The named methods are such expressions.
"""

from optaxclip import axes, bounds, norms, scopes, shapes
from optaxclip.bounds import recorded
from optaxclip.clip import clip_by
from optaxclip.norms import unitwise_norm
from optaxclip.per_example import (
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
)
from optaxclip.recipes import (
    adaptive_grad_clip,
    clip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    clip_by_unit_norm,
    clip_by_value,
    normalize_by_global_norm,
    normalize_by_leaf_norm,
    unitwise_clip,
)
from optaxclip.records import Record, records
from optaxclip.wrappers import check_finite, zero_nonfinite

__version__ = "0.1.0"

__all__ = [
    "Record",
    "adaptive_grad_clip",
    "axes",
    "bounds",
    "check_finite",
    "clip",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_unit_norm",
    "clip_by_value",
    "norms",
    "normalize_by_global_norm",
    "normalize_by_leaf_norm",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "recorded",
    "records",
    "scopes",
    "shapes",
    "unitwise_clip",
    "unitwise_norm",
    "zero_nonfinite",
]
