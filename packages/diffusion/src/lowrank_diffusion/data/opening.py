"""Pictures of any kind as upright RGB."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.data.picture import Note, Picture, Size, first_of

Colour = tuple[int, int, int]


def colour_of(background: str) -> Colour:
    """`data.background` as red, green and blue from 0 to 255.

    Raises:
        UsageError: it is no colour, or one that is transparent itself.
    """
    try:
        colour = ImageColor.getrgb(background)
    except ValueError:
        colour = ()
    if len(colour) != 3:
        raise UsageError(
            f"data.background is {background!r}, which is no plain colour; give a name such as white, or #rrggbb"
        )
    return colour


def rgb_of(picture: Picture, background: Colour) -> Image.Image:
    """The picture upright (by its EXIF orientation), laid on `background` where it is transparent.

    16-bit grey keeps its upper 8 bits; of an animation the first frame is taken.

    Raises:
        LowrankError: the picture, which it names, cannot be decoded or has more pixels than Pillow allows.
    """
    try:
        with picture.open() as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _flattened(image, background)
    # Pillow's plugins raise errors of every kind for broken files.
    except Exception as error:
        raise LowrankError(
            f"{picture.name} cannot be read as a picture ({_reason(error)}); mend it or take it out"
        ) from error


def has_alpha(picture: Picture) -> bool:
    """Whether a picture may be transparent somewhere; its header says so."""
    with picture.open() as image:
        return image.has_transparency_data


def alpha_of(picture: Picture) -> Image.Image | None:
    """How opaque each pixel of the upright picture is, in mode L; None where the picture has no alpha channel."""
    with picture.open() as image:
        if not image.has_transparency_data:
            return None
        ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGBA").getchannel("A")


def check_pictures(
    pictures: Sequence[Picture], tolerated: float, note: Note, decode: bool = True
) -> tuple[list[Picture], list[Size]]:
    """The pictures that can be read, and the height and width of each when upright.

    Args:
        pictures: Any number of them, all of which are opened.
        tolerated: The share of them that may be broken; these are left out.
        note: Is told of each that is left out.
        decode: Whether every pixel is decoded, since a file that is cut off shows it only then.
            Otherwise headers alone are read.

    Raises:
        LowrankError: more are broken, or no picture is left.
    """

    def look(picture: Picture) -> Size | str:
        try:
            return _size(picture, decode)
        except Exception as error:  # as in rgb_of
            return _reason(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(look, pictures))
    broken = [f"{p.name} ({reason})" for p, reason in zip(pictures, found, strict=True) if isinstance(reason, str)]
    # Rounded, because 0.29 * 100 is below 29.
    if broken and (len(broken) > round(tolerated * len(pictures), 9) or len(broken) == len(pictures)):
        raise LowrankError(
            f"{len(broken)} of {len(pictures)} pictures cannot be read: {first_of(broken)}; mend them, take them out, "
            "or set data.tolerated_broken to the share that may be left out"
        )
    for name in broken:
        note(f"left out, since it cannot be read: {name}")
    readable = [(p, size) for p, size in zip(pictures, found, strict=True) if not isinstance(size, str)]
    return [p for p, _ in readable], [size for _, size in readable]


def _size(picture: Picture, decode: bool) -> Size:
    with picture.open() as image:
        width, height = image.size
        _refuse_without_range(image)
        # A TIFF's size is that of the upright picture already.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        if decode:
            # JPEG decodes an eighth of each side much faster, and meets the same faults.
            image.draft(None, (width // 8, height // 8))
            image.load()
    return (width, height) if turned else (height, width)


def _flattened(image: Image.Image, background: Colour) -> Image.Image:
    _refuse_without_range(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _refuse_without_range(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")


def _reason(error: Exception) -> str:
    # Pillow's own message for bytes that it does not know shows the address of a buffer.
    return "no known picture format" if isinstance(error, UnidentifiedImageError) else str(error)
