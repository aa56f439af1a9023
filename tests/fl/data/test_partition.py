"""Who holds which examples: nothing twice, the same for the same seed."""

import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_core.errors import LowrankError, UsageError
from lowrank_fl.config import PartitionConfig
from lowrank_fl.data.partition import partition_examples

few_runs = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
seeds = st.integers(0, 2**32 - 1)


def config(kind, **options):
    return PartitionConfig(kind=kind, **options)


def assert_disjoint(parts, rows):
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < rows
    for part in parts:
        assert part.dtype == np.int64
        assert np.array_equal(part, np.sort(part))


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
@few_runs
@given(rows=st.integers(1, 60), share=st.floats(0.01, 1), seed=seeds)
def test_iid_gives_every_row_to_one_client_in_equal_shares(labelled, rows, share, seed):
    clients = max(1, int(rows * share))
    examples = labelled(np.arange(rows) % 7)
    parts = partition_examples(examples, config("iid"), clients, seed)
    assert_disjoint(parts, rows)
    sizes = [len(part) for part in parts]
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1
    assert_equal(parts, partition_examples(examples, config("iid"), clients, seed))


@pytest.mark.slow
@few_runs
@given(alpha=st.floats(0.5, 100), clients=st.integers(1, 10), seed=seeds)
def test_dirichlet_gives_every_row_to_one_client_and_leaves_none_empty(labelled, alpha, clients, seed):
    examples = labelled(np.arange(500) % 10)
    parts = partition_examples(examples, config("dirichlet", alpha=alpha), clients, seed)
    assert_disjoint(parts, 500)
    assert sum(map(len, parts)) == 500
    assert min(map(len, parts)) >= 1
    assert_equal(parts, partition_examples(examples, config("dirichlet", alpha=alpha), clients, seed))


@pytest.mark.slow
@few_runs
@given(classes=st.integers(1, 5), clients=st.integers(1, 12), seed=seeds)
def test_pathological_gives_each_client_so_many_classes(labelled, classes, clients, seed):
    labels = np.arange(200) % 5
    options = config("pathological", classes_per_client=classes)
    parts = partition_examples(labelled(labels), options, clients, seed)
    assert_disjoint(parts, 200)
    assert [len(np.unique(labels[part])) for part in parts] == [classes] * clients
    if clients >= 5:
        assert sum(map(len, parts)) == 200
    assert_equal(parts, partition_examples(labelled(labels), options, clients, seed))


@pytest.mark.slow
@few_runs
@given(groups=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60), data=st.data(), seed=seeds)
def test_natural_gives_each_client_all_of_one_maker(labelled, groups, data, seed):
    clients = data.draw(st.integers(1, len(set(groups))))
    examples = labelled([0] * len(groups), groups)
    parts = partition_examples(examples, config("natural"), clients, seed)
    assert_disjoint(parts, len(groups))
    makers = [{groups[row] for row in part} for part in parts]
    assert all(len(maker) == 1 for maker in makers)
    names = [maker.pop() for maker in makers]
    assert names == sorted(set(names))
    assert [len(part) for part in parts] == [groups.count(name) for name in names]
    assert_equal(parts, partition_examples(examples, config("natural"), clients, seed))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "natural"])
def test_another_seed_gives_another_partition(labelled, kind):
    examples = labelled(np.arange(300) % 10, [str(row % 30) for row in range(300)])
    one, two = (partition_examples(examples, config(kind), 10, seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "natural"])
def test_global_random_generators_neither_matter_nor_move(labelled, kind):
    examples = labelled(np.arange(300) % 10, [str(row % 30) for row in range(300)])
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    one = partition_examples(examples, config(kind), 10, 0)
    moved = (np.random.random(), random.random(), float(torch.rand(())))
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    assert moved == (np.random.random(), random.random(), float(torch.rand(())))
    assert_equal(one, partition_examples(examples, config(kind), 10, 0))


def test_nothing_is_written_on_the_terminal(labelled, capfd, recwarn):
    examples = labelled(np.arange(100) % 10, ["a"] * 100)
    for kind, clients in (("iid", 3), ("dirichlet", 30), ("pathological", 2), ("natural", 1)):
        partition_examples(examples, config(kind), clients, 0)
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.slow
def test_the_papers_partition_of_cifar10_needs_no_second_draw(labelled):
    examples = labelled(np.arange(50_000) % 10)
    parts = partition_examples(examples, config("dirichlet", alpha=0.5), 100, 0)
    assert_disjoint(parts, 50_000)
    assert sum(map(len, parts)) == 50_000
    # 500 on average, and unequal: proportions are drawn, not balanced.
    assert min(map(len, parts)) > 50
    assert max(map(len, parts)) > 900


@pytest.mark.slow
def test_a_small_alpha_gives_few_classes_and_a_large_one_all(labelled):
    labels = np.arange(5000) % 10

    def classes(alpha):
        parts = partition_examples(labelled(labels), config("dirichlet", alpha=alpha), 5, 0)
        return np.mean([(np.bincount(labels[part], minlength=10) > 25).sum() for part in parts])

    assert classes(0.05) < 5
    assert classes(100.0) == 10


def test_rows_of_a_class_are_mixed_before_they_are_cut(labelled):
    # Rows in file order would give the first client the first writer's digits.
    parts = partition_examples(labelled([0] * 100), config("pathological", classes_per_client=1), 2, 0)
    assert parts[0].max() > 50 > parts[0].min()


def test_clients_left_empty_are_counted(labelled):
    message = r"\d+ of 20 clients would hold no example .* alpha 0\.01 .*fewer federation\.clients or a larger"
    with pytest.raises(LowrankError, match=message):
        partition_examples(labelled(np.arange(40) % 2), config("dirichlet", alpha=0.01), 20, 0)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_more_clients_than_examples_are_refused(labelled, kind):
    with pytest.raises(LowrankError, match=r"3 training examples for 4 clients.*set federation\.clients to 3 at most"):
        partition_examples(labelled([0, 1, 2]), config(kind), 4, 0)


def test_more_classes_a_client_than_there_are_is_refused(labelled):
    with pytest.raises(UsageError, match=r"classes_per_client is 4, but the training examples have 3 classes"):
        partition_examples(labelled([0, 1, 2] * 5), config("pathological", classes_per_client=4), 2, 0)


def test_a_class_too_small_for_its_clients_is_refused(labelled):
    with pytest.raises(LowrankError, match=r"a class has fewer examples than clients.*10 clients of 2 classes"):
        partition_examples(labelled([0] * 30 + [1]), config("pathological", classes_per_client=2), 10, 0)


def test_classes_that_no_client_holds_are_said(labelled, caplog):
    with caplog.at_level(logging.INFO, "lowrank_fl"):
        partition_examples(labelled(np.arange(20) % 4), config("pathological", classes_per_client=1), 2, 0)
    assert "No client holds 2 of 4 classes (label numbers 2, 3)" in caplog.text


def test_more_clients_than_makers_are_refused(labelled):
    with pytest.raises(LowrankError, match=r"made has 2 makers of training examples for 3 clients"):
        partition_examples(labelled([0, 0, 0], ["a", "b", "a"]), config("natural"), 3, 0)


def test_a_natural_partition_without_makers_is_refused(labelled):
    with pytest.raises(UsageError, match=r"made was loaded without; set partition\.id_column"):
        partition_examples(labelled([0, 1]), config("natural"), 1, 0)
