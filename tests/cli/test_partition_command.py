"""`lowrank fl partition`."""

import json

import numpy as np
import pytest
from PIL import Image

from lowrank_cli.counts import _print_table

FEW = ("fl", "partition", "-o", "federation.clients=3", "-o", "federation.clients_per_round=3")


def test_counts_are_those_that_a_run_trains_on(lowrank, monkeypatch, tmp_path):
    import lowrank_fl.clients

    seen = []

    def partition_examples(*arguments):
        seen.extend(original(*arguments))
        raise KeyboardInterrupt

    original = lowrank_fl.clients.partition_examples
    with monkeypatch.context() as patched:
        patched.setattr(lowrank_fl.clients, "partition_examples", partition_examples)
        settings = ["-o", "model.method=fedpara", "-o", "engine.workers=1"]
        lowrank("fl", "run", *FEW[2:], *settings, "--out", str(tmp_path))
    counts = json.loads(lowrank(*FEW, "--json").out)["clients"]
    assert [sum(row) for row in counts] == [len(rows) for rows in seen]


def test_json_counts_every_example_once(lowrank):
    tree = json.loads(lowrank(*FEW, "--json").out)
    assert tree["classes"] == list("0123456789")
    assert np.array(tree["clients"]).shape == (3, 10)
    assert np.sum(tree["clients"]) == 1442


def test_the_table_has_a_row_a_client_and_totals(lowrank):
    lines = lowrank(*FEW).out.splitlines()
    assert lines[0].split() == ["client", "examples", *"0123456789"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert lines[-3].split()[:2] == ["all", "1,442"]
    assert lines[-1].startswith("1,442 examples among 3 clients: ")


def test_many_clients_are_cut_short(capsys):
    _print_table([[1, 2]] * 100, ["a", "b"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert lines[-3].split() == ["all", "300", "100", "200"]
    assert lines[-1] == "300 examples among 100 clients: 3 to 3 examples and 2 to 2 of 2 classes each"


def test_many_classes_leave_the_largest_of_each_client(capsys):
    _print_table([list(range(62)), [5] + [0] * 61], [f"class {number}" for number in range(62)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == "0 1,891 61 class 61 61, class 60 60, class 59 59, class 58 58, class 57 57, ..."
    assert lines[3] == "1 5 1 class 0 5"


@pytest.mark.slow
def test_the_picture_is_written_where_asked(lowrank, tmp_path):
    outcome = lowrank(*FEW, "--plot", str(tmp_path / "counts.png"))
    assert outcome.out.splitlines()[-1] == f"picture: {tmp_path / 'counts.png'}"
    with Image.open(tmp_path / "counts.png") as picture:
        assert picture.format == "PNG"


def test_of_a_swept_key_the_first_value_is_counted_and_that_is_said(lowrank, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("sweep: {federation.clients: [20, 21], model.method: [original, fedpara]}")
    outcome = lowrank("fl", "partition", str(file), "--json")
    assert len(json.loads(outcome.out)["clients"]) == 20
    assert outcome.err == "federation.clients is swept; these are the counts for its first value, 20\n"
    assert lowrank("fl", "partition", str(file), "--json", "--quiet").err == ""


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("counts.txt", 2, "--plot writes .png, .svg, .pdf, got 'counts.txt'; give the file one of these endings"),
        ("no/counts.png", 1, "--plot cannot write to {path}: there is no folder {path.parent}; make it first"),
    ],
)
def test_a_picture_that_cannot_be_written_is_said_at_once(lowrank, tmp_path, name, code, sentence):
    path = tmp_path / name
    outcome = lowrank(*FEW, "--plot", str(path))
    assert (outcome.code, outcome.out, outcome.err) == (code, "", f"error: {sentence.format(path=path)}\n")
