"""Six tasks on which a plain network must look far back: SGD, SGD+C and SGD+CR.

C is a clip by global norm, against gradients that explode; R is the regulariser Omega,
against those that vanish. A clip decides whether a network that can still feel what
came long ago is thrown off when it learns from it; Omega, whether it can feel it.

What was published, for 50 to 200 steps, is that SGD-CR solves all tasks but the
permutation (`perm`) at 100 %, after up to 5 million updates at a learning rate of 0.01
(Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
2013, https://arxiv.org/abs/1211.5063). The smoke and standard sizes have tasks which
are learned within some thousand updates, at a length that tells the three apart; `full`
has all tasks and the published lengths.
"""

import dataclasses

from rich.box import SIMPLE
from rich.table import Column, Table

from experiments import outcomes
from experiments.results import Rows
from experiments.studies import solving
from experiments.studies.solving import FINAL, FRESH, SOLVED, SolvingConfig

TABLE_CAPTION = (
    f"Solved: fewer than {SOLVED:.0%} of {FRESH:,} fresh sequences wrong at some "
    f"check, with Wilson's 95 % interval; kept: of {FINAL:,} at the end; after: "
    "updates until solved, median of the runs that did. Each column at its best "
    "learning rate, chosen on the first half of the seeds and read off the others."
)


def table(rows: Rows) -> Table:
    """Returns a line per task and length, and a column per clip and weight of Omega."""
    columns = outcomes.by([row for row in rows if not row["control"]], "arm", "alpha")
    result = Table(
        Column("task", no_wrap=True),
        *(Column(f"{_method(*key)}\n{solving.name(*key)}") for key in columns),
        box=SIMPLE,
        title=rows[0]["experiment"],
        caption=TABLE_CAPTION,
    )
    for runs in outcomes.by(rows, "task", "length").values():
        found = solving.tuned(runs)
        cells = [_cell(found[key]) for key in columns]
        result.add_row(solving.where(runs[0]), *cells)
    return result


def _method(arm: str, alpha: float) -> str:
    """Names what is compared as it was published."""
    if arm == "none":
        return "SGD"
    return "SGD+CR" if alpha else "SGD+C"


def _cell(found: outcomes.Tuned) -> str:
    kept = sum(run["kept"] for run in found.runs)
    return (
        f"{solving.rate(found.runs, 'solved')}\n"
        f"kept {kept}, after {solving.when(found.runs)}, lr {found.lr:g}"
    )


SMOKE = SolvingConfig(
    experiment="pathological",
    task=("perm",),
    length=(15,),
    lr=(0.1,),
    clip=("none", "clip_by_global_norm:1.0"),
    alpha=(0.0, 2.0),
    seeds=6,
    updates=300,
    batch=20,
    checks=6,
)
STANDARD = dataclasses.replace(
    SMOKE,
    task=("torder3", "perm"),
    length=(30,),
    lr=(0.03, 0.1, 0.3),
    seeds=12,
    updates=2500,
    checks=10,
)
STUDY = solving.study(
    about="tasks that need a long memory, tanh RNN: SGD, with a clip, and with Omega",
    table=table,
    smoke=SMOKE,
    standard=STANDARD,
    full=dataclasses.replace(
        STANDARD,
        task=("torder", "torder3", "add", "mul", "perm", "mem"),
        length=(50,),
        longest=200,
        lr=(0.01, 0.03, 0.1),
        initial="smart_tanh",
        seeds=20,
        updates=200_000,
        checks=100,
    ),
)
