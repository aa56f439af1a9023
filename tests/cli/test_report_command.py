"""`lowrank fl report`."""

import json
import subprocess
import sys

import pytest
from made_runs import write_run

IMPORTED = """
import json, sys
from lowrank_cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with a run of the paper's, one that was killed, and the current folder beside it."""
    monkeypatch.chdir(tmp_path)
    sizes = {"params": (1_546_000, 1_546_000, 15_245_000), "client_bytes": 12_368_000}
    write_run(tmp_path / "runs" / "a", "cifar10-iid", accuracies=(*[0.1] * 199, 0.8288), **sizes)
    killed = {"seed": 1, "whole": False, "interrupted": True}
    write_run(tmp_path / "runs" / "b", "cifar10-iid", accuracies=(0.1, 0.2), **killed, **sizes)
    return tmp_path / "runs"


def lines_of(outcome):
    return [" ".join(line.split()) for line in outcome.out.splitlines()]


@pytest.mark.slow
def test_the_tables_hold_paper_ours_and_every_run(lowrank, runs):
    outcome = lowrank("fl", "report", str(runs))
    assert outcome.code == 0
    lines = lines_of(outcome)
    assert "Tables 2, 3 and 9 cifar10-iid fedpara accuracy, % 82.88 82.88 1 pass" in lines
    assert "Table 5 cifar10-iid fedpara parameters, M 1.55 1.55 1 pass" in lines
    assert any(line.startswith("fedpara 1 200 82.88 1,546,000 10.1 39,600 39,600 200 ") for line in lines)
    assert any(
        line.startswith("fedpara (unfinished: 2 of 200 rounds) 1 2 20.00 - - 396 never never ") for line in lines
    )
    assert "report: report.html" in lines
    assert (runs.parent / "report.html").exists()


@pytest.mark.slow
def test_json_has_a_row_for_every_number_and_every_group(lowrank, runs):
    outcome = lowrank("fl", "report", str(runs), "--json", "--mbps", "5")
    tree = json.loads(outcome.out)
    rows = tree["rows"]
    (passed,) = [row for row in rows if row["quantity"] == "accuracy, %" and row["status"] == "pass"]
    assert passed == {
        "source": "Tables 2, 3 and 9",
        "setting": "cifar10-iid",
        "run": "fedpara",
        "quantity": "accuracy, %",
        "paper": 82.88,
        "ours": pytest.approx(82.88),
        "interval": None,
        "seeds": [0],
        "status": "pass",
        "differs": [],
        "run_dirs": [str(runs / "a")],
    }
    assert {row["status"] for row in rows} == {"pass", "fail", "partial", "not run"}
    whole, killed = tree["groups"]
    assert (whole["finished"], killed["finished"]) == (True, False)
    assert (whole["accuracy"], killed["params"]) == ({"mean": pytest.approx(0.8288), "interval": None}, None)
    assert whole["seconds_at_mbps"] == {"5": pytest.approx(10 / 16 + 8 * 12_368_000 / (5 * 2**20))}
    assert tree["report"] == "report.html"


@pytest.mark.slow
def test_quiet_prints_the_tables_alone(lowrank, runs):
    outcome = lowrank("fl", "report", str(runs), "--quiet")
    assert "report: " not in outcome.out
    assert "accuracy, %" in outcome.out


@pytest.mark.slow
def test_a_run_without_a_round_is_said_to_be_left_out(lowrank, runs):
    (runs / "b" / "metrics.jsonl").write_text("")
    outcome = lowrank("fl", "report", str(runs))
    assert outcome.err == f"{runs / 'b'} has not finished a round and is left out\n"


@pytest.mark.slow
def test_a_run_that_repeats_another_is_said_to_be_left_out(lowrank, runs):
    write_run(runs / "c", "cifar10-iid", accuracies=(0.1, 0.2), whole=False, interrupted=True)
    outcome = lowrank("fl", "report", str(runs))
    assert outcome.err == f"{runs / 'c'} is left out: {runs / 'a'} has the same configuration and seed 0\n"
    assert lowrank("fl", "report", str(runs), "--quiet").err == ""


@pytest.mark.slow
def test_a_page_of_ours_is_replaced_and_no_other(lowrank, runs):
    assert lowrank("fl", "report", str(runs), "--out", "page.html").code == 0
    assert lowrank("fl", "report", str(runs), "--out", "page.html").code == 0
    (runs.parent / "page.html").write_text("mine")
    outcome = lowrank("fl", "report", str(runs), "--out", "page.html")
    assert outcome.code == 1
    assert "page.html exists and lowrank fl report did not write it" in outcome.err
    assert (runs.parent / "page.html").read_text() == "mine"


@pytest.mark.parametrize("rates", ["fast", "2,,5", "0", "-1", "inf", "nan", ""])
def test_rates_that_are_none_are_refused(lowrank, runs, rates):
    outcome = lowrank("fl", "report", str(runs), "--mbps", rates)
    assert outcome.code == 2
    assert f"--mbps takes numbers above 0 such as 2,10,50, got {rates!r}" in outcome.err


def test_a_folder_that_is_not_there_is_named(lowrank, tmp_path):
    outcome = lowrank("fl", "report", str(tmp_path / "none"))
    assert outcome.code == 1
    assert "there is no folder" in outcome.err


@pytest.mark.slow
def test_reporting_imports_no_framework(runs):
    arguments = [sys.executable, "-c", IMPORTED, "fl", "report", str(runs)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0
    assert not {"torch", "flwr", "scipy", "sklearn", "datasets"} & set(json.loads(done.stderr))


def test_without_a_folder_the_usage_is_said(lowrank):
    outcome = lowrank("fl", "report")
    assert outcome.code == 2
    assert "name the folder of a run or of a sweep, or one that holds such: lowrank fl report RUN..." in outcome.err
