"""Which columns of a Hugging Face data set hold the pictures, the labels and the makers."""

from typing import Any

from lowrank_core.errors import UsageError

# CIFAR-100 is published with its 20 superclasses beside the 100 classes that give it its name.
_USUAL_LABEL = {"cifar100": "fine_label"}


def image_column(features: Any, key: str | None) -> str:
    """The column of pictures: `key`, or the one column of type Image.

    Raises:
        UsageError: `key` is no column, or no or several columns are of type Image.
    """
    if key is not None:
        return _existing(features, key, "data.image_key")
    found = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if len(found) != 1:
        raise UsageError(
            f"{_count(found, 'pictures')}; the columns are {_described(features)}; "
            "set data.image_key to the column of pictures"
        )
    return found[0]


def text_column(features: Any, key: str) -> str:
    """The column of texts, `key`.

    Raises:
        UsageError: `key` is no column, or none of texts.
    """
    kind = str(getattr(features[_existing(features, key, "data.text_key")], "dtype", ""))
    if not kind.endswith("string"):
        raise UsageError(f"data.text_key names {key!r}, which holds no texts; the columns are {_described(features)}")
    return key


def label_column(features: Any, key: str | None, name: str) -> str:
    """The column of labels: `key`, or the one column of type ClassLabel.

    `name` is the data set's; where it says which of several labels is meant, that one is taken.

    Raises:
        UsageError: `key` is no column of class names or whole numbers, or no or several columns are of type ClassLabel.
    """
    if key is not None:
        feature = features[_existing(features, key, "data.label_key")]
        if type(feature).__name__ != "ClassLabel" and not str(feature.dtype).startswith(("int", "uint", "string")):
            raise UsageError(
                f"data.label_key names {key!r}, which holds {feature.dtype}; labels are class names or whole "
                f"numbers; the columns are {_described(features)}"
            )
        return key
    found = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    if _USUAL_LABEL.get(name) in found:
        return _USUAL_LABEL[name]
    if len(found) != 1:
        raise UsageError(
            f"{_count(found, 'class labels')}; the columns are {_described(features)}; "
            "set data.label_key to the column of labels"
        )
    return found[0]


def maker_column(features: Any, key: str | None) -> str:
    """The column that says who made an example, for a natural partition.

    Raises:
        UsageError: `key` is not given or is no column.
    """
    if key is None:
        raise UsageError(
            "partition.kind=natural needs partition.id_column, the column that says who made each example; "
            f"the columns are {_described(features)}"
        )
    return _existing(features, key, "partition.id_column")


def _existing(features: Any, key: str, option: str) -> str:
    if key not in features:
        raise UsageError(f"{option} names {key!r}, which is no column; the columns are {_described(features)}")
    return key


def _count(found: list[str], what: str) -> str:
    return f"several columns hold {what} ({', '.join(found)})" if found else f"no column is known to hold {what}"


def _described(features: Any) -> str:
    """`img (Image), label (ClassLabel), writer (string)`."""
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())


def _kind(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind
