"""Temporal order: whether a plain network learns what came first, A or B, long ago.

Does a clip decide whether plain SGD solves it, at learning rates that are high enough
to learn within some thousand updates? If so, from which length on, and up to which? A
clip keeps a step in bounds; it cannot bring back what the network forgets on the way.
Does a lower learning rate, with more updates, do as well without one?
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
    checks=6,
)
STANDARD = dataclasses.replace(
    SMOKE,
    length=(10, 20, 30),
    lr=(0.03, 0.1),
    seeds=20,
    checks=15,
    control=(0.02,),
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
