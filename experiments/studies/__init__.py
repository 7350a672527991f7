"""The experiments, by name. A new one is a file with a `STUDY`, and a line here."""

from experiments.studies import cliff, data_parallel, limits, lstm_rows, rnn_rows
from experiments.studies.study import Study

STUDIES: dict[str, Study] = {
    "rnn_rows": rnn_rows.STUDY,
    "lstm_rows": lstm_rows.STUDY,
    "cliff": cliff.STUDY,
    "limits": limits.STUDY,
    "data_parallel": data_parallel.STUDY,
}
