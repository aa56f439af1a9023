"""MNIST and EMNIST from IDX files."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch


def write_idx(file: Path, values: np.ndarray) -> None:
    """The format of http://yann.lecun.com/exdb/mnist: magic, sizes, bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    file.write_bytes(header + values.astype(np.uint8).tobytes())


def pictures(number: int) -> np.ndarray:
    """Picture i has the byte i + 1 at line 2, column 5, and else zeros."""
    pixels = np.zeros((number, 28, 28), dtype=np.uint8)
    pixels[:, 2, 5] = np.arange(number) + 1
    return pixels


@pytest.fixture
def mnist(tmp_path):
    raw = tmp_path / "cache" / "MNIST" / "raw"
    for split, number in (("train", 6), ("t10k", 2)):
        write_idx(raw / f"{split}-images-idx3-ubyte", pictures(number))
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(number))


def test_mnist_is_read_from_the_cache_without_a_download(load, mnist):
    examples = load(name="mnist")
    assert examples.inputs.shape == (6, 1, 28, 28)
    assert examples.inputs.dtype == torch.uint8
    assert examples.inputs[:, 0, 2, 5].tolist() == [1, 2, 3, 4, 5, 6]
    assert examples.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert examples.test_labels.tolist() == [0, 1]
    assert examples.classes == tuple("0123456789")


def test_max_examples_keeps_a_part_of_mnist(load, mnist):
    examples = load(name="mnist", max_examples=2)
    assert (examples.inputs[:, 0, 2, 5] - 1).tolist() == examples.labels.tolist()
    assert len(examples.labels) == 2


def test_emnist_has_62_classes_and_upright_pictures(load, tmp_path):
    raw = tmp_path / "cache" / "EMNIST" / "raw"
    for split in ("train", "test"):
        write_idx(raw / f"emnist-byclass-{split}-images-idx3-ubyte", pictures(3).transpose(0, 2, 1))
        write_idx(raw / f"emnist-byclass-{split}-labels-idx1-ubyte", np.array([0, 10, 61]))
    examples = load(name="emnist")
    assert examples.inputs[:, 0, 2, 5].tolist() == [1, 2, 3]
    assert [examples.classes[label] for label in examples.labels] == ["0", "A", "z"]
    assert len(examples.classes) == 62
