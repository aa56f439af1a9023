"""Runs by configuration, and what a group measures."""

import os

import pytest
from made_runs import write_run

from lowrank_fl.reporting.groups import group_runs
from lowrank_fl.reporting.interval import interval_of
from lowrank_fl.reporting.read import find_runs
from lowrank_fl.reporting.show import common_target, measured, repeats
from lowrank_fl.results import round_seconds


def groups_in(folder):
    return group_runs(find_runs([folder]).runs)


def test_seeds_of_one_configuration_form_a_group(tmp_path):
    for seed, last in enumerate((0.7, 0.8, 0.9)):
        write_run(tmp_path / f"a{seed}", accuracies=(0.5, last), seed=seed)
    write_run(tmp_path / "b", "mnist", "model.gamma=0.5")
    three, one = groups_in(tmp_path)
    assert (three.seeds, one.seeds) == ([0, 1, 2], [0])
    # Mean 0.8, standard deviation 0.1, t(2) = 4.3027, over the root of 3.
    assert three.accuracy().mean == pytest.approx(0.8)
    assert three.accuracy().half == pytest.approx(4.3027 * 0.1 / 3**0.5)
    assert one.accuracy().half is None


def test_an_unfinished_seed_is_no_part_of_the_mean(tmp_path):
    write_run(tmp_path / "a", "mnist", "rounds=2", accuracies=(0.5, 0.9))
    write_run(tmp_path / "b", "mnist", "rounds=2", accuracies=(0.5,), seed=1, whole=False, interrupted=True)
    assert [(group.rounds, group.finished) for group in groups_in(tmp_path)] == [(2, True), (1, False)]


def test_a_seed_counts_once_however_often_it_ran(tmp_path):
    write_run(tmp_path / "a", "mnist", "engine.kind=local", accuracies=(0.5, 0.7))
    write_run(tmp_path / "b", "mnist", "engine.kind=ray", accuracies=(0.5, 0.8))
    write_run(tmp_path / "c", accuracies=(0.5, 0.6), seed=1)
    os.utime(tmp_path / "a" / "metrics.jsonl", (1, 1))
    (group,) = groups_in(tmp_path)
    assert [run.path.name for run in group.runs] == ["b", "c"]
    assert group.accuracy().half == pytest.approx(interval_of([0.8, 0.6]).half)
    assert repeats([group]) == [f"{tmp_path / 'a'} is left out: {tmp_path / 'b'} has the same configuration and seed 0"]
    assert group.as_tree(())["left_out"] == [str(tmp_path / "a")]


def test_of_one_seed_the_most_complete_run_counts_and_then_the_newest(tmp_path):
    write_run(tmp_path / "whole", "mnist", "rounds=3", accuracies=(0.5, 0.6, 0.7))
    write_run(tmp_path / "killed", "mnist", "rounds=3", accuracies=(0.5, 0.6), whole=False, interrupted=True)
    write_run(tmp_path / "no summary", "mnist", "rounds=3", accuracies=(0.5, 0.6, 0.8), interrupted=True)
    os.utime(tmp_path / "whole" / "metrics.jsonl", (1, 1))
    (group,) = groups_in(tmp_path)
    assert [run.path.name for run in group.runs] == ["whole"]
    assert {run.path.name for run in group.repeats} == {"killed", "no summary"}


def test_another_configuration_of_the_same_seed_is_no_repeat(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "mnist", "federation.lr=0.2")
    write_run(tmp_path / "c", "mnist", "name=other")
    assert repeats(groups_in(tmp_path)) == []
    assert len(groups_in(tmp_path)) == 3


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ([], ["model.gamma=0.5"], ["fedpara, gamma 0.1", "fedpara, gamma 0.5"]),
        ([], ["model.method=original"], ["fedpara", "original"]),
        (["codec.up=fp16"], [], ["fedpara, codec up fp16", "fedpara, codec up none"]),
        (["strategy.name=feddyn"], [], ["fedpara, feddyn", "fedpara, fedavg"]),
    ],
)
def test_groups_go_by_what_sets_them_apart(tmp_path, first, second, labels):
    write_run(tmp_path / "a", "mnist", *first)
    write_run(tmp_path / "b", "mnist", *second)
    found = [group.label for group in groups_in(tmp_path)]
    assert [label.replace(", alpha 0.1", "") for label in found] == labels


def test_personalised_groups_go_by_who_keeps_what(tmp_path):
    write_run(tmp_path / "a", "mnist-2class", worst=0.5)
    write_run(tmp_path / "b", "mnist-2class", "model.method=original", "personalization.kind=fedper", worst=0.5)
    write_run(tmp_path / "c", "mnist-2class", "model.method=original", worst=0.5)
    write_run(tmp_path / "d", "mnist-2class", "model.method=fedpara", "personalization.kind=ditto", worst=0.5)
    assert [group.label for group in groups_in(tmp_path)] == ["pfedpara", "fedper", "original", "fedpara, ditto"]
    write_run(tmp_path / "e", "mnist-2class", "personalization.test_epochs=4", worst=0.5)
    labels = [group.label for group in groups_in(tmp_path)]
    assert [label for label in labels if label.startswith("pfedpara")] == [
        "pfedpara, test_epochs 5",
        "pfedpara, test_epochs 4",
    ]


def test_bytes_and_rounds_to_an_accuracy_need_every_seed_to_reach_it(tmp_path):
    write_run(tmp_path / "a", accuracies=(0.5, 0.7, 0.8), client_bytes=1000)
    write_run(tmp_path / "b", accuracies=(0.7, 0.6, 0.6), client_bytes=1000, seed=1)
    (group,) = groups_in(tmp_path)
    assert group.rounds_to(0.7).mean == 1.5
    # Ten clients a round.
    assert group.bytes_to(0.7).mean == 15_000
    assert group.rounds_to(0.8) is None
    assert group.bytes_to(0.8) is None
    assert group.total_bytes() == 30_000


@pytest.mark.parametrize(
    ("computing", "params", "mbps", "total"),
    [
        (1.64, 15.244e6, 10, 94.68),
        (1.64, 15.244e6, 50, 20.25),
        (2.34, 1.5467e6, 2, 49.54),
        (2.34, 1.5467e6, 10, 11.78),
        (2.34, 1.5467e6, 50, 4.22),
    ],
)
def test_seconds_of_a_round_are_those_of_the_papers_table_7(computing, params, mbps, total):
    """The model goes down and comes up once, four bytes a parameter."""
    assert round_seconds(computing, 2 * 4 * params, mbps) == pytest.approx(total, abs=0.02)


def test_the_papers_entry_for_the_original_at_2_mbps_is_five_seconds_above_its_arithmetic():
    assert 471.84 - round_seconds(1.64, 2 * 4 * 15.244e6, 2) == pytest.approx(5, abs=0.1)


def test_seconds_take_one_clients_share_of_the_measured_ones(tmp_path):
    # 20 seconds for ten clients, each of which moves one megabit of 2^20 bits.
    write_run(tmp_path / "a", client_bytes=2**17, seconds=20)
    (group,) = groups_in(tmp_path)
    assert group.seconds_at(2).mean == pytest.approx(2 + 0.5)


def test_the_target_is_what_all_long_runs_reached_at_some_round(tmp_path):
    write_run(tmp_path / "a", accuracies=(0.5, 0.913, 0.9))
    write_run(tmp_path / "b", accuracies=(0.5, 0.6, 0.875), seed=1)
    write_run(tmp_path / "c", accuracies=(0.2,))
    assert common_target(groups_in(tmp_path)) == 87
    assert common_target(groups_in(write_run(tmp_path / "d", accuracies=(0.29,)))) == 29


def test_a_table_shows_columns_only_where_they_say_something(tmp_path):
    write_run(tmp_path / "a", accuracies=(0.5, 0.9))
    (plain,) = measured(groups_in(tmp_path), (2,))
    assert "worst tenth, %" not in plain
    assert "codec up/down" not in plain
    assert plain["accuracy, %"] == "90.00"
    assert (plain["MB to 90 %"], plain["rounds to 90 %"], plain["MB total"]) == ("20.0", "2", "20.0")
    write_run(tmp_path / "b", "mnist", "codec.up=fp16", accuracies=(0.5, 0.9), worst=0.75)
    without, with_both = measured(groups_in(tmp_path), (2,))
    assert (without["worst tenth, %"], with_both["worst tenth, %"]) == ("-", "75.00")
    assert (without["codec up/down"], with_both["codec up/down"]) == ("none", "fp16/none")


def test_a_run_that_was_killed_is_marked_and_its_sizes_are_unknown(tmp_path):
    write_run(tmp_path / "a", "mnist", "rounds=9", accuracies=(0.5, 0.6), whole=False, interrupted=True)
    (cells,) = measured(groups_in(tmp_path), (2,))
    assert cells["run"] == "fedpara (unfinished: 2 of 9 rounds)"
    assert cells["params"] == "-"


def test_methods_are_held_against_each_other_at_the_bytes_of_the_cheapest(tmp_path):
    write_run(tmp_path / "1 dear", "mnist", "rounds=3", accuracies=(0.5, 0.6, 0.7), client_bytes=1_000_000)
    write_run(
        tmp_path / "2 cheap", "mnist", "rounds=3", "model.gamma=0.5", accuracies=(0.4, 0.5, 0.65), client_bytes=703_333
    )
    write_run(tmp_path / "3 short", "mnist", "rounds=1", "model.gamma=0.9", accuracies=(0.9,), client_bytes=50_000_000)
    dear, cheap, short = measured(groups_in(tmp_path), ())
    # Three rounds of ten clients at 703,333 bytes, up to three digits; the dear one ends its second below that.
    column = "accuracy at 21.1 MB, %"
    assert (dear[column], cheap[column], short[column]) == ("60.00", "65.00", "-")


def test_there_is_no_such_column_where_all_sent_as_much_or_nothing_was_sent(tmp_path):
    write_run(tmp_path / "a", client_bytes=1_000_000)
    write_run(tmp_path / "b", "mnist", "model.gamma=0.5", client_bytes=1_000_100)
    assert not any("accuracy at" in column for column in measured(groups_in(tmp_path), ())[0])
    write_run(tmp_path / "c", "mnist", "model.gamma=0.9", client_bytes=0)
    assert not any("accuracy at" in column for column in measured(groups_in(tmp_path), ())[0])


def test_the_gap_is_the_mean_over_rounds_of_what_is_left_of_it(tmp_path):
    write_run(tmp_path / "a", accuracies=(0.5, 0.6), gaps=((0.1, None), (0.3, None)))
    write_run(tmp_path / "b", "mnist", "aggregation.kind=refit", gaps=((0.4, 0.01), (0.4, 0.03)))
    write_run(tmp_path / "c", "mnist", "model.gamma=0.5")
    assert [row["gap, % of a step"] for row in measured(groups_in(tmp_path), ())] == ["20.00", "2.00", "-"]


def test_a_run_of_updates_goes_by_their_kind(tmp_path):
    write_run(tmp_path / "a", "mnist", "model.method=original", "update.kind=kronecker")
    write_run(tmp_path / "b", "mnist", "model.method=original")
    write_run(tmp_path / "c", "mnist", "model.method=original", "update.kind=kronecker", "update.scale=2")
    labels = [group.label for group in groups_in(tmp_path)]
    assert labels == ["kronecker update, scale 1.0", "original", "kronecker update, scale 2.0"]
