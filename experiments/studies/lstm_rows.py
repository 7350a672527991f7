"""The usual tutorial: an LSTM on image rows, with no clip and with three kinds.

Ten units read an image row by row. Tutorials clip here, each element at 0.5 (Keras'
`clipvalue`) or the norm of each array at 1 (`clipnorm`), and report a gain. Adam hardly
notices the length of a gradient, and an LSTM does not explode within 8 steps, so there
is no reason to expect one; the printed verdict is computed from the runs.
`--optimizer sgd --lr 1` is the same question for plain SGD.
"""

import dataclasses

from experiments.config import RowsConfig
from experiments.studies import rows

SMOKE = RowsConfig(
    experiment="lstm_rows",
    cell="lstm",
    hidden=10,
    optimizer="adam",
    lr=(0.01,),
    clip=("none", "clip:0.5", "clip_by_leaf_norm:1.0", "clip_by_global_norm:1.0"),
)
STUDY = rows.study(
    about="the tutorial: 10-unit LSTM on image rows with Adam, four kinds of clip",
    smoke=SMOKE,
    standard=dataclasses.replace(SMOKE, lr=(0.003, 0.01, 0.03), seeds=10),
)
