"""The pictures that a configuration names, wherever they come from."""

import random
import re
from dataclasses import replace
from pathlib import Path

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.data.folder import PICTURE_ENDINGS, files_below, folder_pictures
from lowrank_diffusion.data.picture import Note, Picture, first_of
from lowrank_diffusion.data.quickstart import quickstart_pictures
from lowrank_diffusion.data.table import table_pictures
from lowrank_diffusion.seeds import derive_seed

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_pictures(data: DataConfig, seed: int, note: Note) -> list[Picture]:
    """Every picture at `data.path` with its caption, in an order that depends on names alone.

    `data.path` is looked up as `quickstart`, as a local folder or file, and only then as a hub id.
    In a folder that holds picture files these are taken, otherwise its parquet files. No picture
    is opened.

    Raises:
        UsageError: no columns, or several, could be meant.
        LowrankError: there is nothing to read, or captions are missing.
    """
    pictures = _captioned(_found(data, note), data)
    if data.max_images is not None and data.max_images < len(pictures):
        kept = random.Random(derive_seed(seed, "max_images")).sample(range(len(pictures)), data.max_images)
        pictures = [pictures[number] for number in sorted(kept)]
    return pictures


def _found(data: DataConfig, note: Note) -> list[Picture]:
    if data.path == "quickstart":
        return quickstart_pictures(data.resolution)
    path = Path(data.path).expanduser()
    if path.is_dir():
        files = files_below(path)
        endings = {file.suffix.lower() for file in files}
        if endings.intersection(PICTURE_ENDINGS):
            return folder_pictures(path, files, data, note)
        if ".parquet" in endings:
            return table_pictures(str(path.resolve()), data, note)
        found = f"only {first_of(sorted(endings - {''}) or ['files without an ending'])}" if files else "nothing"
        raise LowrankError(
            f"the folder {data.path} holds no pictures and no parquet files (found {found}); "
            f"pictures end in {', '.join(PICTURE_ENDINGS)}"
        )
    if path.suffix.lower() == ".parquet" and path.is_file():
        return table_pictures(str(path.resolve()), data, note)
    if path.exists():
        raise UsageError(f"data.path is {data.path}, a file; it takes a folder of pictures or a parquet file")
    if _HUB_ID.fullmatch(data.path):
        return table_pictures(data.path, data, note, hub=True)
    raise LowrankError(
        f"data.path is {data.path}, and there is no such folder; give an existing folder, a parquet file, "
        "a hub id such as lambdalabs/naruto-blip-captions, or quickstart"
    )


def _captioned(pictures: list[Picture], data: DataConfig) -> list[Picture]:
    """White space is made plain, and `data.caption` stands where there is nothing else."""
    if not pictures:
        raise LowrankError(f"{data.path} holds no pictures: its table is empty; add rows to it")
    spare = " ".join((data.caption or "").split())
    pictures = [replace(picture, caption=" ".join(picture.caption.split()) or spare) for picture in pictures]
    missing = [picture.name for picture in pictures if not picture.caption]
    if missing:
        raise LowrankError(
            f"{len(missing)} of {len(pictures)} pictures in {data.path} have no caption ({first_of(missing)}); "
            "write what they show, or give all of them one: -o data.caption='a photo of ...'"
        )
    return pictures
