"""The page about runs, and what is worked out for it."""

import base64
import dataclasses
import json
import re

import pytest

from lowrank_fl.folder import read_rows
from lowrank_fl.reporting.run_page import bytes_to_originals, write_report
from lowrank_fl.reporting.text import label_of, three_digits
from lowrank_fl.results import RoundRow, RunSummary

ROW = RoundRow(1, 0.5, 1.0, 1.1, 400_000, 600_000, 1_000_000, 2.0, [0, 1])


@pytest.fixture
def make_run(tmp_path):
    """`make_run("fedpara", [0.5, 0.9], seed=1)` writes a run's folder; each round sent a megabyte."""

    def make_run(method, accuracies=(0.5, 0.9), *, name="made", config="rounds: 2\n", **swept):
        folder = tmp_path / "-".join([method, *map(str, swept.values())])
        folder.mkdir()
        rows = [dataclasses.replace(ROW, round=number, accuracy=value) for number, value in enumerate(accuracies, 1)]
        lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))
        (folder / "config.yaml").write_text(config)
        return RunSummary(
            name=name,
            run_dir=str(folder),
            method=method,
            seed=0,
            rounds=len(rows),
            accuracy=accuracies[-1],
            loss=0.125,
            params=100,
            transferred_params=100,
            original_params=1000,
            uplink_bytes=400_000 * len(rows),
            downlink_bytes=600_000 * len(rows),
            total_bytes=1_000_000 * len(rows),
            seconds=4.0,
            swept={"model.method": method, **swept},
        )

    return make_run


def test_rows_are_read_as_they_were_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(dataclasses.asdict(ROW)) + "\n")
    assert read_rows(tmp_path) == [ROW]


def test_a_folder_without_a_finished_round_has_no_rows(tmp_path):
    assert read_rows(tmp_path) == []


def test_runs_are_compared_with_the_original_minus_two_points(make_run):
    original = make_run("original", [0.5, 0.889, 0.9])
    fedpara = make_run("fedpara", [0.2, 0.879, 0.88, 0.95])
    lowrank = make_run("lowrank", [0.5, 0.6])
    assert bytes_to_originals([original, fedpara, lowrank]) == [2_000_000, 3_000_000, None]


def test_each_seed_is_compared_with_the_original_of_that_seed(make_run):
    runs = [make_run("original", [0.5], seed=0), make_run("original", [0.9], seed=1)]
    runs += [make_run("fedpara", [0.5, 0.9], seed=0), make_run("fedpara", [0.5, 0.9], seed=1)]
    assert bytes_to_originals(runs) == [1_000_000, 1_000_000, 1_000_000, 2_000_000]


def test_a_seed_whose_original_was_not_run_reaches_nothing(make_run):
    assert bytes_to_originals([make_run("original", seed=0), make_run("fedpara", seed=1)]) == [2_000_000, None]


@pytest.mark.parametrize("method", ["original", "fedpara"])
def test_runs_that_are_all_originals_or_none_are_not_compared(make_run, method):
    assert bytes_to_originals([make_run(method, seed=0), make_run(method, seed=1)]) is None


@pytest.mark.parametrize(
    ("swept", "label"),
    [
        ({}, "fedpara"),
        ({"model.method": "fedpara"}, "fedpara"),
        ({"model.method": "fedpara", "model.gamma": 0.1, "seed": 2}, "fedpara, gamma 0.1, seed 2"),
    ],
)
def test_a_run_goes_by_its_method_and_what_else_is_swept(swept, label):
    assert label_of("fedpara", swept) == label


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.03412, "0.0341"),
        (0.9996, "1.00"),
        (7.2, "7.20"),
        (99.96, "100"),
        (118.4, "118"),
        (48_310, "48,300"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert three_digits(value) == text


@pytest.mark.slow
def test_the_page_needs_nothing_beside_it(make_run, tmp_path):
    write_report(tmp_path, [make_run("original"), make_run("fedpara")])
    page = (tmp_path / "report.html").read_text()
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(picture) == (tmp_path / "accuracy_vs_bytes.png").read_bytes()
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|@import|<script", page)


@pytest.mark.slow
def test_the_page_holds_the_table_and_every_configuration(make_run, tmp_path):
    write_report(tmp_path, [make_run("original"), make_run("fedpara", [0.5, 0.6], config="rounds: 17\n")])
    page = (tmp_path / "report.html").read_text()
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)[1:]]
    first = ["original", "2", "100", "10.0%", "90.00%", "0.125", "0.800", "1.20", "2.00", "2.00", "4.0"]
    assert rows[0] == first
    assert rows[1][-2] == "not reached"
    assert re.findall(r"<pre>rounds: (\d+)", page) == ["2", "17"]


@pytest.mark.slow
def test_the_page_of_one_run_compares_nothing(make_run, tmp_path):
    write_report(tmp_path, [dataclasses.replace(make_run("fedpara"), swept={}, interrupted=True)])
    page = (tmp_path / "report.html").read_text()
    assert "MB to original" not in page
    assert "fedpara (interrupted)" in page


def test_names_and_values_cannot_break_the_page(make_run, tmp_path):
    write_report(tmp_path, [make_run("fedpara", name="<b>&", config="path: </pre><script>\n", note="<i>")])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<h1>&lt;b&gt;&amp;</h1>" in page
    assert "&lt;i&gt;" in page
