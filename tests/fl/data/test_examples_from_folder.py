"""Local data sets in Hugging Face's layouts."""

import io
import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from lowrank_core.errors import LowrankError, UsageError
from lowrank_fl.config import DataConfig, PartitionConfig
from lowrank_fl.data.load import load_examples


def png(value, mode="L", size=(4, 4)):
    file = io.BytesIO()
    Pillow.new(mode, size, value).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def by_writer(tmp_path, write_parquet):
    """Six train and two test pictures, whose labels name 12 classes and use 2, as the hub lays them out."""
    features = {
        "image": Image(),
        "writer": Value("string"),
        "age": Value("int64"),
        "height": Value("float64"),
        "character": ClassLabel(names=list("0123456789AB")),
    }
    train = {
        "image": [png(10 * row) for row in range(6)],
        "writer": ["b", "a", "b", "a", "c", "c"],
        "age": [30, 40, 30, 40, 50, 50],
        "height": [1.5] * 6,
        "character": [7, 3, 7, 3, 3, 7],
    }
    test = {key: values[:2] for key, values in train.items()}
    write_parquet(tmp_path / "data" / "plain_text" / "train-00000-of-00001.parquet", train, features)
    write_parquet(tmp_path / "data" / "plain_text" / "test-00000-of-00001.parquet", test, features)
    return tmp_path / "data"


def test_parquet_files_in_the_hubs_layout_are_read(load, by_writer):
    examples = load(name="mine", path=by_writer)
    assert examples.name == "mine"
    assert examples.inputs.shape == (6, 1, 4, 4)
    assert examples.inputs[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert examples.test_inputs.shape == (2, 1, 4, 4)
    assert examples.mean == (25.0,)
    assert examples.std == pytest.approx((np.std([0, 10, 20, 30, 40, 50]),))
    assert examples.groups is None


def test_classes_are_those_that_occur_in_training(load, by_writer):
    examples = load(name="mine", path=by_writer)
    assert examples.classes == ("3", "7")
    assert examples.labels.tolist() == [1, 0, 1, 0, 0, 1]
    assert examples.test_labels.tolist() == [1, 0]


def test_a_natural_partition_reads_who_made_each_example(load, by_writer):
    assert load(name="mine", path=by_writer, natural="writer").groups.tolist() == ["b", "a", "b", "a", "c", "c"]
    assert load(name="mine", path=by_writer, natural="age").groups.tolist() == ["30", "40", "30", "40", "50", "50"]


def test_max_examples_keeps_pictures_labels_and_makers_together(load, by_writer):
    whole = load(name="mine", path=by_writer, natural="writer")
    few = load(name="mine", path=by_writer, natural="writer", max_examples=3)
    rows = [int(value) // 10 for value in few.inputs[:, 0, 0, 0]]
    assert len(rows) == 3
    assert few.labels.tolist() == whole.labels[rows].tolist()
    assert few.groups.tolist() == whole.groups[rows].tolist()


def test_numbers_serve_as_labels_when_they_are_named(load, by_writer):
    examples = load(name="mine", path=by_writer, label_key="age")
    assert examples.classes == ("30", "40", "50")
    assert examples.labels.tolist() == [0, 1, 0, 1, 2, 2]


def test_text_serves_as_labels_when_it_is_named(load, by_writer):
    assert load(name="mine", path=by_writer, label_key="writer").classes == ("a", "b", "c")


def test_nothing_is_written_into_the_users_folder(load, by_writer):
    before = sorted(by_writer.rglob("*"))
    load(name="mine", path=by_writer)
    assert sorted(by_writer.rglob("*")) == before


def test_the_readers_progress_bars_are_given_back(load, by_writer):
    import datasets

    before = datasets.are_progress_bars_disabled()
    load(name="mine", path=by_writer)
    assert datasets.are_progress_bars_disabled() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_key": "picture"}, r"data\.image_key names 'picture', which is no column; the columns are image"),
        ({"image_key": "age"}, r"data\.image_key names 'age', which holds no pictures"),
        ({"label_key": "class"}, r"data\.label_key names 'class', which is no column.*character \(ClassLabel\)"),
        ({"label_key": "height"}, r"data\.label_key names 'height', which holds float64"),
        ({"natural": "author"}, r"partition\.id_column names 'author', which is no column.*writer \(string\)"),
    ],
)
def test_a_wrong_column_is_named_beside_those_that_are_there(load, by_writer, options, message):
    with pytest.raises(UsageError, match=message):
        load(name="mine", path=by_writer, **options)


def test_a_natural_partition_without_a_column_names_the_columns(by_writer):
    from lowrank_fl.config import DataConfig, PartitionConfig
    from lowrank_fl.data.load import load_examples

    with pytest.raises(UsageError, match=r"needs partition\.id_column.*writer \(string\), age \(int64\)"):
        load_examples(DataConfig(path=str(by_writer)), PartitionConfig(kind="natural"), 0)


@pytest.fixture
def coarse_and_fine(tmp_path, write_parquet):
    features = {"img": Image(), "fine_label": ClassLabel(names=["a", "b"]), "coarse_label": ClassLabel(names=["z"])}
    columns = {"img": [png(0, "RGB"), png(1, "RGB")], "fine_label": [0, 1], "coarse_label": [0, 0]}
    for split in ("train", "test"):
        write_parquet(tmp_path / "data" / "cifar100" / f"{split}-00000-of-00001.parquet", columns, features)
    return tmp_path / "data"


def test_several_class_labels_need_a_choice(load, coarse_and_fine):
    with pytest.raises(UsageError, match=r"\(fine_label, coarse_label\).*set data\.label_key"):
        load(name="mine", path=coarse_and_fine)
    assert load(name="mine", path=coarse_and_fine, label_key="coarse_label").classes == ("z",)


def test_cifar100_means_its_hundred_classes(load, coarse_and_fine):
    assert load(name="cifar100", path=coarse_and_fine).classes == ("a", "b")


def test_a_data_set_without_class_labels_needs_a_label_key(load, tmp_path, write_parquet):
    columns, features = {"image": [png(0)], "animal": ["cat"]}, {"image": Image(), "animal": Value("string")}
    for split in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{split}.parquet", columns, features)
    with pytest.raises(UsageError, match=r"no column is known to hold class labels.*animal \(string\)"):
        load(name="mine", path=tmp_path / "data")
    assert load(name="mine", path=tmp_path / "data", label_key="animal").classes == ("cat",)


def test_a_data_set_without_pictures_is_refused(load, tmp_path, write_parquet):
    features = {"text": Value("string"), "label": ClassLabel(names=["a"])}
    write_parquet(tmp_path / "data" / "train.parquet", {"text": ["x"], "label": [0]}, features)
    write_parquet(tmp_path / "data" / "test.parquet", {"text": ["x"], "label": [0]}, features)
    with pytest.raises(UsageError, match=r"no column is known to hold pictures.*set data\.image_key"):
        load(name="mine", path=tmp_path / "data")


def labels_only(train, test):
    features = {"image": Image(), "label": ClassLabel(names=["a", "b", "c"])}
    return [({"image": [png(0)] * len(split), "label": split}, features) for split in (train, test)]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1], [2], r"the test split has 1 classes that no training example has \(c\)"),
        ([0, 1, -1], [0], r"row 2 of the train split has no label"),
        ([0, 1], [None], r"row 0 of the test split has no label"),
        ([], [0], r"the train split of .* is empty"),
        ([0], [], r"the test split of .* is empty"),
    ],
)
def test_splits_that_do_not_fit_are_refused(load, tmp_path, write_parquet, train, test, message):
    for split, (columns, features) in zip(("train", "test"), labels_only(train, test), strict=True):
        write_parquet(tmp_path / "data" / f"{split}.parquet", columns, features)
    with pytest.raises(LowrankError, match=message):
        load(name="mine", path=tmp_path / "data")


def test_a_split_that_lacks_a_column_is_refused(load, tmp_path, monkeypatch):
    columns, features = labels_only([0], [])[0]
    train = Dataset.from_dict(columns, features=Features(features))
    splits = {"train": train, "test": train.remove_columns("label")}
    monkeypatch.setattr("datasets.load_dataset", lambda _: splits)
    with pytest.raises(LowrankError, match=r"test split of .* lacks the column label that the train split has"):
        load(name="mine", path=tmp_path)


def test_a_data_set_without_a_train_split_is_refused(load, tmp_path, write_parquet):
    columns, features = labels_only([0], [0])[0]
    write_parquet(tmp_path / "data" / "test.parquet", columns, features)
    with pytest.raises(LowrankError, match=r"has no train split \(found test\)"):
        load(name="mine", path=tmp_path / "data")


def test_validation_serves_as_test_where_there_is_none(load, tmp_path, write_parquet):
    for split, rows in (("train", [0, 1, 0]), ("validation", [1])):
        columns, features = labels_only(rows, [])[0]
        write_parquet(tmp_path / "data" / f"{split}.parquet", columns, features)
    assert load(name="mine", path=tmp_path / "data").test_labels.tolist() == [1]


def test_class_folders_under_train_valid_and_test_are_read_as_cinic10_lays_them_out(load, tmp_path, write_picture):
    for split, value in (("train", 10), ("valid", 20), ("test", 30)):
        for label in ("bird", "airplane"):
            write_picture(tmp_path / "data" / split / label / "a.png", "RGB", (value, 0, 0))
    examples = load(name="cinic10", path=tmp_path / "data")
    assert examples.classes == ("airplane", "bird")
    assert examples.inputs.shape == (2, 3, 4, 4)
    assert set(examples.inputs[:, 0].flatten().tolist()) == {10}
    assert set(examples.test_inputs[:, 0].flatten().tolist()) == {30}


def test_one_folder_of_class_folders_holds_out_every_fifth_picture(load, tmp_path, write_picture, caplog):
    for label, number in (("cat", 10), ("dog", 5)):
        for index in range(number):
            write_picture(tmp_path / "data" / label / f"{index}.png", "L", index)
    with caplog.at_level(logging.INFO, "lowrank_fl"):
        examples = load(name="mine", path=tmp_path / "data")
    assert torch.bincount(examples.labels).tolist() == [8, 4]
    assert torch.bincount(examples.test_labels).tolist() == [2, 1]
    assert examples.test_inputs[:, 0, 0, 0].tolist() == [4, 9, 4]
    assert "no test split: every fifth example of each class is held out" in caplog.text


def test_nothing_is_held_out_for_the_server_where_clients_hold_out(tmp_path, write_picture):
    for index in range(10):
        write_picture(tmp_path / "data" / "cat" / f"{index}.png", "L", index)
        write_picture(tmp_path / "data" / "dog" / f"{index}.png", "L", index)
    partition = PartitionConfig(held_out=0.2)
    examples = load_examples(DataConfig(name="mine", path=str(tmp_path / "data")), partition, 0)
    assert torch.bincount(examples.labels).tolist() == [10, 10]
    assert examples.test_inputs.shape == (0, 1, 4, 4)
    assert len(examples.test_labels) == 0


def test_classes_too_small_to_hold_one_out_are_refused(load, tmp_path, write_picture):
    for label in ("cat", "dog"):
        write_picture(tmp_path / "data" / label / "0.png")
    with pytest.raises(LowrankError, match=r"has no test split, and none of its 2 classes has the 5 examples"):
        load(name="mine", path=tmp_path / "data")


def test_a_folder_that_does_not_exist_is_said(load, tmp_path):
    with pytest.raises(LowrankError, match=r"nowhere, and there is no such folder; give an existing folder"):
        load(name="mine", path=tmp_path / "nowhere")


def test_a_file_is_no_folder(load, write_picture, tmp_path):
    with pytest.raises(UsageError, match=r"a file; it takes the folder"):
        load(name="mine", path=write_picture(tmp_path / "a.png"))


def test_a_folder_without_pictures_is_said(load, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(LowrankError, match=r"cannot be read as a data set .*it should hold parquet files, or folders"):
        load(name="mine", path=tmp_path / "data")


def test_a_broken_parquet_file_is_said(load, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(LowrankError, match=r"cannot be read as a data set"):
        load(name="mine", path=tmp_path / "data")


def test_a_hub_id_is_announced_and_its_failure_explained(load, monkeypatch, caplog):
    import datasets

    def offline(path):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with caplog.at_level(logging.INFO, "lowrank_fl"), pytest.raises(LowrankError, match=r"no folder someone/pictures"):
        load(name="mine", path="someone/pictures")
    assert "Downloading someone/pictures from https://huggingface.co/datasets/someone/pictures" in caplog.text


@pytest.mark.slow
def test_real_cifar10_in_the_hubs_layout(load, shared_data):
    examples = load(name="cifar10", path=shared_data / "cifar10")
    assert examples.inputs.shape == (50_000, 3, 32, 32)
    assert torch.bincount(examples.labels).tolist() == [5000] * 10
    assert torch.bincount(examples.test_labels).tolist() == [1000] * 10
    assert examples.classes[0] == "airplane"


@pytest.mark.slow
def test_real_digits_by_writer_have_ten_classes_and_539_writers(load, shared_data):
    examples = load(name="mnist", path=shared_data / "mnist_by_writer", natural="writer_id", max_examples=None)
    assert examples.inputs.shape == (60_000, 1, 28, 28)
    assert examples.classes == tuple("0123456789")
    assert len(set(examples.groups)) == 539
    # MNIST's published mean and deviation.
    assert examples.mean[0] / 255 == pytest.approx(0.1307, abs=1e-4)
    assert examples.std[0] / 255 == pytest.approx(0.3081, abs=1e-4)
