"""The experiments, by name. A new one is a file with a `STUDY`, and a line here."""

from experiments.studies import (
    char_lm,
    cliff,
    data_parallel,
    diagnose,
    direction,
    explode,
    image_rows,
    limits,
    lr_window,
    music,
    pathological,
    smoothness,
    temporal_order,
    thresholds,
)
from experiments.studies.study import Study

STUDIES: dict[str, Study] = {
    "explode": explode.STUDY,
    "cliff": cliff.STUDY,
    "direction": direction.STUDY,
    "temporal_order": temporal_order.STUDY,
    "pathological": pathological.STUDY,
    "lr_window": lr_window.STUDY,
    "music": music.STUDY,
    "image_rows": image_rows.STUDY,
    "char_lm": char_lm.STUDY,
    "diagnose": diagnose.STUDY,
    "thresholds": thresholds.STUDY,
    "smoothness": smoothness.STUDY,
    "limits": limits.STUDY,
    "data_parallel": data_parallel.STUDY,
}
