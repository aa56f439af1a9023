"""Which columns hold the pictures and the captions."""

from collections.abc import Mapping

from lowrank_core.errors import UsageError

_USUAL_CAPTIONS = ("text", "caption")

Columns = Mapping[str, str]
"""Each column's kind: `string`, `Image` or whatever else it holds."""


def image_column(columns: Columns, key: str | None) -> str:
    """The column of pictures: `key`, or the one column of type Image.

    Raises:
        UsageError: `key` is no column, or no or several columns are of type Image.
    """
    if key is not None:
        return _existing(columns, key, "data.image_key")
    found = [name for name, kind in columns.items() if kind == "Image"]
    if len(found) != 1:
        raise UsageError(
            f"{_count(found, 'pictures')}; the columns are {described(columns)}; "
            "set data.image_key to the column of pictures"
        )
    return found[0]


def caption_column(columns: Columns, key: str | None) -> str | None:
    """The column of captions: `key`, else `text`, else `caption`, else the only one that holds text.

    None where no column holds text, so that `data.caption` may stand for it.

    Raises:
        UsageError: `key` is no column of text, or several columns could be meant.
    """
    if key is not None:
        kind = columns[_existing(columns, key, "data.caption_key")]
        if kind != "string":
            raise UsageError(
                f"data.caption_key names {key!r}, which holds {kind}, and captions are text; "
                f"the columns are {described(columns)}"
            )
        return key
    found = [name for name, kind in columns.items() if kind == "string"]
    usual = next((name for name in _USUAL_CAPTIONS if name in found), None)
    if usual is None and len(found) > 1:
        raise UsageError(
            f"{_count(found, 'text')}; the columns are {described(columns)}; "
            "set data.caption_key to the column of captions"
        )
    return usual or next(iter(found), None)


def described(columns: Columns) -> str:
    """`image (Image), text (string)`."""
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def _existing(columns: Columns, key: str, option: str) -> str:
    if key not in columns:
        raise UsageError(f"{option} names {key!r}, which is no column; the columns are {described(columns)}")
    return key


def _count(found: list[str], what: str) -> str:
    return f"several columns hold {what} ({', '.join(found)})" if found else f"no column is known to hold {what}"
