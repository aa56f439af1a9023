"""Picture files decoded into one array of bytes."""

import io
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lowrank_core.errors import LowrankError

Shape = tuple[int, int, int]
"""Channels (1 or 3), height, width."""

_BATCH = 250
_GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")
# Below this many pixels a picture is mostly Python work, which threads only slow down
# (60,000 of CIFAR-10: 5.3 s with one thread, 6.8 s with two).
_WORTH_A_THREAD = 128 * 128


@dataclass(frozen=True)
class PictureRows:
    """Undecoded pictures of one split: `rows` of a `datasets.Dataset` whose `column` is `{bytes, path}`."""

    dataset: Any
    column: str
    split: str
    rows: np.ndarray
    source: str
    """The folder or hub id, for messages."""

    def batch(self, start: int) -> list[Any]:
        """The pictures at the places from `start` on, `_BATCH` of them or what is left."""
        return self.dataset[self.rows[start : start + _BATCH]][self.column]

    @property
    def starts(self) -> range:
        return range(0, len(self.rows), _BATCH)

    def open(self, place: int, picture: Any) -> Image.Image:
        """The picture, upright; of most formats only the header is read.

        Raises:
            LowrankError: this row, which it names, is no picture that Pillow reads.
        """
        try:
            if picture is None:
                raise ValueError("there is none")
            image = Image.open(picture["path"] if picture["bytes"] is None else io.BytesIO(picture["bytes"]))
            ImageOps.exif_transpose(image, in_place=True)
            return image
        except Exception as error:
            raise self.broken(place, error) from error

    def broken(self, place: int, error: Exception) -> LowrankError:
        # Pillow's own message for bytes that it does not know shows the address of a buffer.
        reason = "no known picture format" if isinstance(error, UnidentifiedImageError) else error
        return LowrankError(
            f"row {self.rows[place]} of the {self.split} split of {self.source} holds a picture that cannot be "
            f"decoded ({reason}); mend or remove that picture"
        )


def decode_splits(splits: Sequence[PictureRows]) -> list[np.ndarray]:
    """For each split, uint8 `(n, channels, height, width)`; all splits get one shape.

    The channels are 1 where every picture is grey, else 3. Where sizes differ, all are resized
    to the most common. What shows through (alpha) is laid on white; 16-bit grey keeps its upper
    8 bits.

    Raises:
        LowrankError: a row cannot be decoded, of which it names the first.
    """
    shape = _shape(splits[0].open(0, splits[0].batch(0)[0]))
    try:
        return [_decode(split, shape, resize=False) for split in splits]
    except _AnotherShapeError:
        # Rare, so that the usual data set is opened once and not twice.
        shape = _common_shape(splits)
        return [_decode(split, shape, resize=True) for split in splits]


class _AnotherShapeError(Exception):
    """A picture differs from the first."""


def _common_shape(splits: Sequence[PictureRows]) -> Shape:
    sizes: Counter[tuple[int, int]] = Counter()
    channels = 1
    for split in splits:
        for start in split.starts:
            for place, picture in enumerate(split.batch(start), start):
                depth, height, width = _shape(split.open(place, picture))
                channels = max(channels, depth)
                sizes[height, width] += 1
    return (channels, *sizes.most_common(1)[0][0])


def _decode(split: PictureRows, shape: Shape, resize: bool) -> np.ndarray:
    pixels = np.empty((len(split.rows), *shape), dtype=np.uint8)

    def fill(start: int) -> None:
        for place, picture in enumerate(split.batch(start), start):
            image = split.open(place, picture)
            if not resize and _shape(image) != shape:
                raise _AnotherShapeError
            try:
                pixels[place] = to_array(image, shape)
            except Exception as error:
                raise split.broken(place, error) from error

    workers = 1 if shape[1] * shape[2] < _WORTH_A_THREAD else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        # `map` raises the first row's error first, whatever the threads' order.
        for _ in pool.map(fill, split.starts):
            pass
    return pixels


def _shape(image: Image.Image) -> Shape:
    return (1 if image.mode in _GREY_MODES else 3, image.height, image.width)


def to_array(image: Image.Image, shape: Shape) -> np.ndarray:
    """Bytes of the given shape: transparent pixels on white, 16-bit grey by its upper 8 bits, resized if need be."""
    channels, height, width = shape
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
