"""Image and text classification data sets in Hugging Face's form: a local folder, or a hub id."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_core.errors import LowrankError, UsageError
from lowrank_fl.config import DataConfig, PartitionConfig
from lowrank_fl.data.cache import logger
from lowrank_fl.data.columns import image_column, label_column, maker_column, text_column
from lowrank_fl.data.examples import Examples
from lowrank_fl.data.labels import number_classes
from lowrank_fl.data.pictures import PictureRows, decode_splits
from lowrank_fl.data.pixels import picture_examples
from lowrank_fl.data.rows import held_out, kept_rows
from lowrank_fl.data.texts import text_examples

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# How the reader says that a split has no rows.
_NO_DATA = re.compile(r'Instruction "(\w+)" corresponds to no data')


def load_folder(data: DataConfig, partition: PartitionConfig, seed: int) -> Examples:
    """Examples from `data.path`: parquet files in the hub's layout, or class folders of pictures.

    The test examples are the split `test`, else `validation`, else every fifth training example
    of each class; none of the last where clients hold examples out themselves. Classes are those
    that occur in training. With `data.text_key` the inputs are the tokens of texts, `(n, tokens)`.

    Raises:
        UsageError: no columns, or several, could be meant.
        LowrankError: there is nothing to read, a split is empty, or a picture is broken.
    """
    assert data.path is not None, "load_examples comes here with a path"
    splits = _read(data.path)
    train, test = _train_and_test(splits, data.path)
    features = splits[train].features
    text = None if data.text_key is None else text_column(features, data.text_key)
    column = image_column(features, data.image_key) if text is None else text
    label = label_column(features, data.label_key, data.name)
    maker = maker_column(features, partition.id_column) if partition.kind == "natural" else None
    names = getattr(features[label], "names", None)

    train_values, test_values = (_values(splits, split, label, data.path) for split in (train, test or train))
    train_labels, test_labels, classes = number_classes(train_values, test_values, names)
    train_rows, test_rows = np.arange(len(train_labels)), np.arange(len(test_labels))
    if test is None and partition.held_out:
        test, test_rows = train, test_rows[:0]
    elif test is None:
        test, mask = train, held_out(train_labels)
        train_rows, test_rows = np.flatnonzero(~mask), np.flatnonzero(mask)
        if len(test_rows) == 0:
            raise LowrankError(
                f"{data.path} has no test split, and none of its {len(classes)} classes has the 5 examples that "
                "holding one out for testing takes; add a folder or file named test"
            )
        logger.info("%s has no test split: every fifth example of each class is held out for testing", data.path)
    train_rows = train_rows[kept_rows(len(train_rows), data.max_examples, seed)]

    groups = None
    if maker is not None:
        # Objects, because an array of fixed-width text takes as much for "a" as for the longest name.
        groups = np.array([str(value) for value in _values(splits, train, maker, data.path)], dtype=object)[train_rows]
    kept = ((train, train_rows), (test, test_rows))
    train_labels, test_labels = train_labels[train_rows], test_labels[test_rows]
    if text is not None:
        texts = [
            [str(value) for value in _select(splits, split, column, data.path)[rows][column]] for split, rows in kept
        ]
        return text_examples(data, (texts[0], train_labels), (texts[1], test_labels), classes, groups)
    pixels, test_pixels = decode_splits(
        [
            PictureRows(_undecoded(splits, split, column, data.path), column, split, rows, data.path)
            for split, rows in kept
        ]
    )
    return picture_examples(data.name, (pixels, train_labels), (test_pixels, test_labels), classes, groups)


def _read(path: str) -> Any:
    """The `datasets.DatasetDict` at a folder or hub id."""
    folder = Path(path).expanduser()
    local = folder.is_dir()
    if local:
        where = str(folder.resolve())
        hint = "it should hold parquet files, or folders of pictures named by class"
    elif folder.exists():
        raise UsageError(f"data.path is {path}, a file; it takes the folder that holds the data set")
    elif _HUB_ID.fullmatch(path):
        where = path
        hint = f"there is no folder {path} here either"
    else:
        raise LowrankError(
            f"data.path is {path}, and there is no such folder; give an existing folder, or a hub id such as "
            "uoft-cs/cifar10"
        )

    # datasets takes seconds to import.
    import datasets
    from datasets import config

    if not local:
        logger.info(
            "Downloading %s from https://huggingface.co/datasets/%s into %s, unless it is there already",
            path,
            path,
            config.HF_DATASETS_CACHE,
        )
    try:
        with _no_progress_bars():
            return datasets.load_dataset(where)
    # Whatever the reader stumbles over lies in the files or the network, which only the user can mend.
    except Exception as error:
        reason = " ".join(str(error).split())
        if empty := _NO_DATA.search(reason):
            raise _empty(empty[1], path) from error
        raise LowrankError(f"data.path {path} cannot be read as a data set ({reason}); {hint}") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silences the reader's own bars, and gives them back to who wanted them."""
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown, hub_shown = not datasets.are_progress_bars_disabled(), not are_progress_bars_disabled()
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        if hub_shown:
            enable_progress_bars()


def _train_and_test(splits: Any, path: str) -> tuple[str, str | None]:
    """The names of the training and the testing split; None where the latter must be held out."""
    if "train" not in splits:
        raise LowrankError(
            f"{path} has no train split (found {', '.join(splits)}); name the folder or file of training examples train"
        )
    test = next((name for name in ("test", "validation") if name in splits), None)
    for name in filter(None, ("train", test)):
        if len(splits[name]) == 0:
            raise _empty(name, path)
    return "train", test


def _empty(split: str, path: str) -> LowrankError:
    return LowrankError(f"the {split} split of {path} is empty; add examples to it, or remove its file or folder")


def _select(splits: Any, split: str, column: str, path: str) -> Any:
    """One split with one column."""
    dataset = splits[split]
    if column not in dataset.features:
        raise LowrankError(
            f"the {split} split of {path} lacks the column {column} that the train split has "
            f"(found {', '.join(dataset.features)}); both splits need the same columns"
        )
    return dataset.select_columns([column])


def _values(splits: Any, split: str, column: str, path: str) -> list[Any]:
    return _select(splits, split, column, path)[:][column]


def _undecoded(splits: Any, split: str, column: str, path: str) -> Any:
    """The pictures as the files' bytes or paths, so that we decode and say which row is broken."""
    import datasets

    selected = _select(splits, split, column, path)
    try:
        return selected.cast_column(column, datasets.Image(decode=False))
    # The last is pyarrow's way to say that numbers are no pictures.
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(
            f"data.image_key names {column!r}, which holds no pictures ({selected.features[column]}); "
            f"the columns are {', '.join(splits[split].features)}"
        ) from error
