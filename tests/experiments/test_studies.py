import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rich.table import Table

from experiments import outcomes, report, results
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
    # The smoke tier: its finding needs no less.
    "temporal_order": ("", 16, {"success", "times", "map", "dynamics"}),
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
    assert FINDINGS.keys() < RUNS.keys()


def start(name, directory, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "MODEL", (2,))
        main(["run", name, "--out", str(directory), *options.split()])


# One test: its workers would each make the run again.
@pytest.mark.parametrize("name", RUNS)
def test_a_run_tells_all_and_finds_what_is_known_and_is_redrawn(name, tmp_path):
    options, lines, figures = RUNS[name]
    start(name, tmp_path, options)
    assert_all_is_there(name, tmp_path, lines, figures)
    assert_the_page_needs_no_other_file(name, tmp_path, figures)
    FINDINGS.get(name, lambda rows: None)(results.load(tmp_path).rows)
    assert_plot_redraws_the_same(tmp_path)


def assert_all_is_there(name, directory, lines, figures):
    about = json.loads((directory / "config.json").read_text())
    assert about["config"]["experiment"] == name
    assert {"commit", "device", "python", "versions", "command"} < about.keys()
    rows = (directory / "results.jsonl").read_text().splitlines()
    assert len(rows) == lines
    for row in map(json.loads, rows):
        assert {"experiment", "seconds"} < row.keys()
    assert {path.stem for path in directory.glob("*.png")} == figures
    assert not (directory / "checkpoints").exists()


def assert_the_page_needs_no_other_file(name, directory, figures):
    page = (directory / "report.html").read_text()
    about = json.loads((directory / "config.json").read_text())
    assert about["command"] in page
    assert page.count("<img ") == len(figures)
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}
    verdict = STUDIES[name].verdict(results.load(directory).rows)
    assert page.count("<li>") == len(verdict) > 0


def assert_plot_redraws_the_same(directory):
    files = [*directory.glob("*.png"), directory / "report.html"]
    drawn = {path: path.read_bytes() for path in files}
    for path in drawn:
        path.unlink()
    main(["plot", str(directory)])
    assert {path: path.read_bytes() for path in files} == drawn


def the_cliff_is_passed_with_a_clip_only(rows):
    none, clipped = rows
    assert none["arm"] == "none"
    assert none["reached"] <= 0.7
    assert clipped["reached"] >= 0.95


def limits_follow_as_they_do(rows):
    follows = [None, None, 27, None, 89, 4, 42, 7]
    assert [None if math.isnan(row["follows"]) else row["follows"] for row in rows] == (
        follows
    )
    left = [1.64, 3.04, 1.42, 0.97, 0.78, 1.34, 1.55, 0.90]
    assert [row["spike_kept"] for row in rows] == pytest.approx(left, abs=0.01)
    assert [row["state"] for row in rows] == [0, 2, 2, 3, 201, 257, 201, 1]


def a_high_rate_works_with_a_clip_only(rows):
    accuracy = {
        arm: [1 - row["final_error"] for row in runs]
        for (arm,), runs in outcomes.by(rows, "arm").items()
    }
    assert max(accuracy["none"]) < 0.4
    assert min(accuracy["clip_by_global_norm:0.1"]) > 0.8


def many_devices_give_what_one_does(rows):
    alone, spread = rows
    assert (alone["mesh"], spread["mesh"]) == ("1x1", "4x2")
    assert alone["share"] == 1
    assert 0.5 <= spread["share"] < 0.75
    assert 0 < spread["difference"] < 1e-3 * alone["moved"]
    for same in ("first_grad_norm", "test_loss", "test_accuracy"):
        assert spread[same] == pytest.approx(alone[same], rel=1e-3)


def order_is_learned_with_a_clip_only(rows):
    solved = {
        arm: sum(row["solved"] for row in runs)
        for (arm,), runs in outcomes.by(rows, "arm").items()
    }
    assert solved["clip_by_global_norm:1.0"] - solved["none"] >= 4


FINDINGS = {
    "cliff": the_cliff_is_passed_with_a_clip_only,
    "limits": limits_follow_as_they_do,
    "lr_window": a_high_rate_works_with_a_clip_only,
    "data_parallel": many_devices_give_what_one_does,
    "temporal_order": order_is_learned_with_a_clip_only,
}


def test_a_run_that_was_stopped_is_resumed_bit_for_bit(tmp_path, monkeypatch, capsys):
    name, whole, stopped = "temporal_order", tmp_path / "whole", tmp_path / "stopped"
    options = (
        "--length 12 --updates 30 --checks 3 --seeds 3 --lr 0.1 0.3 --control 0.1 "
        "--control-length 12"
    )
    start(name, whole, options)
    pieces = iter([False, False, False, False, True])
    advance = Journal.advance

    def stop_once(journal, updates, best=""):
        advance(journal, updates, best)
        if next(pieces, False):
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_is_due", lambda journal: True)
        patch.setattr(Journal, "advance", stop_once)
        with pytest.raises(SystemExit) as ended:
            start(name, stopped, options)
    assert ended.value.code == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(f"python -m experiments resume {stopped} --devices 8")
    main(["resume", str(stopped)])
    expected, resumed = results.load(whole), results.load(stopped)
    assert len(expected.rows) == 15
    np.testing.assert_equal(resumed.curves, expected.curves)
    for row in (*expected.rows, *resumed.rows):
        row["seconds"] = None
    np.testing.assert_equal(resumed.rows, expected.rows)


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
    with ThreadPoolExecutor(8) as many:
        names = many.map(lambda _: str(results.create(None, "demo")), range(20))
    assert sorted(names) == sorted(f"runs/demo-{1 + i}" for i in range(20))
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
