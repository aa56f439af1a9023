"""`lowrank fl run`, with runs that train nothing, and one that does."""

import json
from pathlib import Path

import pytest

from lowrank_fl.results import RunStart

SINGLE = ("fl", "run", "-o", "model.method=fedpara")


def test_a_run_ends_with_a_table_and_where_its_files_lie(lowrank, fake_run, tmp_path):
    outcome = lowrank(*SINGLE, "--out", str(tmp_path / "run"))
    assert outcome.code == 0
    header, values = outcome.out.splitlines()[1], outcome.out.splitlines()[3]
    assert header.split() == ["run", "params", "original", "accuracy", "loss", "up", "down", "total", "s"]
    assert values.split() == ["fedpara", "100", "10.0%", "95.00%", "0.125", "1.00", "2.00", "3.00", "4.0"]
    assert outcome.out.splitlines()[-1] == f"files: {tmp_path / 'run'}, report: {tmp_path / 'run' / 'report.html'}"


def test_a_report_that_was_not_written_is_not_promised(lowrank, monkeypatch, summary):
    made = [summary("runs/made")]
    monkeypatch.setattr("lowrank_fl.run.run", lambda *_: made)
    assert lowrank(*SINGLE).out.splitlines()[-1] == "files: runs/made"


def test_a_sweep_says_the_bytes_to_the_originals_accuracy_minus_two_points(lowrank, fake_run, tmp_path):
    outcome = lowrank("fl", "run", "--quiet", "--out", str(tmp_path / "sweep"))
    lines = [line.split() for line in outcome.out.splitlines()[4:]]
    # Both rounds of 10 MB, and of 1 MB, are needed for 95 %.
    assert [(line[0], line[-2]) for line in lines] == [("original", "20.0"), ("lowrank", "2.00"), ("fedpara", "2.00")]


def test_params_in_the_millions_have_two_decimals(lowrank, monkeypatch, summary):
    made = [summary(params=15_250_250, original_params=15_250_250)]
    monkeypatch.setattr("lowrank_fl.run.run", lambda *_: made)
    assert "15.25M" in lowrank(*SINGLE).out


def test_where_clients_test_the_table_and_the_line_say_so_with_the_worst_tenth(lowrank, monkeypatch, summary):
    made = summary(worst_accuracy=0.5, client_accuracies=[0.5, 1.0], evaluation_bytes=1000)

    def run(config, out, observer):
        observer.run_started(RunStart("made", 0, 1, "fedpara", 2, 100, 1000, {}))
        observer.run_ended(made)
        return [made]

    monkeypatch.setattr("lowrank_fl.run.run", run)
    outcome = lowrank(*SINGLE)
    assert "made: fedpara: mean accuracy over clients 95.00% (worst tenth 50.00%) after 2 rounds" in outcome.err
    above, header, _, values = outcome.out.splitlines()[:4]
    assert above.split() == ["of", "clients'", "worst", "MB", "MB", "MB"]
    assert header.split() == ["run", "params", "original", "accuracy", "tenth", "loss", "up", "down", "total", "s"]
    assert values.split()[:6] == ["fedpara", "100", "10.0%", "95.00%", "50.00%", "0.125"]
    assert json.loads(lowrank(*SINGLE, "--json").out)["client_accuracies"] == [0.5, 1.0]


def test_quiet_leaves_the_table_alone(lowrank, fake_run, tmp_path):
    outcome = lowrank(*SINGLE, "--quiet", "--out", str(tmp_path / "run"))
    assert outcome.err == ""
    assert "files:" not in outcome.out


def test_where_stderr_is_a_file_each_run_has_a_line_and_each_note_is_said_once(lowrank, fake_run):
    assert lowrank("fl", "run").err.splitlines() == [
        "head stays as it is: excluded",
        "run 1/3 quickstart: original: accuracy 95.00% after 2 rounds, 3.00 MB in 4.0 s",
        "run 2/3 quickstart: lowrank: accuracy 95.00% after 2 rounds, 3.00 MB in 4.0 s",
        "run 3/3 quickstart: fedpara: accuracy 95.00% after 2 rounds, 3.00 MB in 4.0 s",
    ]


def test_json_of_a_run_is_its_summary(lowrank, fake_run):
    tree = json.loads(lowrank(*SINGLE, "--json").out)
    assert tree["run_dir"] == str(Path("runs/made"))
    keys = "run_dir method rounds accuracy loss params transferred_params original_params uplink_bytes downlink_bytes"
    assert {*keys.split(), "total_bytes", "seconds"} <= tree.keys()


def test_json_of_a_sweep_holds_every_run_and_the_folder(lowrank, fake_run, tmp_path):
    tree = json.loads(lowrank("fl", "run", "--json", "--out", str(tmp_path / "sweep")).out)
    assert [run["method"] for run in tree["runs"]] == ["original", "lowrank", "fedpara"]
    assert tree["runs"][1]["swept"] == {"model.method": "lowrank"}
    assert tree["out"] == str(tmp_path / "sweep")


def test_json_of_a_sweep_over_one_value_is_still_a_sweeps(lowrank, fake_run):
    tree = json.loads(lowrank(*SINGLE, "--json", "--sweep", "model.gamma=0.3").out)
    assert [run["swept"] for run in tree["runs"]] == [{"model.gamma": 0.3}]


def test_flags_reach_the_run(lowrank, fake_run, tmp_path):
    lowrank(*SINGLE, "-o", "rounds=7", "--seed", "5", "--engine", "local", "--out", str(tmp_path / "run"))
    config = fake_run["config"]
    assert (config.rounds, config.seed, config.engine.kind, config.sweep) == (7, 5, "local", {})
    assert fake_run["out"] == tmp_path / "run"


@pytest.mark.parametrize("as_json", [False, True])
def test_after_ctrl_c_the_finished_rounds_are_shown_and_the_code_is_130(lowrank, monkeypatch, summary, as_json):
    from lowrank_fl.run import Interrupted

    def run(*_):
        raise Interrupted(Path("runs/made"), [summary(interrupted=True)])

    monkeypatch.setattr("lowrank_fl.run.run", run)
    outcome = lowrank(*SINGLE, *["--json"] * as_json)
    assert outcome.code == 130
    assert outcome.err == "error: interrupted after 2 finished rounds, which are kept in runs/made\n"
    if as_json:
        assert json.loads(outcome.out)["interrupted"] is True
    else:
        assert "fedpara (interrupted, 2 rounds)" in outcome.out


def test_after_ctrl_c_in_the_first_round_nothing_is_shown(lowrank, monkeypatch):
    from lowrank_fl.run import Interrupted

    def run(*_):
        raise Interrupted(Path("runs/made"), [])

    monkeypatch.setattr("lowrank_fl.run.run", run)
    outcome = lowrank(*SINGLE)
    assert (outcome.code, outcome.out) == (130, "")


def test_a_folder_that_holds_files_is_left_alone(lowrank, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    outcome = lowrank(*SINGLE, "--out", str(tmp_path))
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == f"error: {tmp_path} already holds files; choose another folder with --out, or remove it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.slow
def test_a_real_run_prints_what_its_folder_says(lowrank, tmp_path):
    small = ["federation.clients=2", "federation.clients_per_round=2", "data.max_examples=64", "engine.workers=1"]
    options = [part for key in [*small, "rounds=2", "federation.epochs=1", "model.width=4"] for part in ("-o", key)]
    outcome = lowrank(*SINGLE, *options, "--json", "--out", str(tmp_path / "run"))
    assert outcome.code == 0
    assert json.loads(outcome.out) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (tmp_path / "run" / "report.html").exists()


def test_a_resumed_run_takes_overrides(lowrank, monkeypatch, summary, tmp_path):
    asked = []

    def resume(folder, observer, overrides):
        asked.append((folder, overrides))
        return [summary()]

    monkeypatch.setattr("lowrank_fl.run.resume", resume)
    assert lowrank("fl", "run", "--resume", str(tmp_path), "-o", "rounds=9").code == 0
    assert asked == [(tmp_path, ["rounds=9"])]
    refused = lowrank("fl", "run", "mnist", "--resume", str(tmp_path))
    assert refused.err == (
        "error: --resume takes everything from its folder; leave all but -o, --json and --quiet out\n"
    )
