import json
import math
import re

import numpy as np
import pytest
from rich.table import Table

from experiments import report, results
from experiments.cli import main
from experiments.config import UsageError
from experiments.journal import Journal, Stopped
from experiments.studies import STUDIES, data_parallel

# Options that make every experiment small, lines in its results, and its figures.
SMALL = "--seeds 2 --updates 30 --checks 2 --length 30 --hidden 16 --batch 4 "
RUNS = {
    "explode": (
        "--radius 0.9 1.1 --hidden 16 --steps 200 --seeds 2",
        82,
        {"norms", "dtypes", "clips"},
    ),
    "cliff": ("", 2, {"shares", "paths", "starts_50"}),
    "direction": (
        "--updates 20 --seeds 2 --clip clip:0.001 clip:1.0 --starts 4 "
        "--cliff-updates 50 --length 10",
        6,
        {"cosines", "success"},
    ),
    "temporal_order": (
        "--length 12 --updates 300 --checks 3 --seeds 3 --lr 0.1 0.3 --control 0.1 "
        "--control-length 12",
        15,
        {"success", "times", "map", "dynamics"},
    ),
    "pathological": (
        "--length 10 --updates 20 --checks 2 --seeds 2 --hidden 8",
        6,
        {"success", "times", "map", "dynamics"},
    ),
    "lr_window": (
        "--lr 1 --updates 300 --seeds 3 --clip none clip_by_global_norm:0.1",
        6,
        {"losses", "maps"},
    ),
    "music": (f"{SMALL} --lr 1", 6, {"curves", "map"}),
    "image_rows": (
        "--updates 20 --seeds 2 --clip none clip_by_global_norm:0.1",
        4,
        {"curves", "map"},
    ),
    "char_lm": (f"{SMALL} --lr 2", 6, {"curves", "map"}),
    "diagnose": (
        "--setting digits --seeds 2 --updates 60",
        8,
        {"timeline", "delays"},
    ),
    "smoothness": (
        "--seeds 2 --updates 16 --every 2 --batch 4 --probe 8 --length 10 --hidden 8",
        4,
        {"smoothness"},
    ),
    "thresholds": (
        "--length 10 --updates 20 --checks 2 --seeds 2 --hidden 8 --threshold 1 "
        "--clip clip_by_leaf_norm:1",
        6,
        {"thresholds", "methods"},
    ),
    "limits": ("", 8, {"limits"}),
    "data_parallel": ("--updates 20 --hidden 16 --clip autoclip", 2, {"meshes"}),
}


def test_every_experiment_is_run_here():
    assert RUNS.keys() == STUDIES.keys()


def start(name, directory):
    options = RUNS[name][0].split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "MODEL", (2,))
        main(["run", name, "--out", str(directory), *options])


# Tests of one run are for one worker, which then makes it only once.
ONCE = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in RUNS]


@pytest.fixture(scope="module", params=ONCE)
def run(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / request.param
    start(request.param, directory)
    return request.param, directory


def test_a_run_leaves_all_that_is_needed_to_repeat_and_judge_it(run):
    name, directory = run
    about = json.loads((directory / "config.json").read_text())
    assert about["config"]["experiment"] == name
    assert {"commit", "device", "python", "versions", "command"} < about.keys()
    lines = (directory / "results.jsonl").read_text().splitlines()
    assert len(lines) == RUNS[name][1]
    for line in map(json.loads, lines):
        assert {"experiment", "seconds"} < line.keys()
    assert {path.stem for path in directory.glob("*.png")} == RUNS[name][2]
    assert not (directory / "checkpoints").exists()


def test_plot_redraws_the_same_figures_and_page_from_what_is_stored(run):
    _, directory = run
    files = [*directory.glob("*.png"), directory / "report.html"]
    drawn = {path: path.read_bytes() for path in files}
    for path in drawn:
        path.unlink()
    main(["plot", str(directory)])
    assert {path: path.read_bytes() for path in files} == drawn


def test_the_page_needs_no_other_file_and_tells_how_to_repeat_it(run):
    name, directory = run
    page = (directory / "report.html").read_text()
    about = json.loads((directory / "config.json").read_text())
    assert about["command"] in page
    assert page.count("<img ") == len(RUNS[name][2])
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}
    found = results.load(directory)
    verdict = STUDIES[name].verdict(found.rows)
    assert page.count("<li>") == len(verdict) > 0


def test_findings_are_kept(run):
    name, directory = run
    found = results.load(directory).rows
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
    if name == "lr_window":
        accuracy = {row["arm"]: [] for row in found}
        for row in found:
            accuracy[row["arm"]].append(1 - row["final_error"])
        assert max(accuracy["none"]) < 0.4
        assert min(accuracy["clip_by_global_norm:0.1"]) > 0.8
    if name == "data_parallel":
        alone, spread = found
        assert (alone["mesh"], spread["mesh"]) == ("1x1", "4x2")
        assert alone["share"] == 1
        assert 0.5 <= spread["share"] < 0.75
        assert 0 < spread["difference"] < 1e-3 * alone["moved"]
        for same in ("first_grad_norm", "test_loss", "test_accuracy"):
            assert spread[same] == pytest.approx(alone[same], rel=1e-3)


@pytest.mark.parametrize(
    "run", [ONCE[list(RUNS).index("temporal_order")]], indirect=True
)
def test_a_run_that_was_stopped_is_resumed_bit_for_bit(
    run, tmp_path, monkeypatch, capsys
):
    name, directory = run
    pieces = iter([False, False, False, False, True])
    advance = Journal.advance

    def stop_once(journal, updates, best=""):
        advance(journal, updates, best)
        if next(pieces, False):
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_is_due", lambda journal: True)
        patch.setattr(Journal, "advance", stop_once)
        with pytest.raises(SystemExit) as stopped:
            start(name, tmp_path)
    assert stopped.value.code == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(f"python -m experiments resume {tmp_path}")
    main(["resume", str(tmp_path)])
    whole, resumed = results.load(directory), results.load(tmp_path)
    np.testing.assert_equal(resumed.curves, whole.curves)
    for row in (*whole.rows, *resumed.rows):
        row["seconds"] = None
    np.testing.assert_equal(resumed.rows, whole.rows)


def test_numbers_that_are_not_finite_survive_as_null(tmp_path):
    config = STUDIES["cliff"].tiers["smoke"]
    results.begin(tmp_path, config, {})
    results.finish(tmp_path, [{"loss": math.inf, "diverged": True}], {"x": np.ones(2)})
    assert '"loss": null' in (tmp_path / "results.jsonl").read_text()
    found = results.load(tmp_path)
    assert math.isnan(found.rows[0]["loss"])
    assert found.rows[0]["diverged"] is True
    assert found.curves["x"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", STUDIES)
def test_a_config_comes_back_from_its_run_directory(tmp_path, name):
    for tier, config in STUDIES[name].tiers.items():
        directory = tmp_path / tier
        directory.mkdir()
        results.begin(directory, config, {})
        about = results.read_about(directory)
        assert results.read_config(about, type(config)) == config


def test_run_directories_are_numbered_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(results.create(None, "demo")) for _ in range(2)]
    assert names == ["runs/demo-1", "runs/demo-2"]
    (tmp_path / "runs" / "demo-1" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        results.create(tmp_path / "runs" / "demo-1", "demo")


def test_an_interval_is_not_taken_for_markup(tmp_path):
    table = Table("loss")
    table.add_row("[inf, inf]")
    about = {"config": {"experiment": "name"}, "command": "run & see"}
    path = report.write_page(tmp_path, about, "what <is> it?", table, ["a < b"], [])
    page = path.read_text()
    assert "[inf, inf]" in page
    for text in ("run &amp; see", "what &lt;is&gt; it?", "<li>a &lt; b</li>"):
        assert text in page
