"""Temporal order: whether a plain network learns what came first, A or B, long ago.

With plain SGD, at a learning rate that is high enough to learn within some thousand
updates, a clip decides: at a length of 30 nearly no run solves it without one, and
nearly all do with one. Short sequences are learned either way, much longer ones not at
all in this time: what is forgotten on the way cannot be clipped back.
"""

import dataclasses

from experiments.studies import solving
from experiments.studies.solving import SolvingConfig

SMOKE = SolvingConfig(
    experiment="temporal_order",
    task=("torder",),
    length=(30,),
    lr=(0.1,),
    clip=("none", "clip_by_global_norm:1.0"),
    seeds=8,
    updates=3000,
    batch=20,
    checks=12,
)
STANDARD = dataclasses.replace(
    SMOKE,
    length=(10, 20, 30, 40),
    lr=(0.03, 0.1),
    seeds=12,
    checks=15,
    control=(0.01, 0.02),
    control_length=(30,),
)
STUDY = solving.study(
    about="temporal order, tanh RNN, SGD: which share of runs solves it, by length",
    table=solving.arms_table,
    smoke=SMOKE,
    standard=STANDARD,
    full=dataclasses.replace(
        STANDARD,
        length=(10, 20, 30, 40, 50, 75, 100, 150, 200),
        lr=(0.003, 0.01, 0.03, 0.1, 0.3),
        clip=("none", *(f"clip_by_global_norm:{c}" for c in (0.3, 1.0, 3.0))),
        alpha=(0.0, 2.0),
        seeds=50,
        updates=50_000,
        checks=100,
        control=(0.001, 0.003, 0.01, 0.02),
        control_length=(30, 50),
    ),
)
