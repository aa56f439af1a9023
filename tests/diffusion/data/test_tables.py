"""Pictures and captions in parquet and on the hub."""

import pickle

import numpy as np
import pytest

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.data.opening import check_pictures, rgb_of

WHITE = (255, 255, 255)


@pytest.fixture(autouse=True)
def _cache_of_the_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))


def test_a_folder_and_a_file_of_parquet(find, parquet, notes):
    root = parquet(image=["red", "blue"], text=["a red one", "a blue\none"], source=["x", "y"])
    for path in (root, root / "train.parquet"):
        pictures = find(path)
        assert [picture.caption for picture in pictures] == ["a red one", "a blue one"]
        assert [rgb_of(picture, WHITE).getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 0, 255)]
        assert pictures[1].name == f"row 1 of {path}"
    assert notes == []


def test_rows_can_be_sent_to_other_processes(find, parquet):
    (picture,) = find(parquet(image=["red"], text=["one"]))
    assert rgb_of(pickle.loads(pickle.dumps(picture)), WHITE).size == (4, 3)


def test_columns_are_found_or_named(find, parquet):
    root = parquet(image_a=["red"], image_b=["blue"], short=["one"], long=["two"])
    with pytest.raises(UsageError, match=r"several columns hold pictures \(image_a, image_b\).*data.image_key"):
        find(root)
    with pytest.raises(UsageError, match=r"several columns hold text \(short, long\)"):
        find(root, image_key="image_a")
    (picture,) = find(root, image_key="image_b", caption_key="long")
    assert (picture.caption, rgb_of(picture, WHITE).getpixel((0, 0))) == ("two", (0, 0, 255))
    with pytest.raises(UsageError, match=r"'caption', which is no column; the columns are image_a \(Image\)"):
        find(root, image_key="image_a", caption_key="caption")


def test_columns_of_another_kind(find, parquet):
    root = parquet(image=["red"], number=[3], text=["one"])
    with pytest.raises(UsageError, match=r"data.image_key names 'number', which holds no pictures; the columns are"):
        find(root, image_key="number")
    with pytest.raises(UsageError, match=r"data.caption_key names 'number', which holds int64, and captions are text"):
        find(root, caption_key="number")


def test_no_column_of_pictures(find, parquet):
    with pytest.raises(UsageError, match=r"no column is known to hold pictures; the columns are text \(string\)"):
        find(parquet(text=["one"]))


def test_captions_that_are_missing(find, parquet):
    root = parquet(image=["red", "red"], text=["one", None])
    with pytest.raises(LowrankError, match=r"1 of 2 pictures in .* have no caption \(row 1 of"):
        find(root)
    assert [picture.caption for picture in find(root, caption="x")] == ["one", "x"]


def test_a_table_without_captions(find, parquet):
    root = parquet(image=["red"], label=[1])
    assert find(root, caption="x")[0].caption == "x"


def test_other_splits_are_noted_and_train_is_needed(find, parquet, notes):
    parquet("test", image=["blue"], text=["two"])
    root = parquet(image=["red"], text=["one"])
    assert [picture.caption for picture in find(root)] == ["one"]
    assert notes == [f"of {root} the split train is used (there are train, test)"]
    (root / "train.parquet").rename(root / "validation.parquet")
    with pytest.raises(LowrankError, match=r"has no train split \(found .*\); name the files to train on train"):
        find(root)


def test_a_row_without_a_picture_is_named(find, parquet, notes):
    root = parquet(image=["red", None, "red"], text=["a", "b", "c"])
    pictures, sizes = check_pictures(find(root), 0.5, notes.append)
    assert (len(pictures), sizes) == (2, [(3, 4), (3, 4)])
    assert notes == [f"left out, since it cannot be read: row 1 of {root} (there is none)"]


def test_files_that_are_no_parquet(find, folder):
    root = folder({"train.parquet": b"nothing of the kind"})
    for path in (root, root / "train.parquet"):
        with pytest.raises(LowrankError, match=r"cannot be read as a data set \(.*\); it should hold parquet files"):
            find(path)


def test_a_hub_id_is_announced_before_it_is_downloaded(find, notes, monkeypatch):
    import datasets

    def offline(where):
        assert notes, "announced first"
        raise ConnectionError(f"no way to\n {where}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        LowrankError,
        match=r"data.path some/pictures cannot be read as a data set \(no way to some/pictures\); there is no folder",
    ):
        find("some/pictures")
    assert len(notes) == 1
    assert notes[0].startswith(f"downloading some/pictures from {datasets.config.HF_ENDPOINT}/datasets/some/pictures")


def test_a_hub_data_set_is_read(find, parquet, monkeypatch):
    import datasets

    table = datasets.load_dataset(str(parquet(image=["red"], text=["one"])))
    monkeypatch.setattr(datasets, "load_dataset", lambda where: table)
    assert [picture.caption for picture in find("some/pictures")] == ["one"]


def test_emoji_are_laid_on_the_background(find, shared_data):
    pictures = find(shared_data / "noto_emoji", max_images=3)
    assert len(pictures) == 3
    assert all(picture.caption for picture in pictures)
    pixels = np.asarray(rgb_of(pictures[0], (10, 20, 30)))
    assert pixels.shape == (512, 512, 3)
    assert pixels[0, 0].tolist() == [10, 20, 30]


def test_photographs_of_subjects(find, shared_data, notes):
    pictures = find(shared_data / "dreambooth")
    assert len(pictures) == 21
    assert {picture.caption for picture in pictures} == {
        f"a photo of a {subject}" for subject in ("backpack", "cat", "dog", "teapot")
    }
    assert notes == [
        f"text files of {shared_data / 'dreambooth'} that no picture goes with are left alone: LICENSES.txt"
    ]
    readable, sizes = check_pictures(pictures, 0, notes.append)
    assert len(readable) == 21
    assert all(max(size) <= 1024 for size in sizes)
