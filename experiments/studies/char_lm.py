"""Characters: a plain network predicts each next character of a text.

Does a clip make higher learning rates usable for plain SGD, and how much lower does the
loss then get? Near the highest rate that works without a clip, does it depend on the
seed which runs blow up? Few seeds could then tell either story. The same can be asked
of an LSTM (`--cell lstm`) and of Adam (`--optimizer adam --lr 0.003 0.01 0.03`).

Losses are shown in bits per character; gradients and thresholds are those of the loss
in nats. With 500 sigmoid units on the Penn Treebank, 1.50 bits were published for SGD
and 1.42 with a clip (Pascanu, Mikolov, Bengio, On the difficulty of training recurrent
neural networks, 2013, https://arxiv.org/abs/1211.5063, table 1).
"""

import dataclasses
import math
from pathlib import Path

from experiments.studies import prediction
from experiments.studies.prediction import DataSet, PredictionConfig
from experiments.tasks import text

DATA_SET = DataSet(
    unit="bits per character",
    per_nat=1 / math.log(2),
    loss="cross entropy in nats, mean over batch and steps",
    about=lambda config: text.about(config.data, config.length),
    load=lambda config, split: text.load(config.data, config.length, split),
    baselines=lambda config, split: text.baselines(config.data, config.length, split),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharLmConfig(PredictionConfig):
    """Training of a recurrent network that predicts each next character of a text."""

    data: Path | None = None
    """A text in UTF-8. Default: the documentation of Python."""


SMOKE = CharLmConfig(
    experiment="char_lm",
    lr=(1.0, 2.0),
    clip=("none", "clip_by_global_norm:1.0"),
    seeds=12,
    updates=200,
    batch=8,
    length=32,
    hidden=32,
    checks=4,
)
STANDARD = dataclasses.replace(
    SMOKE,
    lr=(0.3, 0.5, 1.0, 2.0, 4.0),
    clip=("none", "clip_by_global_norm:1.0", "clip_by_global_norm:0.25"),
    updates=600,
    batch=16,
    length=64,
    hidden=64,
    checks=10,
)
STUDY = prediction.study(
    about="characters of a text, tanh RNN, SGD: tuned losses, and rates that work",
    data_set=DATA_SET,
    tiers={
        "smoke": SMOKE,
        "standard": STANDARD,
        "full": dataclasses.replace(
            STANDARD,
            lr=(0.3, 0.5, 1.0, 2.0, 4.0, 8.0),
            seeds=20,
            updates=20_000,
            batch=32,
            length=128,
            hidden=512,
            checks=50,
        ),
    },
)
