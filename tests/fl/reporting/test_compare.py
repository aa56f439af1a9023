"""Runs held against the paper's rows."""

import pytest
from made_runs import write_run

from lowrank_fl.paper.rows import paper_rows
from lowrank_fl.reporting.compare import compare
from lowrank_fl.reporting.groups import group_runs
from lowrank_fl.reporting.read import find_runs

VGG = {"params": (1_546_000, 1_546_000, 15_245_000), "client_bytes": 8 * 1_546_000}


def curve(*last, rounds=200):
    return (*(0.1 for _ in range(rounds - len(last))), *last)


def compared(folder):
    return compare(group_runs(find_runs([folder]).runs))


def told(rows, quantity, source=None):
    return [
        (row.status, row.ours and round(row.ours.mean, 2), row.differs)
        for row in rows
        if row.group and row.paper and row.quantity == quantity and source in (None, row.paper.source)
    ]


@pytest.mark.slow
def test_the_papers_own_run_is_judged_in_every_quantity(tmp_path):
    write_run(tmp_path / "a", "cifar10-iid", accuracies=curve(0.81, 0.825, rounds=200), **VGG)
    rows = compared(tmp_path)
    assert told(rows, "accuracy, %") == [("pass", 82.5, ())]
    assert told(rows, "parameters, M") == [("pass", 1.55, ())]
    assert told(rows, "rounds to 80 %") == [("fail", 199, ())]
    # 199 rounds of 16 clients, in GB of 2^30 bytes.
    assert told(rows, "GB to 80 %") == [("fail", round(199 * 16 * 8 * 1_546_000 / 2**30, 2), ())]
    (seconds,) = told(rows, "s a round at 2 Mbps")
    assert seconds[0] == "partial"
    assert seconds[2] == ("seconds computing: 2.34 in the paper, 0.62 here",)


@pytest.mark.slow
def test_every_row_of_the_paper_is_there_once_or_for_each_group(tmp_path):
    write_run(tmp_path / "a", "cifar10-iid", accuracies=curve(0.8), **VGG)
    rows = compared(tmp_path)
    assert [row.paper for row in rows if row.paper] == list(paper_rows())
    assert {row.status for row in rows if row.group is None} == {"not run"}


@pytest.mark.slow
def test_fewer_rounds_are_partial_and_say_so(tmp_path):
    write_run(tmp_path / "a", "cifar10-iid", accuracies=curve(0.5, rounds=30), **VGG)
    rows = compared(tmp_path)
    assert told(rows, "accuracy, %") == [("partial", 50.0, ("rounds: 200 in the paper, 30 here",))]
    assert told(rows, "rounds to 80 %") == [("partial", None, ("rounds: 200 in the paper, 30 here",))]
    assert told(rows, "parameters, M") == [("pass", 1.55, ())]


@pytest.mark.slow
def test_rounds_do_not_matter_to_a_target_that_was_reached(tmp_path):
    write_run(tmp_path / "a", "cifar10-iid", accuracies=curve(0.8, rounds=100), **VGG)
    assert told(compared(tmp_path), "rounds to 80 %") == [("pass", 100, ())]


@pytest.mark.slow
def test_a_target_that_was_never_reached_fails(tmp_path):
    write_run(tmp_path / "a", "cifar10-iid", accuracies=curve(0.79), **VGG)
    assert told(compared(tmp_path), "GB to 80 %") == [("fail", None, ())]


def test_an_unfinished_run_says_how_far_it_came(tmp_path):
    write_run(tmp_path / "a", "cifar10-iid", accuracies=(0.1, 0.2), whole=False, interrupted=True)
    rows = compared(tmp_path)
    assert told(rows, "accuracy, %") == [("partial", 20.0, ("rounds: 200 in the paper, 2 so far here",))]
    assert told(rows, "parameters, M") == []


@pytest.mark.slow
def test_a_run_of_1000_rounds_is_held_against_the_papers_of_1000(tmp_path):
    write_run(tmp_path / "a", "cifar10-iid", accuracies=curve(0.83, rounds=1000), **VGG)
    assert told(compared(tmp_path), "accuracy, %", "Table 9") == [("pass", 83.0, ())]
    assert told(compared(tmp_path), "accuracy, %", "Tables 2, 3 and 9") == []


@pytest.mark.slow
@pytest.mark.parametrize(("own", "status"), [(0.951, "pass"), (0.949, "fail")])
def test_personalised_methods_are_compared_seed_by_seed(tmp_path, own, status):
    original = "model.method=original"
    for seed, shift in enumerate((0.0, 0.01)):
        accuracies = curve(own + shift, rounds=100)
        write_run(tmp_path / f"a{seed}", "mnist-2class", accuracies=accuracies, worst=0.5, seed=seed)
        accuracies = curve(0.95 + shift, rounds=100)
        kind = "personalization.kind=fedper"
        write_run(tmp_path / f"b{seed}", "mnist-2class", original, kind, accuracies=accuracies, worst=0.5, seed=seed)
    rows = compared(tmp_path)
    assert told(rows, "points above fedper") == [(status, round(100 * (own - 0.95), 2), ())]
    assert told(rows, "points above local") == []


def write_writers(folder, *overrides, seed=0, accuracy=0.9):
    """A run of the paper's Figure 5a."""
    own = ("femnist", *overrides)
    return write_run(folder, *own, seed=seed, accuracies=curve(accuracy, rounds=100), worst=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["paper", "calibrated"])
def test_the_order_of_figure_5_is_found_across_sweeps_names_and_initialisations(tmp_path, init):
    """The others train whole weights, to which an initialisation of factors says nothing."""
    kinds = {"fedper": 0.85, "none": 0.8, "local": 0.75}
    for seed, shift in enumerate((0.0, 0.01, 0.005)):
        own = ("name=ours", "model.init=paper", "device=cpu")
        write_writers(tmp_path / "pfedpara" / f"{seed}", *own, seed=seed, accuracy=0.9 + shift)
        for kind, accuracy in kinds.items():
            whole = ("model.method=original", f"personalization.kind={kind}", f"model.init={init}", "model.gamma=0.9")
            write_writers(tmp_path / "others" / f"{kind}-{seed}", *whole, seed=seed, accuracy=accuracy)
    rows = compared(tmp_path)
    assert told(rows, "points above fedper", "Figure 5a") == [("pass", 5.5, ())]
    assert told(rows, "points above original", "Figure 5a") == [("pass", 10.5, ())]
    assert told(rows, "points above local", "Figure 5a") == [("pass", 15.5, ())]


@pytest.mark.slow
def test_seeds_that_only_one_method_has_are_no_part_of_a_difference(tmp_path):
    fedper = ("model.method=original", "personalization.kind=fedper")
    for seed, accuracy in enumerate((0.9, 0.9, 0.1)):
        write_writers(tmp_path / f"a{seed}", seed=seed, accuracy=accuracy)
    write_writers(tmp_path / "once", *fedper, "name=another", seed=2)
    for seed, accuracy in ((0, 0.8), (1, 0.7), (5, 0.99)):
        write_writers(tmp_path / f"b{seed}", *fedper, seed=seed, accuracy=accuracy)
    (row,) = [row for row in compared(tmp_path) if row.group and row.quantity == "points above fedper"]
    # Differences of 10 and 20 points: t(1) = 12.7 makes the interval reach far below 0.
    assert (round(row.ours.mean, 2), row.status) == (15.0, "partial")
    assert row.as_tree()["seeds"] == [0, 1]
    assert row.as_tree()["interval"] == pytest.approx([15 - 63.531, 15 + 63.531])


@pytest.mark.slow
def test_methods_at_other_rates_or_without_a_common_seed_are_not_compared(tmp_path):
    fedper = ("model.method=original", "personalization.kind=fedper")
    write_writers(tmp_path / "a")
    write_writers(tmp_path / "b", *fedper, "federation.lr=0.02")
    write_writers(tmp_path / "c", *fedper, seed=1)
    assert told(compared(tmp_path), "points above fedper") == []


@pytest.mark.slow
def test_learning_rates_within_the_papers_bounds_are_its_own(tmp_path):
    shape = {"params": (118_874, 59_000, 203_530), "worst": 0.5}
    for method in ("pfedpara", "original"):
        for lr in (0.03, 0.2):
            own = (f"model.method={method}", f"federation.lr={lr}")
            write_run(tmp_path / f"{method}{lr}", "mnist-2class", *own, accuracies=curve(0.9, rounds=100), **shape)
    found = told(compared(tmp_path), "points above original")
    assert [(status, differs) for status, _, differs in found] == [
        ("fail", ()),
        ("partial", ("federation.lr: 0.01 to 0.1 in the paper, 0.2 here",)),
    ]


def test_a_client_that_shares_nothing_has_no_ratio(tmp_path):
    write_run(tmp_path / "a", "femnist", "personalization.kind=pfedpara", params=(1, 0, 2), worst=0.5)
    assert told(compared(tmp_path), "original / transferred parameters") == []


def test_a_run_that_the_paper_has_not_is_reported_all_the_same(tmp_path):
    write_run(tmp_path / "a", "mnist", accuracies=(0.5, 0.75))
    (row,) = [row for row in compared(tmp_path) if row.paper is None]
    tree = row.as_tree()
    assert (tree["setting"], tree["run"], tree["quantity"]) == ("mnist", "fedpara", "accuracy, %")
    assert (tree["source"], tree["paper"], tree["status"]) == (None, None, None)
    assert (tree["ours"], tree["seeds"], tree["run_dirs"]) == (75.0, [0], [str(tmp_path / "a")])
