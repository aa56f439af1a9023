"""The pictures that this package draws for a first run."""

import pickle

import numpy as np

from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.data.opening import check_pictures
from lowrank_diffusion.data.quickstart import quickstart_pictures
from lowrank_diffusion.data.views import Views
from lowrank_diffusion.tiny.drawings import COLOURS, all_words


def test_they_are_found_by_name(find, notes):
    pictures = find("quickstart", resolution=64)
    assert [picture.name for picture in pictures] == [f"house {number}" for number in range(24)]
    assert notes == []


def test_equal_houses_are_drawn_each_time_and_elsewhere():
    for picture, again in zip(
        quickstart_pictures(64), pickle.loads(pickle.dumps(quickstart_pictures(64))), strict=True
    ):
        assert picture.open().tobytes() == again.open().tobytes()


def test_no_two_are_alike():
    pictures = quickstart_pictures(64)
    assert len({picture.open().tobytes() for picture in pictures}) == 24
    assert len({picture.caption for picture in pictures}) > 15


def test_the_subject_is_new_and_every_other_word_is_known():
    words = {word for picture in quickstart_pictures(64) for word in picture.caption.split()}
    assert words - set(all_words()) == {"house"}


def test_each_shows_a_red_roof_above_a_yellow_wall_on_the_background_it_names():
    for picture in quickstart_pictures(64):
        pixels = np.asarray(picture.open(), dtype=int)
        roof, wall = ((np.abs(pixels - COLOURS[name]).max(axis=2) < 8) for name in ("red", "yellow"))
        assert 0.01 < roof.mean() < 0.2, picture.name
        assert 0.02 < wall.mean() < 0.3, picture.name
        assert np.nonzero(roof)[0].mean() < np.nonzero(wall)[0].mean(), picture.name
        named = picture.caption.split()[-2]
        assert np.abs(pixels[0, 0] - COLOURS[named]).max() <= 12, picture.caption


def test_they_fill_the_buckets_of_the_tiny_model_as_drawn():
    _, sizes = check_pictures(quickstart_pictures(64), 0, print)
    views = Views(sizes, DataConfig(resolution=64, bucket_step=16), 0)
    assert views.buckets == sizes
    assert {(64, 64), (48, 80), (80, 48)} == set(sizes)
    assert quickstart_pictures(1024)[0].open().size == (1024, 1024)
