"""metadata.jsonl and metadata.csv, the Hugging Face way to caption the pictures of a folder."""

import csv
import os
from pathlib import Path
from typing import Any

from lowrank_core.errors import LowrankError
from lowrank_core.parsing import parse_json
from lowrank_diffusion.data.columns import caption_column
from lowrank_diffusion.data.picture import first_of

METADATA = ("metadata.jsonl", "metadata.csv")
_FILE = "file_name"


def metadata_captions(folder: Path, file: Path, pictures: set[Path], key: str | None) -> dict[Path, str]:
    """The captions that one metadata file gives, by picture.

    Args:
        folder: What `file` and `pictures` are relative to; `file_name` in the metadata is relative
            to the metadata's own folder.
        key: The column of captions, found by its name or type where not given.

    Raises:
        UsageError: `key` is no column, or several could be meant.
        LowrankError: the file cannot be read, a row names no file, or the file named is no picture there.
    """
    rows = _rows(folder / file)
    named: list[Path] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(_FILE), str):
            raise LowrankError(
                f"row {number} of {folder / file} has no {_FILE} (found {first_of(list(row)) or 'nothing'}); "
                "each row names a picture and its caption"
            )
        named.append(Path(os.path.normpath(file.parent / row[_FILE])))
    if missing := [name.as_posix() for name in named if name not in pictures]:
        raise LowrankError(
            f"{folder / file} names {len(missing)} files that are no pictures in that folder ({first_of(missing)}); "
            "add them, or take their rows out"
        )

    column = caption_column(_columns(rows), key)
    if column is None:
        return {}
    return {name: row.get(column) or "" for name, row in zip(named, rows, strict=True)}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LowrankError(f"{path} cannot be read ({error}); it should be text in UTF-8") from error
    if path.suffix == ".csv":
        try:
            return list(csv.DictReader(text.splitlines(), restkey=""))
        except csv.Error as error:
            raise LowrankError(f"{path} is no CSV ({error}); each line is one row") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise LowrankError(f"line {number} of {path} is no JSON ({error}); each line is one object") from error
        if not isinstance(row, dict):
            raise LowrankError(f"line {number} of {path} is {line.strip()[:40]}, and each line is one object")
        rows.append(row)
    return rows


def _columns(rows: list[dict[str, Any]]) -> dict[str, str]:
    """`string` for the columns that hold text alone, as far as they hold anything."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None and name != _FILE:
                kinds.setdefault(name, set()).add("string" if isinstance(value, str) else type(value).__name__)
    return {name: " or ".join(sorted(found)) for name, found in kinds.items()}
