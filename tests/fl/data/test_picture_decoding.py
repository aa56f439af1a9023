"""Colour modes, sizes and broken files."""

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from lowrank_core.errors import LowrankError
from lowrank_fl.data.pictures import PictureRows, decode_splits


def encoded(picture: Pillow.Image, format: str = "PNG", **options) -> dict:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


def one_colour(mode, color, size=(3, 2)) -> dict:
    return encoded(Pillow.new(mode, size, color))


def rows_of(pictures: list, rows=None) -> PictureRows:
    dataset = Dataset.from_dict({"image": pictures}, features=Features({"image": Image(decode=False)}))
    return PictureRows(dataset, "image", "train", np.arange(len(pictures)) if rows is None else rows, "FOLDER")


def decode(*pictures) -> np.ndarray:
    return decode_splits([rows_of(list(pictures))])[0]


def test_colour_pictures_get_three_channels_and_keep_their_bytes():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    decoded = decode(encoded(Pillow.fromarray(pixels)))
    assert decoded.shape == (1, 3, 2, 3)
    assert np.array_equal(decoded[0].transpose(1, 2, 0), pixels)


def test_grey_pictures_keep_one_channel():
    assert decode(one_colour("L", 7), one_colour("L", 9))[:, 0, 0, 0].tolist() == [7, 9]


def test_black_and_white_pictures_are_grey():
    assert decode(one_colour("1", 1))[0].tolist() == [[[255] * 3] * 2]


def test_sixteen_bit_grey_keeps_its_upper_eight_bits():
    picture = encoded(Pillow.fromarray(np.full((2, 3), 0xAB12, dtype=np.uint16)))
    assert decode(picture)[0, 0, 0, 0] == 0xAB


def test_palette_pictures_become_colour():
    picture = Pillow.new("RGB", (3, 2), (200, 0, 0)).convert("P", palette=Pillow.Palette.ADAPTIVE)
    assert decode(encoded(picture))[0, :, 0, 0].tolist() == [200, 0, 0]


def test_what_shows_through_is_laid_on_white():
    clear, half = one_colour("RGBA", (200, 0, 0, 0)), one_colour("RGBA", (0, 0, 0, 128))
    assert decode(clear, half)[:, :, 0, 0].tolist() == [[255, 255, 255], [127, 127, 127]]


def test_grey_with_alpha_stays_grey():
    assert decode(one_colour("LA", (0, 0)), one_colour("LA", (50, 255)))[:, 0, 0, 0].tolist() == [255, 50]


def test_grey_among_colour_becomes_colour():
    decoded = decode(one_colour("L", 9), one_colour("RGB", (1, 2, 3)))
    assert decoded[:, :, 0, 0].tolist() == [[9, 9, 9], [1, 2, 3]]


def test_sizes_become_the_most_common_one():
    decoded = decode(one_colour("L", 1, (9, 9)), one_colour("L", 2, (4, 6)), one_colour("L", 3, (4, 6)))
    assert decoded.shape == (3, 1, 6, 4)
    assert decoded[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_all_splits_get_one_shape():
    train, test = decode_splits([rows_of([one_colour("L", 1)]), rows_of([one_colour("RGB", (1, 2, 3), (7, 7))])])
    assert train.shape == test.shape == (1, 3, 2, 3)


def test_photographs_stand_upright():
    picture = Pillow.new("L", (4, 2))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode(encoded(picture, "JPEG", exif=exif)).shape == (1, 1, 4, 2)


@pytest.mark.slow
def test_large_pictures_decoded_by_several_threads_stay_in_order():
    pictures = [one_colour("L", number % 256, (256, 128)) for number in range(600)]
    assert decode(*pictures)[:, 0, 0, 0].tolist() == [number % 256 for number in range(600)]


def test_pictures_named_by_path_are_opened(tmp_path: Path):
    Pillow.new("L", (3, 2), 5).save(tmp_path / "a.png")
    assert decode({"bytes": None, "path": str(tmp_path / "a.png")})[0, 0, 0, 0] == 5


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"bytes": b"no picture at all", "path": None}, "no known picture format"),
        ({"bytes": b"", "path": None}, "no known picture format"),
        (None, "there is none"),
        ({"bytes": encoded(Pillow.effect_noise((64, 64), 90))["bytes"][:900], "path": None}, "truncated"),
        ({"bytes": None, "path": "gone.png"}, "No such file"),
        (encoded(Pillow.new("F", (3, 2)), "TIFF"), "pixels of mode F have no fixed range"),
    ],
)
def test_a_broken_picture_is_named_by_its_row(broken, reason):
    good = one_colour("L", 1, (64, 64))
    pictures = rows_of([good, good, broken, good], rows=np.array([1, 2, 3]))
    with pytest.raises(LowrankError, match=rf"row 2 of the train split of FOLDER .*\({reason}|row 2 .*{reason}"):
        decode_splits([pictures])


def test_a_broken_picture_in_a_folder_is_named(load, tmp_path, write_parquet):
    features = {"image": Image(), "label": ClassLabel(names=["a"]), "who": Value("string")}
    columns = {"image": [one_colour("L", 1), {"bytes": b"?", "path": None}], "label": [0, 0], "who": ["x", "y"]}
    write_parquet(tmp_path / "data" / "train.parquet", {k: v[:1] for k, v in columns.items()}, features)
    write_parquet(tmp_path / "data" / "test.parquet", columns, features)
    with pytest.raises(LowrankError, match=r"row 1 of the test split of .*data holds a picture that cannot be decoded"):
        load(name="mine", path=tmp_path / "data")
