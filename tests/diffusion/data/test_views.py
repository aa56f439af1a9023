"""Cuts show the pixels that their time ids say, and depend on seed, step and place alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lowrank_core.errors import LowrankError
from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.data.picture import Picture
from lowrank_diffusion.data.views import View, Views, pixels_of, resized

WHITE = (255, 255, 255)


def shown(image: Image.Image) -> Picture:
    return Picture("a.png", "a caption", image.copy)


def views(sizes, seed: int = 0, **data) -> Views:
    return Views(sizes, DataConfig(**{"resolution": 64, "bucket_step": 16} | data), seed)


def noise(height: int, width: int) -> Image.Image:
    # Of little contrast, because the filter overshoots and Pillow clips between its two passes.
    return Image.fromarray(np.random.default_rng(1).integers(100, 156, (height, width, 3), dtype=np.uint8))


def test_a_marked_pixel_lands_where_the_crop_says():
    image = Image.new("RGB", (96, 64), "black")
    image.putpixel((70, 20), (255, 255, 255))
    # The height fits, so nothing is resized: 32 columns are spare.
    straight = pixels_of(shown(image), View(0, 64, 64, (64, 96), 0, 24), WHITE)
    assert straight.shape == (3, 64, 64)
    assert straight.dtype == torch.float32
    assert (straight == 1).nonzero().tolist() == [[channel, 20, 70 - 24] for channel in range(3)]
    assert straight.sum() == 3 * (2 - 64 * 64)
    mirrored = pixels_of(shown(image), View(0, 64, 64, (64, 96), 0, 24, flipped=True), WHITE)
    # Mirrored first: column 70 of 96 becomes 25, and the cut begins at 24.
    assert (mirrored == 1).nonzero().tolist() == [[channel, 20, 25 - 24] for channel in range(3)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(20, 200), st.integers(20, 200), st.booleans(), st.integers(0, 30))
def test_pixels_are_those_of_resizing_mirroring_and_cropping_one_after_the_other(height, width, flipped, step):
    plan = views([(height, width)], crop="random", flip=float(flipped))
    view, image = plan.view_of(0, step, 0), noise(height, width)
    tall, wide = resized((height, width), plan.buckets[0])
    by_hand = image.resize((wide, tall), Image.Resampling.LANCZOS)
    if flipped:
        by_hand = by_hand.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    by_hand = by_hand.crop((view.left, view.top, view.left + view.width, view.top + view.height))
    got = (pixels_of(shown(image), view, WHITE) + 1) * 127.5
    expected = np.asarray(by_hand, dtype=np.float32).transpose(2, 0, 1)
    assert view.flipped == flipped
    assert np.abs(got.numpy() - expected).max() < 2.5  # Pillow rounds there too


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 10**6), st.integers(0, 99))
def test_cuts_lie_inside_the_resized_picture_which_touches_its_bucket(height, width, step, index):
    plan = views([(height, width)], crop="random", flip=0.5)
    view = plan.view_of(0, step, index)
    tall, wide = resized((height, width), plan.buckets[0])
    assert (view.height, view.width) == plan.buckets[0]
    assert 0 <= view.top <= tall - view.height
    assert 0 <= view.left <= wide - view.width
    assert tall == view.height or wide == view.width
    if min(height, width) > 20:
        assert abs(tall / height - wide / width) <= 0.6 / min(height, width) * max(1, tall / height)


def test_time_ids_are_original_corner_and_target_height_first():
    view = View(0, 48, 80, (300, 700), 1, 2)
    assert view.time_ids == (300, 700, 1, 2, 48, 80)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_time_ids_are_those_of_diffusers():
    from diffusers import StableDiffusionXLPipeline

    view = View(0, 48, 80, (300, 700), 1, 2)
    unet = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=16),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=6 * 16 + 80)),
    )
    theirs = StableDiffusionXLPipeline._get_add_time_ids(
        SimpleNamespace(unet=unet), (300, 700), (1, 2), (48, 80), torch.float32, 80
    )
    assert theirs.tolist() == [list(view.time_ids)]


def test_centred_cuts_and_the_ones_a_cache_holds():
    sizes = [(100, 300), (64, 64)]
    still, both, mirrored = (views(sizes, flip=flip) for flip in (0.0, 0.5, 1.0))
    # The bucket is 48 x 80; 48 rows of the picture's shape have 144 columns, 64 of them spare.
    assert still.centred(0) == View(0, 48, 80, (100, 300), 0, 32)
    assert still.all_of(0) == [still.centred(0)]
    assert mirrored.all_of(0) == [still.centred(0, flipped=True)]
    assert both.all_of(1) == [View(1, 64, 64, (64, 64), 0, 0), View(1, 64, 64, (64, 64), 0, 0, True)]
    for plan in (still, both, mirrored):
        asked = {plan.view_of(0, step, index) for step in range(40) for index in range(2)}
        assert asked == set(plan.all_of(0))


def test_random_parts_depend_on_seed_step_and_place_alone():
    def drawn(seed: int) -> list[View]:
        plan = views([(80, 300)], seed, crop="random", flip=0.3)
        return [plan.view_of(0, step, index) for step in range(200) for index in range(2)]

    first = drawn(0)
    assert first == drawn(0)
    assert first != drawn(1)
    assert first[:2] != first[2:4]
    assert 0.2 < np.mean([view.flipped for view in first]) < 0.4
    spare = resized((80, 300), (48, 80))[1] - 80
    assert {0, spare} <= {view.left for view in first}


def test_square_cuts_where_shapes_are_not_kept():
    assert views([(100, 300)], buckets=False).buckets == [(64, 64)]


def test_small_pictures_are_enlarged_and_say_so():
    plan = views([(20, 20), (64, 64), (500, 30)])
    assert plan.enlarged == [0, 2]
    assert plan.centred(0).time_ids == (20, 20, 0, 0, 64, 64)
    assert pixels_of(shown(Image.new("RGB", (20, 20), "red")), plan.centred(0), WHITE)[:, 30, 30].tolist() == [
        1,
        -1,
        -1,
    ]


def test_a_very_long_picture_is_not_enlarged_as_a_whole():
    plan = views([(1, 30000)], resolution=1024)
    pixels = pixels_of(shown(Image.new("RGB", (30000, 1), "red")), plan.centred(0), WHITE)
    assert pixels.shape == (3, *plan.buckets[0])


def test_a_picture_that_has_changed_since():
    with pytest.raises(LowrankError, match=r"a.png has 8x9 pixels .* and had 64x64 when this run looked first; start"):
        pixels_of(shown(Image.new("RGB", (9, 8))), views([(64, 64)]).centred(0), WHITE)
