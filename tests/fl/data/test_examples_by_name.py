"""The names of data sets, and the one that needs no file."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from lowrank_core.errors import LowrankError, UsageError
from lowrank_fl.config import DataConfig, PartitionConfig
from lowrank_fl.data.load import load_examples
from lowrank_fl.load import load_config


def test_digits_are_bytes_of_8_by_8_with_ten_classes(load):
    digits = load(name="digits")
    assert digits.inputs.shape == (1442, 1, 8, 8)
    assert digits.inputs.dtype == torch.uint8
    assert int(digits.inputs.max()) == 16
    assert digits.labels.dtype == torch.int64
    assert digits.classes == tuple("0123456789")
    assert len(digits.test_labels) == 1797 - 1442


def test_normalized_training_digits_have_zero_mean_and_unit_deviation(load):
    digits = load(name="digits")
    normal = digits.normalize(digits.inputs)
    assert float(normal.mean()) == pytest.approx(0, abs=1e-5)
    assert float(normal.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_digits_are_split_alike_for_every_seed_and_in_every_class(load):
    one, two = load(name="digits", seed=1), load(name="digits", seed=2)
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(one.test_inputs, two.test_inputs)
    shares = np.bincount(one.test_labels) / (np.bincount(one.labels) + np.bincount(one.test_labels))
    assert shares.min() > 0.19
    assert shares.max() <= 0.2


def test_max_examples_keeps_so_many_training_examples_by_the_seed(load):
    whole = load(name="digits")
    few, same, other = (load(name="digits", max_examples=100, seed=seed) for seed in (0, 0, 1))
    assert len(few.labels) == 100
    assert torch.equal(few.inputs, same.inputs)
    assert not torch.equal(few.inputs, other.inputs)
    assert torch.equal(few.test_inputs, whole.test_inputs)


def test_max_examples_above_the_number_of_examples_keeps_all(load):
    assert len(load(name="digits", max_examples=10_000).labels) == 1442


def test_an_unknown_name_is_met_with_the_nearest_one(load):
    with pytest.raises(UsageError, match=r"unknown data set 'cifar-10' \(nearest: cifar10\).*beside data.path"):
        load(name="cifar-10")


def test_cinic10_without_a_path_says_where_it_is_published(load):
    with pytest.raises(LowrankError, match=r"datashare\.ed\.ac\.uk.*data\.path=FOLDER"):
        load(name="cinic10")


def test_digits_have_no_natural_clients(load):
    with pytest.raises(UsageError, match=r"partition\.kind=natural.*digits does not say it"):
        load(name="digits", natural="writer")


def test_importing_the_package_imports_no_heavy_library():
    heavy = "{'torch', 'datasets', 'sklearn', 'torchvision', 'flwr_datasets', 'matplotlib', 'PIL'}"
    code = f"import sys, lowrank_fl.data; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_offers_its_functions_and_no_other_name():
    import lowrank_fl.data

    assert lowrank_fl.data.load_examples is load_examples
    with pytest.raises(AttributeError, match="no attribute 'unload_examples'"):
        _ = lowrank_fl.data.unload_examples


def test_loading_leaves_the_global_random_generators_alone():
    state = np.random.get_state()[1].copy()
    torch_state = torch.get_rng_state()
    load_examples(DataConfig(max_examples=10), PartitionConfig(), 3)
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_preset_for_data_of_ones_own_asks_for_the_path():
    config = load_config("mnist-writers")
    with pytest.raises(UsageError, match=r"'mnist-writers' is one of your own.*set -o data.path to its folder"):
        load_examples(config.data, config.partition, 0)
