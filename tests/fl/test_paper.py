"""The paper's numbers, which runs they belong to, and when ours are as good."""

import json
from pathlib import Path

import pytest
import scipy.stats

from lowrank_fl.load import load_config
from lowrank_fl.models.build import _DEFAULT_GAMMA
from lowrank_fl.paper.judge import judge
from lowrank_fl.paper.match import DEFAULT_GAMMA, differences, essence
from lowrank_fl.paper.rows import QUANTITIES, PaperRow, paper_rows, paper_settings
from lowrank_fl.presets import presets
from lowrank_fl.reporting.interval import Interval, interval_of, student_t


def row(quantity="accuracy", value=82.88, unit=0.01, preset="cifar10-iid", **more):
    return PaperRow("Table 0", preset, quantity, value, unit, **more)


def essence_of(preset, *overrides):
    return essence(load_config(preset, list(overrides)))


def test_the_settings_are_the_references(shared_data: Path):
    tables = json.loads((shared_data.parent / "reference" / "fedpara_tables.json").read_text())
    assert paper_settings() == tables["settings"]


@pytest.mark.slow
def test_every_row_belongs_to_a_preset_a_quantity_and_keys_that_exist():
    assert len(paper_rows()) > 100
    for each in paper_rows():
        assert each.preset in presets()
        assert each.quantity in QUANTITIES
        assert differences(each, essence_of(each.preset, *(f"{k}={v}" for k, v in each.set.items()))) == []
        assert "{" not in each.what


def test_no_row_is_listed_twice():
    keys = [
        (r.preset, r.quantity, r.target, r.mbps, tuple(r.set.items()), tuple(r.other.items())) for r in paper_rows()
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("source", "preset", "changes", "quantity", "value"),
    [
        ("Table 2", "cifar100-noniid", {}, "accuracy", 43.94),
        ("Table 2", "shakespeare-iid", {"model.method": "lowrank"}, "accuracy", 54.59),
        ("Table 3", "cifar10-iid", {"strategy.name": "feddyn", "strategy.alpha": 0.1}, "rounds_to", 80),
        ("Figure 3", "cinic10-noniid", {"model.method": "original"}, "gigabytes_to", 378.0),
        ("Table 5", "cifar100-iid", {"model.gamma": 0.9}, "params", 12.96),
        ("Table 9", "cifar10-iid", {"model.gamma": 0.4, "rounds": 1000}, "accuracy", 84.59),
        ("Table 12", "cifar10-iid", {"model.gamma": 0.5, "codec.up": "fp16"}, "megabytes_a_round", 34.74),
        ("Figure 8b", "resnet18", {"model.gamma": 0.9}, "gigabytes_to", 144.4),
    ],
)
def test_the_papers_numbers_are_its_own(source, preset, changes, quantity, value):
    found = [r for r in paper_rows() if (r.source, r.preset, r.quantity) == (source, preset, quantity)]
    assert [r.value for r in found if r.set == changes] == [value]


def test_what_a_run_does_not_read_makes_no_difference():
    unread = [
        "seed=5",
        "device=cuda",
        "data.path=/some/where",
        "strategy.mu=0.7",
        "partition.alpha=9",
        "engine.workers=1",
    ]
    assert differences(row(), essence_of("cifar10-iid", *unread)) == []
    original = row(set={"model.method": "original"})
    unread = ["model.method=original", "model.gamma=0.9", "model.tanh=false", "model.jacobian_lambda=0"]
    assert differences(original, essence_of("cifar10-iid", *unread)) == []


def test_values_that_are_given_equal_the_defaults_they_have():
    adam = {"strategy.name": "fedadam", "strategy.server_lr": 0.01}
    assert differences(row(set=adam), essence_of("cifar10-iid", "strategy.name=fedadam")) == []
    assert DEFAULT_GAMMA == _DEFAULT_GAMMA
    assert differences(row(), essence_of("cifar10-iid", "model.gamma=null")) == []


def test_what_differs_is_said():
    found = differences(row(), essence_of("cifar10-iid", "rounds=30", "model.tanh=false", "data.max_examples=500"))
    assert found == [
        "data.max_examples: none in the paper, 500 here",
        "model.tanh: on in the paper, off here",
        "rounds: 200 in the paper, 30 here",
    ]


@pytest.mark.parametrize(
    "override",
    [
        *("model.name=cnn", "model.gamma=0.2", "model.method=lowrank", "model.init=paper", "data.name=cinic10"),
        *("strategy.name=fedprox", "partition.kind=dirichlet", "partition.held_out=0.1", "codec.up=fp16"),
    ],
)
def test_another_experiment_is_not_compared(override):
    assert differences(row(), essence_of("cifar10-iid", override)) is None


def test_sizes_do_not_ask_how_long_or_on_whose_data_was_trained():
    assert differences(row("params"), essence_of("cifar10-noniid", "rounds=1", "federation.clients=16")) == []
    assert differences(row("params"), essence_of("cifar10-iid", "codec.up=fp16")) == []
    assert differences(row("megabytes_a_round"), essence_of("cifar10-iid", "codec.up=fp16")) is None
    assert differences(row("params"), essence_of("cifar100-iid", "model.gamma=0.1")) is None


def test_a_stand_in_for_data_is_said_to_be_one():
    found = differences(row(preset="femnist"), essence_of("mnist-writers"))
    assert found == ["data.name: femnist in the paper, mnist-writers here"]


@pytest.mark.parametrize(
    ("compared", "ours", "status"),
    [
        (row(value=80.0), Interval(79.0), "pass"),
        (row(value=80.0), Interval(78.99), "fail"),
        (row(value=80.0), Interval(79.0, 9.0), "pass"),
        (row(value=80.0), Interval(78.99, 9.0), "fail"),
        (row(value=82.88), interval_of([60.0, 70.0]), "fail"),
        (row("params", 1.55), Interval(1.56), "pass"),
        (row("params", 1.55), Interval(1.54), "pass"),
        (row("params", 1.55), Interval(1.5601), "fail"),
        (row("transfer_ratio", 3.4, 0.1), Interval(3.41), "pass"),
        (row("gigabytes_to", 20.0, 0.1, target=80), Interval(21.0), "pass"),
        (row("gigabytes_to", 20.0, 0.1, target=80), Interval(21.01), "fail"),
        (row("gigabytes_to", 20.0, 0.1, target=80), Interval(1.0), "pass"),
        (row("gigabytes_to", 20.0, 0.1, target=80), None, "fail"),
        (row("rounds_to", 100, 1, target=80), Interval(105), "pass"),
        (row("rounds_to", 100, 1, target=80), Interval(106), "fail"),
        (row("seconds_at", 49.54, mbps=2), Interval(1.0), "partial"),
        (row("above", 0), Interval(0.5, 0.49), "pass"),
        (row("above", 0), Interval(0.5, 0.0), "pass"),
        (row("above", 0), Interval(0.5, 0.5), "partial"),
        (row("above", 0), Interval(0.01, 9.0), "partial"),
        (row("above", 0), Interval(9.0), "partial"),
        (row("above", 0), Interval(0.0), "fail"),
        (row("above", 0), Interval(0.0, 0.0), "fail"),
        (row("above", 0), Interval(-0.01, 9.0), "fail"),
    ],
)
def test_a_result_passes_within_its_margin(compared, ours, status):
    assert judge(compared, ours, []) == status


@pytest.mark.parametrize("ours", [Interval(99.0), None])
def test_a_run_that_differs_neither_passes_nor_fails(ours):
    assert judge(row(), ours, ["rounds: 200 in the paper, 30 here"]) == "partial"


@pytest.mark.parametrize("degrees", [1, 2, 7, 29, 30, 31, 60, 1000])
def test_the_quantile_is_students(degrees):
    assert student_t(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=5e-5)


def test_an_interval_is_the_textbooks():
    # Mean 4, standard deviation 2, t(2) = 4.3027, over the root of 3.
    found = interval_of([2.0, 4.0, 6.0])
    assert found.mean == 4
    assert found.half == pytest.approx(4.3027 * 2 / 3**0.5)
    assert (interval_of([3.0]).low, interval_of([3.0]).half) == (3.0, None)
