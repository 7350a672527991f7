"""A tanh RNN on image rows, at a learning rate that is too high without a clip.

Plain SGD trains this network well at a learning rate of 0.1, clipped or not. At 1 the
unclipped runs saturate within a few updates and stay near chance, while a clip by
global norm trains to the same accuracy as the small rate does: clipping widens the
range of learning rates that work. The tier `standard` runs the whole range.
"""

import dataclasses

from experiments.config import RowsConfig
from experiments.studies import rows

SMOKE = RowsConfig(
    experiment="rnn_rows",
    cell="rnn",
    hidden=32,
    optimizer="sgd",
    lr=(1.0,),
    clip=("none", "clip_by_global_norm:1.0", "clip_by_global_norm:0.1"),
)
STUDY = rows.study(
    about="tanh RNN on image rows, SGD at a high learning rate: clip or no clip",
    smoke=SMOKE,
    standard=dataclasses.replace(SMOKE, lr=(0.1, 0.3, 1.0, 3.0), seeds=10),
)
