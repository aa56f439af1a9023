"""Captioned pictures in parquet or on the Hugging Face hub, read by `datasets`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.data.columns import caption_column, described, image_column
from lowrank_diffusion.data.picture import Note, Picture


@dataclass(frozen=True)
class PictureRow:
    """Opens one row of a `datasets.Dataset` whose `column` is `{bytes, path}`."""

    dataset: Any
    column: str
    row: int

    def __call__(self) -> Image.Image:
        stored = self.dataset[self.row][self.column]
        if stored is None:
            raise ValueError("there is none")
        return Image.open(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"]))


def table_pictures(where: str, data: DataConfig, note: Note, hub: bool = False) -> list[Picture]:
    """One picture for each row of the split `train`, or of the only split.

    Args:
        where: A folder or file of parquet, or a hub id.
        data: Its keys name the columns, which are found by their types otherwise.
        note: Is told of a download before it begins.
        hub: Whether `where` is a hub id.

    Raises:
        UsageError: no columns, or several, could be meant.
        LowrankError: nothing can be read or downloaded, or there is no split to train on.
    """
    splits = _load(where, data.path, note, hub)
    split = "train" if "train" in splits else next(iter(splits))
    if len(splits) > 1:
        if split != "train":
            raise LowrankError(
                f"{data.path} has no train split (found {', '.join(splits)}); name the files to train on train"
            )
        note(f"of {data.path} the split train is used (there are {', '.join(splits)})")
    table = splits[split]

    kinds = {name: _kind(feature) for name, feature in table.features.items()}
    image, caption = image_column(kinds, data.image_key), caption_column(kinds, data.caption_key)
    captions = table.select_columns([caption])[:][caption] if caption else [None] * len(table)
    stored = _undecoded(table, image, described(kinds))
    return [
        Picture(f"row {row} of {data.path}", text or "", PictureRow(stored, image, row))
        for row, text in enumerate(captions)
    ]


def _load(where: str, path: str, note: Note, hub: bool) -> Any:
    # datasets takes seconds to import.
    import datasets
    from datasets import config

    if hub:
        note(
            f"downloading {where} from {config.HF_ENDPOINT}/datasets/{where} into {config.HF_DATASETS_CACHE}, "
            "unless it is there already"
        )
    try:
        with _no_progress_bars():
            if where.lower().endswith(".parquet") and not hub:
                return datasets.load_dataset("parquet", data_files=where)
            return datasets.load_dataset(where)
    # Whatever the reader stumbles over lies in the files or the network, which only the user can mend.
    except Exception as error:
        reason = " ".join(str(error).split())
        hint = f"there is no folder {path} here either" if hub else "it should hold parquet files with pictures"
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


def _undecoded(table: Any, column: str, columns: str) -> Any:
    """The files' bytes or paths, so that we decode and say which row is broken."""
    import datasets

    try:
        return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    # The last is pyarrow's way to say that numbers are no pictures.
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(
            f"data.image_key names {column!r}, which holds no pictures; the columns are {columns}"
        ) from error


def _kind(feature: Any) -> str:
    kind = type(feature).__name__
    if kind != "Value":
        return kind
    return "string" if str(feature.dtype) in ("string", "large_string") else str(feature.dtype)
