"""Pictures of every kind become upright RGB, and broken ones are found before the run begins."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.data.opening import check_pictures, colour_of, rgb_of
from lowrank_diffusion.data.picture import Picture, PictureFile

BLUE = (0, 0, 255)


@dataclass(frozen=True)
class Bytes:
    content: bytes

    def __call__(self) -> Image.Image:
        return Image.open(io.BytesIO(self.content))


def picture(content: bytes | Image.Image, kind: str = "PNG", name: str = "a", **options) -> Picture:
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, kind, **options)
        content = file.getvalue()
    return Picture(name, "a caption", Bytes(content))


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def corner(opened: Picture, background=BLUE) -> tuple[int, ...]:
    image = rgb_of(opened, background)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.fixture
def exif() -> Callable[[int], Image.Exif]:
    def exif(orientation: int) -> Image.Exif:
        made = Image.Exif()
        made[0x0112] = orientation
        return made

    return exif


@pytest.mark.parametrize(
    ("name", "colour"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("hsl(0, 100%, 50%)", (255, 0, 0))]
)
def test_backgrounds(name, colour):
    assert colour_of(name) == colour


@pytest.mark.parametrize("name", ["whitish", "#12", "#11223344", ""])
def test_a_background_that_is_no_plain_colour(name):
    with pytest.raises(
        UsageError, match=rf"data.background is '{name}', which is no plain colour; give a name such as"
    ):
        colour_of(name)


def test_transparency_shows_the_background():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert corner(picture(clear)) == BLUE
    assert corner(picture(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == (255, 0, 0)
    assert corner(picture(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))) == (128, 0, 127)
    assert corner(picture(Image.new("LA", (4, 4), (9, 0)))) == BLUE


def test_a_palette_with_a_clear_colour():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert corner(picture(image, transparency=1)) == BLUE
    assert corner(picture(image, transparency=0)) == (0, 255, 0)
    assert corner(picture(image, "GIF", transparency=1)) == BLUE
    assert corner(picture(image)) == (0, 255, 0)


def test_a_clear_colour_beside_rgb():
    assert corner(picture(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))) == BLUE


def test_sixteen_bit_grey_keeps_its_upper_bits():
    image = Image.fromarray(np.full((4, 4), 0xABCD, dtype=np.uint16))
    assert corner(picture(image)) == (0xAB,) * 3
    assert corner(picture(image, "TIFF")) == (0xAB,) * 3


def test_grey_black_and_white_and_cmyk():
    assert corner(picture(Image.new("L", (4, 4), 7))) == (7, 7, 7)
    assert corner(picture(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert corner(picture(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    assert corner(picture(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[0] > 250


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_turns_pictures_upright(exif, kind, orientation):
    upright = Image.new("RGB", (32, 16), "red")
    upright.paste((0, 255, 0), (0, 0, 16, 16))
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright if turn[orientation] is None else upright.transpose(turn[orientation])
    made = picture(stored, kind, exif=exif(orientation))
    image = rgb_of(made, BLUE)
    assert image.size == (32, 16)
    assert image.getpixel((2, 8))[1] > 200
    assert image.getpixel((30, 8))[0] > 200
    for decode in (True, False):
        assert check_pictures([made], 0, print, decode)[1] == [(16, 32)]


BROKEN = [
    (b"this is text", "no known picture format"),
    (b"", "no known picture format"),
]


@pytest.mark.parametrize(("content", "reason"), BROKEN)
def test_files_that_are_no_pictures_are_named(content, reason):
    with pytest.raises(LowrankError, match=rf"photo.png cannot be read as a picture \({reason}\); mend it"):
        rgb_of(picture(content, name="photo.png"), BLUE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_off_is_found_when_decoded(kind):
    content = picture(noise(), kind).open.content
    cut = picture(content[: len(content) // 2], name="cut")
    with pytest.raises(LowrankError, match="cut cannot be read as a picture"):
        rgb_of(cut, BLUE)
    with pytest.raises(LowrankError, match=r"1 of 1 pictures cannot be read: cut \(.*\); mend them, take them out, or"):
        check_pictures([cut], 0.5, print)


def test_pictures_without_a_range_are_refused():
    floating = picture(Image.new("F", (4, 4), 0.5), "TIFF", name="f.tif")
    with pytest.raises(LowrankError, match=r"f.tif .* \(pixels of mode F have no fixed range\)"):
        rgb_of(floating, BLUE)
    with pytest.raises(LowrankError, match="no fixed range"):
        check_pictures([floating], 0, print, decode=False)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LowrankError, match=r"gone.png cannot be read .*No such file"):
        rgb_of(Picture("gone.png", "", PictureFile(tmp_path / "gone.png")), BLUE)


def test_pillows_limit_of_pixels_holds(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(LowrankError, match=r"bomb .*could be decompression bomb DOS attack"):
        rgb_of(picture(Image.new("RGB", (30, 30)), name="bomb"), BLUE)


def pictures_with_broken(count: int, broken: set[int]) -> list[Picture]:
    fine = picture(Image.new("RGB", (4, 3))).open
    return [Picture(f"{n}.png", "", Bytes(b"no") if n in broken else fine) for n in range(count)]


def test_a_tolerated_share_is_left_out_and_named(notes):
    readable, sizes = check_pictures(pictures_with_broken(10, {2, 5}), 0.2, notes.append)
    assert [p.name for p in readable] == [f"{n}.png" for n in range(10) if n not in {2, 5}]
    assert sizes == [(3, 4)] * 8
    assert notes == [f"left out, since it cannot be read: {n}.png (no known picture format)" for n in (2, 5)]


def test_the_share_is_not_missed_by_rounding(notes):
    assert len(check_pictures(pictures_with_broken(100, set(range(29))), 0.29, notes.append)[0]) == 71


def test_more_than_tolerated_is_an_error_that_names_the_first():
    message = r"7 of 20 pictures cannot be read: 0.png \(no .*, 4.png \(.*\) and 2 more; .* data.tolerated_broken"
    with pytest.raises(LowrankError, match=message):
        check_pictures(pictures_with_broken(20, set(range(7))), 0.3, print)


def test_one_readable_picture_must_be_left():
    with pytest.raises(LowrankError, match="2 of 2 pictures cannot be read"):
        check_pictures(pictures_with_broken(2, {0, 1}), 1.0, print)
