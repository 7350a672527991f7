import json
import math

import numpy as np
import pytest

from experiments import results
from experiments.cli import main
from experiments.config import RowsConfig, UsageError
from experiments.studies import STUDIES, data_parallel, rows

GLOBAL = "clip_by_global_norm:0.1"
RUNS = {
    "rnn_rows": f"--updates 300 --seeds 3 --clip none clip:0.5 {GLOBAL}".split(),
    "lstm_rows": f"--updates 20 --seeds 2 --clip none {GLOBAL}".split(),
    "cliff": [],
    "limits": [],
    "data_parallel": "--updates 20 --hidden 16 --clip autoclip".split(),
}
LINES = {"rnn_rows": 9, "lstm_rows": 4, "cliff": 2, "limits": 8, "data_parallel": 2}
FIGURES = {
    "rnn_rows": {"curves.png"},
    "lstm_rows": {"curves.png"},
    "cliff": {"paths.png", "starts.png"},
    "limits": {"limits.png"},
    "data_parallel": {"meshes.png"},
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "MODEL", (2,))
        main(["run", request.param, "--out", str(directory), *RUNS[request.param]])
    return request.param, directory


def test_a_run_leaves_all_that_is_needed_to_repeat_and_judge_it(run):
    name, directory = run
    about = json.loads((directory / "config.json").read_text())
    assert about["config"]["experiment"] == name
    assert {"commit", "device", "python", "versions"} < about.keys()
    assert STUDIES[name].facts.items() < about.items()
    lines = (directory / "results.jsonl").read_text().splitlines()
    assert len(lines) == LINES[name]
    for line in map(json.loads, lines):
        assert {"experiment", "arm", "updates", "seconds"} < line.keys()
        assert ("lr" in line) == hasattr(STUDIES[name].tiers["smoke"], "lr")
    assert {path.name for path in directory.glob("*.png")} == FIGURES[name]


def test_plot_redraws_the_same_figures_from_what_is_stored(run):
    _, directory = run
    drawn = {path: path.read_bytes() for path in directory.glob("*.png")}
    for path in drawn:
        path.unlink()
    main(["plot", str(directory)])
    assert {path: path.read_bytes() for path in directory.glob("*.png")} == drawn


def test_every_experiment_keeps_its_finding(run):
    name, directory = run
    found = results.load(directory).rows
    if name == "rnn_rows":
        accuracy = {arm: [] for arm in ("none", "clip:0.5", GLOBAL)}
        for row in found:
            accuracy[row["arm"]].append(row["test_accuracy"])
        assert max(accuracy["none"]) < 0.4
        assert min(accuracy[GLOBAL]) > 0.8
    if name == "cliff":
        none, clipped = found
        assert none["arm"] == "none"
        assert none["reached"] <= 0.7
        assert clipped["reached"] >= 0.95
    if name == "limits":
        follows = [None, None, 27, None, 89, 4, 42, 7]
        assert [None if math.isnan(x["follows"]) else x["follows"] for x in found] == (
            follows
        )
        left = [1.64, 3.04, 1.42, 0.97, 0.78, 1.34, 1.55, 0.90]
        assert [x["spike_kept"] for x in found] == pytest.approx(left, abs=0.01)
        assert [x["state"] for x in found] == [0, 2, 2, 3, 201, 257, 201, 1]
    if name == "data_parallel":
        alone, spread = found
        assert (alone["mesh"], spread["mesh"]) == ("1x1", "4x2")
        assert alone["share"] == 1
        assert 0.5 <= spread["share"] < 0.75
        assert 0 < spread["difference"] < 1e-3 * alone["moved"]
        for same in ("first_grad_norm", "test_loss", "test_accuracy"):
            assert spread[same] == pytest.approx(alone[same], rel=1e-3)


def rows_of(arm, lr, accuracies):
    return [{"arm": arm, "lr": lr, "test_accuracy": a} for a in accuracies]


@pytest.mark.parametrize(
    ("accuracies", "found"),
    [
        ((0.8, 0.8, 0.9, 0.9), "gains"),
        ((0.7, 0.8, 0.9, 0.9), "makes no clear difference"),
        ((0.5, 0.6, 0.6, 0.7), "makes no clear difference"),
        ((0.1, 0.2, 0.3, 0.3), "loses"),
    ],
)
def test_the_verdict_follows_from_the_ranges(accuracies, found):
    none = rows_of("none", 0.1, (0.5, 0.6, 0.6, 0.7))
    (line,) = rows.verdict([*none, *rows_of("clip:1", 0.1, accuracies)])
    assert line.startswith(f"lr 0.1: clip:1 {found}: accuracy")
    assert rows.verdict(rows_of("clip:1", 0.1, accuracies)) == []


def test_fewer_than_four_seeds_give_no_verdict():
    none, clip = rows_of("none", 1.0, (0.1,) * 3), rows_of("clip:1", 1.0, (0.9,) * 3)
    (line,) = rows.verdict([*none, *clip])
    assert line.startswith("no verdict")


def test_each_arm_is_judged_at_its_best_learning_rate_too():
    high, low = (0.9,) * 4, (0.1,) * 4
    wide = [*rows_of("clip:1", 0.1, high), *rows_of("clip:1", 1.0, high)]
    narrow = [*rows_of("none", 0.1, high), *rows_of("none", 1.0, low)]
    at_low, at_high, at_best = rows.verdict([*narrow, *wide])
    assert "lr 0.1: clip:1 makes no clear difference" in at_low
    assert "lr 1: clip:1 gains" in at_high
    assert "each at its best lr: clip:1 makes no clear difference" in at_best


def test_numbers_that_are_not_finite_survive_as_null(tmp_path):
    config = STUDIES["rnn_rows"].tiers["smoke"]
    results.begin(tmp_path, config, {})
    results.finish(tmp_path, [{"loss": math.inf, "diverged": True}], {"x": np.ones(2)})
    assert '"loss": null' in (tmp_path / "results.jsonl").read_text()
    found = results.load(tmp_path)
    assert math.isnan(found.rows[0]["loss"])
    assert found.rows[0]["diverged"] is True
    assert found.curves["x"].tolist() == [1.0, 1.0]


def test_a_config_comes_back_from_its_run_directory(tmp_path):
    config = STUDIES["lstm_rows"].tiers["standard"]
    results.begin(tmp_path, config, {})
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    stored |= {"lr": tuple(stored["lr"]), "clip": tuple(stored["clip"])}
    assert RowsConfig(**stored) == config


def test_run_directories_are_numbered_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(results.create(None, "demo")) for _ in range(2)]
    assert names == ["runs/demo-1", "runs/demo-2"]
    (tmp_path / "runs" / "demo-1" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        results.create(tmp_path / "runs" / "demo-1", "demo")
