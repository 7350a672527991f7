"""Six tasks on which a plain network must look far back: SGD, SGD+C and SGD+CR.

C is a clip by global norm, against gradients that explode; R is the regulariser Omega,
against those that vanish. Is a network that still feels what came long ago thrown off
when it learns from it, unless its steps are clipped? And does it feel it without Omega?

What was published, for 50 to 200 steps, is that SGD-CR solves all tasks but the
permutation (`perm`) at 100 %, after up to 5 million updates at a learning rate of 0.01
(Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
2013, https://arxiv.org/abs/1211.5063). The smoke and standard sizes have one and two of
the tasks, at one length and with some thousand updates at most; `full` has all tasks
and the published lengths.
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
    f"check, with Wilson's 95 % interval; kept: of {FINAL:,} at the end; perfect: no "
    "answer wrong then; after: updates until solved, median of the runs that did. Each "
    "column at its best learning rate{choice}."
)


def table(rows: Rows) -> Table:
    """Returns a line per task and length, and a column per clip and weight of Omega."""
    compared = solving.compared(rows)
    columns = outcomes.by(compared, "arm", "alpha")
    result = Table(
        Column("task", no_wrap=True),
        *(Column(f"{_method(*key)}\n{solving.name(*key)}") for key in columns),
        box=SIMPLE,
        title=rows[0]["experiment"],
        caption=TABLE_CAPTION.format(choice=outcomes.choice(compared)),
    )
    for runs in outcomes.by(compared, "task", "length").values():
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
    kept, perfect = (sum(run[x] for run in found.runs) for x in ("kept", "perfect"))
    return (
        f"{solving.rate(found.runs, 'solved')}\n"
        f"kept {kept}, perfect {perfect}\n"
        f"after {solving.when(found.runs)}, lr {found.lr:g}"
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
