import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import cli, results
from experiments.cli import main
from experiments.studies import STUDIES

NAMES = ", ".join(STUDIES)


def run_rows(*options):
    return ["run", "image_rows", *options]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {list, run, resume, plot, suite}."),
        (["resum"], "Unrecognized options: resum"),
        (["run"], f"Expected one of {{{NAMES}}}."),
        (["run", "nothing"], f"Available subcommands: {NAMES}"),
        (run_rows("--bogus", "3"), "Unrecognized options: --bogus"),
        (["run", "cliff", "--seeds", "3"], "--seeds"),
        (run_rows("--tier", "huge"), "invalid choice 'huge'"),
        (run_rows("--seeds", "few"), "--seeds"),
        (run_rows("--seeds", "0"), "seeds must be >= 1, got seeds=0."),
        (run_rows("--updates", "-1"), "updates must be >= 1, got updates=-1."),
        (run_rows("--seed", "-1"), "seed must be in [0, 2**31), got seed=-1."),
        (run_rows("--lr", "0"), "lr must be finite and > 0, got lr=0.0."),
        (run_rows("--lr", "nan"), "lr must be finite and > 0, got lr=nan."),
        (run_rows("--lr", "inf"), "lr must be finite and > 0, got lr=inf."),
        (run_rows("--lr"), "lr must be one or more different values"),
        (run_rows("--lr", "1", "1"), "lr must be one or more different values"),
        (
            run_rows("--clip", "clp:1"),
            "clip 'clp:1' is not known: pass none or one of adaclip,",
        ),
        (run_rows("--clip", "clip:-1"), "clip 'clip:-1' is not possible"),
        (
            run_rows("--clip", "clip:1", "clip:1.0"),
            "clip must be one or more different",
        ),
        (run_rows("--clip", "zclip:-1"), "z must be > 0"),
        (run_rows("--clip", "autoclip:10,window=0"), "window must be >= 1"),
        (run_rows("--clip", "mean_clip"), "missing a required argument: 'ratio'"),
        (["run", "cliff", "--starts", "1"], "starts must be >= 2, got starts=1."),
        (["run", "limits", "--updates", "99"], "updates must be >= 100"),
        (["run", "limits", "--seed", "-1"], "seed must be in [0, 2**31), got seed=-1."),
        (["run", "limits", "--clip", "zclip", "zclip"], "different values"),
        (["run", "limits", "--lr", "1"], "--lr"),
        (["run", "limits", "--devices", "0"], ": devices must be >= 1, got devices=0."),
        (["suite", "--devices", "-1"], ": devices must be >= 1, got devices=-1."),
        (["suite", "--devices", "many"], "--devices"),
        (["suite", "--processes", "0"], "processes must be >= 1, got processes=0."),
        (["suite", "--coordinator", "here"], "HOST:PORT, got coordinator=here."),
        (
            ["suite", "--processes", "2", "--process-id", "2"],
            "less than processes, got process_id=2, processes=2.",
        ),
        (["suite", "--process-id", "-1"], "process_id must be >= 0"),
        (["suite", "--processes", "2", "--process-id", "1"], "pass --coordinator,"),
        (["suite", "--coordinator", "127.0.0.1:80"], "--process-id, got"),
        (["list", "--devices", "2"], "misplaced options: --devices"),
        (["plot"], "directory"),
        (["plot", "nowhere"], "nowhere holds no run: there is no config.json."),
        (["plot", "unfinished"], "no finished run is in unfinished: see resume."),
        (["plot", "broken"], "broken cannot be read"),
        (["plot", "foreign"], f"foreign holds no run of {NAMES}"),
        (["resume"], "directory"),
        (["resume", "nowhere"], "nowhere holds no run: there is no config.json."),
        (["resume", "empty"], "empty holds no run: there is no config.json."),
        (["resume", "corrupt"], "corrupt cannot be read: "),
        (["resume", "unfinished"], f"unfinished holds no run of {NAMES}"),
        (["resume", "other"], "the config of the run is not possible:"),
        (["resume", "older"], "config.json is not that of a run."),
        (["resume", "elsewhere"], "was begun with device 3 x abacus, and here it is 8"),
        (
            ["resume", "wider"],
            "here it is 8 x cpu. To go on, pass --devices 16. To run",
        ),
        (
            ["resume", "changed"],
            "was begun with data other data, and here it is starts",
        ),
        (["suite", "nothing"], f"names must be of {NAMES}, got names=nothing."),
        (["suite", "cliff", "cliff"], "names must be one or more different values"),
        (["run", "temporal_order", "--length", "9"], "length of torder must be >= 10"),
        (["run", "temporal_order", "--task", "chess"], "task must be of torder,"),
        (["run", "music", "--data", "file"], "file "),
        (["run", "char_lm", "--data", "nowhere"], "nowhere cannot be read: No such"),
        (["run", "image_rows", "--data", "empty"], "is missing, with and without .gz"),
        (["run", "cliff", "--out", "unfinished"], "unfinished is not empty."),
        (["run", "cliff", "--out", "file"], "file is not a directory."),
        (["run", "cliff", "--out", "file/below"], "file/below: Not a directory."),
        (["suite", "--out", "unfinished"], "unfinished is not empty."),
    ],
)
def test_what_cannot_be_done_ends_with_one_line_and_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    results.begin(tmp_path / "empty", STUDIES["cliff"].tiers["smoke"], {})
    whole = json.loads((tmp_path / "empty" / "config.json").read_text())
    (tmp_path / "empty" / "config.json").unlink()
    facts = STUDIES["cliff"].facts(STUDIES["cliff"].tiers["smoke"])
    whole |= json.loads(json.dumps(facts))
    abouts = {
        "unfinished": whole | {"config": {}},
        "broken": whole,
        "foreign": whole | {"config": {"experiment": ["cliff"]}},
        "older": {"config": whole["config"]},
        "other": whole | {"config": whole["config"] | {"size": 3}},
        "elsewhere": whole | {"device": "3 x abacus"},
        "wider": whole | {"device": "16 x cpu"},
        "changed": whole | {"data": "other data"},
    }
    for name, about in abouts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(about))
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "config.json").write_text("{")
    for name in ("broken", "foreign"):
        (tmp_path / name / "results.jsonl").write_text("")
    (tmp_path / "broken" / "curves.npz").write_text("")
    np.savez(tmp_path / "foreign" / "curves.npz")
    (tmp_path / "foreign" / "results.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.startswith("python -m experiments: ")
    assert message in err
    assert err.count("\n") == 1


def test_list_names_every_experiment(capsys):
    main(["list"])
    out = capsys.readouterr().out
    for name, study in STUDIES.items():
        assert name in out
        assert study.about in out


def test_help_of_an_experiment_shows_the_defaults_of_the_tier(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tiers = STUDIES["temporal_order"].tiers
    assert len({config.seeds for config in tiers.values()}) == len(tiers)
    for tier, config in tiers.items():
        with pytest.raises(SystemExit) as stopped:
            main(["run", "temporal_order", "--tier", tier, "--help"])
        assert stopped.value.code == 0
        assert f"(default: {config.seeds})" in capsys.readouterr().out


@pytest.fixture
def worked(monkeypatch):
    """Collects what would run, and where, and at the end of which command."""
    found = []
    monkeypatch.setattr(cli, "work", lambda *arguments: found.append(arguments))
    return found


def test_options_change_single_fields_of_the_tier(worked, tmp_path):
    main(run_rows("--tier", "standard", "--lr", "0.5", "2", "--out", str(tmp_path)))
    ((directory, config, *_),) = worked
    standard = STUDIES["image_rows"].tiers["standard"]
    assert config.lr == (0.5, 2.0)
    assert (config.clip, config.seeds) == (standard.clip, standard.seeds)
    assert directory == tmp_path


def test_every_experiment_has_all_tiers():
    for name, study in STUDIES.items():
        assert list(study.tiers) == ["smoke", "standard", "full"]
        assert {config.experiment for config in study.tiers.values()} == {name}


@pytest.mark.parametrize("names", [list(STUDIES), ["limits", "cliff"]])
def test_suite_runs_experiments_in_directories_of_their_own(worked, tmp_path, names):
    chosen = [] if names == list(STUDIES) else names
    main(["suite", *chosen, "--out", str(tmp_path / "all")])
    assert [path for path, *_ in worked] == [tmp_path / "all" / n for n in names]
    smoke = [STUDIES[name].tiers["smoke"] for name in names]
    assert [config for _, config, *_ in worked] == smoke
    # All of it is stored before the first begins, so that it can be resumed as a whole.
    worked.clear()
    main(["resume", str(tmp_path / "all")])
    assert {config.experiment: config for _, config, *_ in worked} == {
        config.experiment: config for config in smoke
    }


def test_resume_leaves_what_is_finished_alone(worked, tmp_path, capsys):
    main(["suite", "limits", "cliff", "--out", str(tmp_path)])
    for name in ("results.jsonl", "report.html"):
        (tmp_path / "cliff" / name).write_text("")
    worked.clear()
    main(["resume", str(tmp_path)])
    assert [path for path, *_ in worked] == [tmp_path / "limits"]
    assert "cliff is finished" in capsys.readouterr().out


def test_the_stored_command_repeats_the_run(worked, tmp_path):
    options = ["--lr", "0.5", "2.25", "--clip", "none", "autoclip:10,window=5"]
    main(run_rows(*options, "--check", "--out", str(tmp_path / "one")))
    about = json.loads((tmp_path / "one" / "config.json").read_text())
    words = about["command"].split()
    assert words[:3] == ["python", "-m", "experiments"]
    assert words[-2:] == ["--devices", str(jax.device_count())]
    words = words[:-2]  # Here jax has its devices already.
    main([*words[3:], "--out", str(tmp_path / "two")])
    (_, config, *_), (_, again, *_) = worked
    assert config == again
    assert config.clip == ("none", "autoclip:10,window=5")


ROOT = Path(__file__).parents[2]


def commands():
    """Returns the words of every command that README and docs tell the reader."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text().replace("\\\n", "")
        for line in re.findall(r"^    python -m experiments (.*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            yield page.name, [word for word in words if word != "&"]


def test_every_command_in_the_documentation_is_understood():
    told = list(commands())
    assert {page for page, _ in told} >= {"README.md", "results.md"}
    assert len(told) > 20
    for _, words in told:
        cli._read(words)
    with pytest.raises(SystemExit):
        cli._read(["run", "temporal_order", "--lenght", "30"])
