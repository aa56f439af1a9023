"""Finding runs in folders, whole or not."""

import json

import pytest
from made_runs import write_run

from lowrank_core import LowrankError
from lowrank_fl.folder import read_rows
from lowrank_fl.reporting.read import find_runs


def names(found):
    return [run.path.name for run in found.runs]


def test_a_run_a_sweep_and_a_folder_of_sweeps_are_searched(tmp_path):
    write_run(tmp_path / "sweep" / "b")
    write_run(tmp_path / "sweep" / "a")
    (tmp_path / "sweep" / "config.yaml").write_text("sweep: {}\n")
    write_run(tmp_path / "single")
    assert names(find_runs([tmp_path / "single"])) == ["single"]
    assert names(find_runs([tmp_path / "sweep"])) == ["a", "b"]
    assert names(find_runs([tmp_path])) == ["single", "a", "b"]


def test_a_run_that_is_named_twice_is_there_once(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    assert names(find_runs([tmp_path / "b", tmp_path, tmp_path / "a"])) == ["b", "a"]


def test_a_run_says_whether_it_trained_all_its_rounds(tmp_path):
    write_run(tmp_path / "done", accuracies=(0.5, 0.6))
    write_run(tmp_path / "killed", "mnist", "rounds=3", accuracies=(0.5, 0.6), whole=False, interrupted=True)
    done, killed = find_runs([tmp_path]).runs
    assert (done.finished, killed.finished) == (True, False)
    assert done.summary is not None
    assert killed.summary is None


def test_a_run_without_a_finished_round_is_told_apart(tmp_path):
    write_run(tmp_path / "a")
    (write_run(tmp_path / "b") / "metrics.jsonl").write_text("")
    found = find_runs([tmp_path])
    assert names(found) == ["a"]
    assert found.empty == [tmp_path / "b"]


def test_a_half_written_last_round_is_left_out(tmp_path):
    metrics = write_run(tmp_path / "a", accuracies=(0.5, 0.6, 0.7)) / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert [row.accuracy for row in read_rows(tmp_path / "a")] == [0.5, 0.6]


def test_keys_of_other_versions_are_passed_over(tmp_path):
    folder = write_run(tmp_path / "a", accuracies=(0.5,))
    tree = json.loads((folder / "metrics.jsonl").read_text())
    del tree["worst_accuracy"], tree["dropped"]
    (folder / "metrics.jsonl").write_text(json.dumps(tree | {"new": 1}) + "\n")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"new": 1}))
    (run,) = find_runs([folder]).runs
    assert run.rows[0].worst_accuracy is None


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", "{}\n{}\n", r"metrics\.jsonl is damaged at line 1: it is not a round's numbers as JSON"),
        ("metrics.jsonl", "torn\n{}\n", r"metrics\.jsonl is damaged at line 1"),
        ("summary.json", "{", r"summary\.json is damaged: it is not a run's summary as JSON"),
        ("config.yaml", "rounds: none\n", r"config\.yaml is not a run's configuration: rounds: input should be"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text, message):
    (write_run(tmp_path / "a") / file).write_text(text)
    with pytest.raises(LowrankError, match=message):
        find_runs([tmp_path])


def test_folders_that_hold_nothing_to_report_on_are_named(tmp_path):
    with pytest.raises(LowrankError, match=r"there is no folder .*/none; give the folder of a run or of a sweep"):
        find_runs([tmp_path / "none"])
    with pytest.raises(LowrankError, match=r"holds no run: there is no config\.yaml with a metrics\.jsonl beside it"):
        find_runs([tmp_path])
    (write_run(tmp_path / "a") / "metrics.jsonl").write_text("")
    with pytest.raises(LowrankError, match=r"no run in .* has finished a round yet; report on it later"):
        find_runs([tmp_path])
