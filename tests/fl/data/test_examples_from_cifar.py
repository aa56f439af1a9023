"""CIFAR's archives of pickles, in the form that Python 2 wrote them."""

import hashlib
import io
import logging
import pickle
import struct
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from lowrank_core.errors import LowrankError
from lowrank_fl.data.cifar import read_archive


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its text, and numpy's names as numpy 1 had them."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_text(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = save_text
    dispatch[bytes] = save_text

    def save_global(self, value, name=None):
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or value.__qualname__}\n".encode())
        self.memoize(value)

    dispatch[type(np.empty(0).__reduce__()[0])] = save_global
    dispatch[type] = save_global


def python2_pickle(value) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def batch(first: int, rows: int, labels: str) -> dict:
    """Row i is all bytes of value first + i, of class first + i."""
    numbers = np.arange(first, first + rows)
    data = np.repeat(numbers.astype(np.uint8)[:, None], 3072, axis=1)
    return {"data": data, labels: numbers.tolist(), "filenames": ["x.png"] * rows}


def publish(monkeypatch, folder, published, contents: dict[str, bytes]) -> None:
    """Put an archive where a download would, and let torchvision's class know its checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / published.filename
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{published.base_folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    def sums(names):
        return [[name, hashlib.md5(contents[name]).hexdigest()] for name in names]

    tests = [name for name in contents if name.startswith("test")]
    metas = [published.meta["filename"]]
    monkeypatch.setattr(published, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(published, "test_list", sums(tests))
    monkeypatch.setattr(published, "train_list", sums(sorted(set(contents) - set(tests) - set(metas))))
    monkeypatch.setattr(published, "meta", {**published.meta, "md5": sums(metas)[0][1]})


@pytest.fixture
def tiny_cifar10(tmp_path, monkeypatch):
    contents = {
        "data_batch_1": python2_pickle(batch(0, 2, "labels")),
        "data_batch_2": python2_pickle(batch(2, 2, "labels")),
        "test_batch": python2_pickle(batch(1, 2, "labels")),
        "batches.meta": python2_pickle({"label_names": ["w", "x", "y", "z"]}),
    }
    publish(monkeypatch, tmp_path / "cache", CIFAR10, contents)
    return contents


def test_the_batches_of_cifar10_are_joined(load, tiny_cifar10):
    examples = load(name="cifar10")
    assert examples.inputs.shape == (4, 3, 32, 32)
    assert examples.inputs[:, 2, 31, 31].tolist() == [0, 1, 2, 3]
    assert examples.labels.tolist() == [0, 1, 2, 3]
    assert examples.test_labels.tolist() == [1, 2]
    assert examples.classes == ("w", "x", "y", "z")
    assert examples.mean == (1.5, 1.5, 1.5)


def test_max_examples_keeps_a_part_of_cifar10(load, tiny_cifar10):
    examples = load(name="cifar10", max_examples=2)
    assert examples.inputs[:, 0, 0, 0].tolist() == examples.labels.tolist()
    assert len(examples.labels) == 2


def test_channels_come_red_green_blue_and_rows_from_the_top(load, tmp_path, monkeypatch):
    row = np.zeros((1, 3072), dtype=np.uint8)
    row[0, 1024] = 9  # the first green byte
    row[0, 2048 + 32] = 7  # blue, second line
    content = python2_pickle({"data": row, "labels": [0]})
    meta = python2_pickle({"label_names": ["a"]})
    contents = {"data_batch_1": content, "test_batch": content, "batches.meta": meta}
    publish(monkeypatch, tmp_path / "cache", CIFAR10, contents)
    inputs = load(name="cifar10").inputs
    assert inputs[0, 1, 0, 0] == 9
    assert inputs[0, 2, 1, 0] == 7


def test_cifar100_takes_the_fine_labels(load, tmp_path, monkeypatch):
    contents = {
        "train": python2_pickle({**batch(0, 3, "fine_labels"), "coarse_labels": [0, 0, 0]}),
        "test": python2_pickle({**batch(0, 1, "fine_labels"), "coarse_labels": [0]}),
        "meta": python2_pickle({"fine_label_names": ["a", "b", "c"], "coarse_label_names": ["z"]}),
    }
    publish(monkeypatch, tmp_path / "cache", CIFAR100, contents)
    examples = load(name="cifar100")
    assert examples.classes == ("a", "b", "c")
    assert torch.equal(examples.labels, torch.arange(3))


def test_a_pickle_that_would_run_code_is_refused(load, tmp_path, monkeypatch, tiny_cifar10):
    trace = tmp_path / "trace"
    evil = b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR."
    publish(monkeypatch, tmp_path / "cache", CIFAR10, {**tiny_cifar10, "data_batch_1": evil})
    with pytest.raises(LowrankError, match=r"asks to load os\.system, which is no plain data"):
        load(name="cifar10")
    assert not trace.exists()


@pytest.mark.parametrize("module", ["builtins eval", "numpy.core.multiarray fromfile", "numpy load", "_codecs encode"])
def test_no_other_name_is_loaded(load, tmp_path, monkeypatch, tiny_cifar10, module):
    asks = "c{}\n{}\n.".format(*module.split()).encode()
    publish(monkeypatch, tmp_path / "cache", CIFAR10, {**tiny_cifar10, "data_batch_1": asks})
    with pytest.raises(LowrankError, match="which is no plain data"):
        load(name="cifar10")


def test_a_member_with_another_checksum_is_refused_before_it_is_unpickled(tmp_path, monkeypatch, tiny_cifar10):
    path = tmp_path / "cache" / CIFAR10.filename
    with pytest.raises(LowrankError, match=r"data_batch_1 in .* is not the published file"):
        read_archive(path, {"cifar-10-batches-py/data_batch_1": "0" * 32})


def test_an_archive_that_lacks_a_member_is_refused(tmp_path, tiny_cifar10):
    path = tmp_path / "cache" / CIFAR10.filename
    with pytest.raises(LowrankError, match=r"lacks cifar-10-batches-py/data_batch_9; delete it"):
        read_archive(path, {"cifar-10-batches-py/data_batch_9": "0" * 32})


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "emnist"])
def test_a_download_is_announced_and_its_failure_says_what_to_do(load, name, tmp_path, monkeypatch, caplog):
    def offline(request, *args, **kwargs):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with (
        caplog.at_level(logging.INFO, "lowrank_fl"),
        pytest.raises(LowrankError, match=r"no network here.*data\.path=FOLDER"),
    ):
        load(name=name)
    assert f"Downloading {name} from http" in caplog.text
    assert str(tmp_path / "cache") in caplog.text
