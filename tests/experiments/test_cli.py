import numpy as np
import pytest

from experiments import cli
from experiments.cli import main
from experiments.studies import STUDIES


def run_rows(*options):
    return ["run", "rnn_rows", *options]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {list, run, plot, demo}."),
        (["resum"], "Unrecognized options: resum"),
        (
            ["run"],
            "Expected one of {rnn_rows, lstm_rows, cliff, limits, data_parallel}.",
        ),
        (
            ["run", "nothing"],
            "Available subcommands: rnn_rows, lstm_rows, cliff, limits, data_parallel",
        ),
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
        (run_rows("--clip", "zclip:-1"), "z must be > 0"),
        (run_rows("--clip", "autoclip:10,window=0"), "window must be >= 1"),
        (run_rows("--clip", "mean_clip"), "missing a required argument: 'ratio'"),
        (["run", "cliff", "--starts", "1"], "starts must be >= 2, got starts=1."),
        (["run", "limits", "--updates", "99"], "updates must be >= 100"),
        (["run", "limits", "--seed", "-1"], "seed must be in [0, 2**31), got seed=-1."),
        (["run", "limits", "--clip", "zclip", "zclip"], "different values"),
        (["run", "limits", "--lr", "1"], "--lr"),
        (["run", "limits", "--devices", "0"], ": devices must be >= 1, got devices=0."),
        (["demo", "--devices", "-1"], ": devices must be >= 1, got devices=-1."),
        (["demo", "--devices", "many"], "--devices"),
        (["demo", "--processes", "0"], "processes must be >= 1, got processes=0."),
        (["demo", "--coordinator", "here"], "HOST:PORT, got coordinator=here."),
        (
            ["demo", "--processes", "2", "--process-id", "2"],
            "less than processes, got process_id=2, processes=2.",
        ),
        (["demo", "--process-id", "-1"], "process_id must be >= 0"),
        (["demo", "--processes", "2", "--process-id", "1"], "pass --coordinator,"),
        (["demo", "--coordinator", "127.0.0.1:80"], "--process-id, got"),
        (["list", "--devices", "2"], "misplaced options: --devices"),
        (["plot"], "directory"),
        (["plot", "nowhere"], "nowhere holds no run: there is no config.json."),
        (["plot", "unfinished"], "results.jsonl is missing"),
        (["plot", "broken"], "broken cannot be read"),
        (
            ["plot", "foreign"],
            "foreign holds no run of rnn_rows, lstm_rows, cliff, limits, data_par",
        ),
        (["run", "cliff", "--out", "unfinished"], "unfinished is not empty."),
        (["run", "cliff", "--out", "file"], "file is not a directory."),
        (["run", "cliff", "--out", "file/below"], "file/below: Not a directory."),
        (["demo", "--out", "unfinished"], "unfinished is not empty."),
    ],
)
def test_what_cannot_be_done_ends_with_one_line_and_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("unfinished", "broken", "foreign"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("broken", "foreign"):
        (tmp_path / name / "results.jsonl").write_text("")
    (tmp_path / "broken" / "curves.npz").write_text("")
    np.savez(tmp_path / "foreign" / "curves.npz")
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
    for tier, rates in {
        "smoke": "(default: 1.0)",
        "standard": "0.1 0.3 1.0 3.0",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["run", "rnn_rows", "--tier", tier, "--help"])
        assert stopped.value.code == 0
        assert rates in capsys.readouterr().out


@pytest.fixture
def configs(monkeypatch):
    """Collects what would run, and where."""
    found = []
    monkeypatch.setattr(cli, "run", lambda *arguments: found.append(arguments[:2]))
    return found


def test_options_change_single_fields_of_the_tier(configs, tmp_path):
    main(run_rows("--tier", "standard", "--lr", "0.5", "2", "--out", str(tmp_path)))
    ((config, directory),) = configs
    standard = STUDIES["rnn_rows"].tiers["standard"]
    assert config.lr == (0.5, 2.0)
    assert (config.clip, config.seeds) == (standard.clip, standard.seeds)
    assert directory == tmp_path


def test_demo_runs_every_experiment_in_a_directory_of_its_own(configs, tmp_path):
    main(["demo", "--out", str(tmp_path / "all")])
    assert [path for _, path in configs] == [tmp_path / "all" / n for n in STUDIES]
    assert [config for config, _ in configs] == [
        study.tiers["smoke"] for study in STUDIES.values()
    ]
