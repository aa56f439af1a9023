"""Folders of picture files, captioned by text files of the same name or by metadata."""

import os
from collections.abc import Sequence
from pathlib import Path

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.data.metadata import METADATA, metadata_captions
from lowrank_diffusion.data.picture import Note, Picture, PictureFile, first_of

PICTURE_ENDINGS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


_MASK = "-masklabel.png"
"""How OneTrainer ends the name of a picture's mask."""


def files_below(folder: Path) -> list[Path]:
    """Every file in it and in its folders, relative to it and in order; none that is hidden."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder)
        found += [inside / name for name in files if not name.startswith(".")]
    return sorted(found)


def folder_pictures(folder: Path, files: Sequence[Path], data: DataConfig, note: Note) -> list[Picture]:
    """One picture for each of `files` that is one; its caption is empty where nothing captions it.

    `a-masklabel.png` is no picture but the mask of `a`.
    Metadata goes before a text file. A text file without a picture is noted only, since it may be
    a licence; metadata about a missing picture is an error.

    Raises:
        UsageError: keys are given that a folder has not, or several columns could hold captions.
        LowrankError: a metadata or text file cannot be read, or metadata names a picture that is not there.
    """
    masks = {file.with_name(file.name.removesuffix(_MASK)): file for file in files if file.name.endswith(_MASK)}
    pictures = [file for file in files if file.suffix.lower() in PICTURE_ENDINGS and not file.name.endswith(_MASK)]
    metadata = [file for file in files if file.name in METADATA]
    if data.image_key is not None:
        raise UsageError(
            f"data.image_key is {data.image_key!r}, but {data.path} is a folder of picture files; leave the key out"
        )
    if data.caption_key is not None and not metadata:
        raise UsageError(
            f"data.caption_key is {data.caption_key!r}, but {data.path} has no metadata.jsonl with such a column; "
            "leave the key out, or write that file"
        )

    captions = _text_captions(folder, files, pictures, note)
    for file in metadata:
        captions |= metadata_captions(folder, file, set(pictures), data.caption_key)
    return [
        Picture(
            file.as_posix(),
            captions.get(file, ""),
            PictureFile(folder / file),
            None if mask is None else Picture(mask.as_posix(), "", PictureFile(folder / mask)),
        )
        for file in pictures
        for mask in [masks.get(file.with_suffix(""))]
    ]


def _text_captions(folder: Path, files: Sequence[Path], pictures: Sequence[Path], note: Note) -> dict[Path, str]:
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    alone = sorted(texts.keys() - {file.with_suffix("") for file in pictures})
    if alone:
        names = first_of([texts[stem].as_posix() for stem in alone])
        note(f"text files of {folder} that no picture goes with are left alone: {names}")
    return {file: _text(folder / texts[stem]) for file in pictures if (stem := file.with_suffix("")) in texts}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LowrankError(f"the caption {path} cannot be read ({error}); it should be text in UTF-8") from error
