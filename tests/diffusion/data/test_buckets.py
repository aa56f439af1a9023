"""Buckets have the right number of pixels, and pictures go to the nearest."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.errors import UsageError
from lowrank_diffusion.data.buckets import bucket_sizes, nearest_bucket

shapes = {
    "resolution": st.integers(8, 260).map(lambda n: 8 * n),
    "step": st.sampled_from([8, 16, 32, 64, 128]),
    "max_aspect": st.floats(1, 5),
}


def test_buckets_of_sdxl():
    tall = [(1408, 704), (1344, 768), (1216, 832), (1152, 896), (1088, 960)]
    wide = [(width, height) for height, width in reversed(tall)]
    assert bucket_sizes(1024, 64, 2.0) == [*tall, (1024, 1024), *wide]


def test_buckets_of_the_tiny_sdxl():
    assert bucket_sizes(64, 16, 2.0) == [(80, 48), (64, 64), (48, 80)]
    assert bucket_sizes(64, 64, 2.0) == [(64, 64)]


def test_only_the_square_where_shapes_are_not_kept():
    assert bucket_sizes(1000, 64, 1.0) == [(960, 960)]


def test_a_step_longer_than_the_side():
    with pytest.raises(UsageError, match=r"data.bucket_step is 64 and data.resolution 32.* to at most data.resolution"):
        bucket_sizes(32, 64, 2.0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 60).map(lambda n: 8 * n), shapes["step"], shapes["max_aspect"])
def test_every_bucket_keeps_its_bounds_and_fits_into_no_other_shape(resolution, step, max_aspect):
    if step > resolution:
        return
    found = bucket_sizes(resolution, step, max_aspect)
    square = resolution // step * step
    sides = range(step, 3 * resolution, step)
    allowed = {
        (height, width)
        for height in sides
        for width in sides
        if height * width <= resolution**2 and max(height, width) <= max_aspect * min(height, width)
    }
    assert len(set(found)) == len(found)
    assert set(found) <= allowed
    assert set(found) == {(width, height) for height, width in found}
    for size in set(found) - {(square, square)}:
        assert not [other for other in allowed - {size} if size[0] <= other[0] and size[1] <= other[1]]
    for size in allowed - set(found):
        assert any(size[0] <= other[0] and size[1] <= other[1] for other in found)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**shapes, height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_no_bucket_has_a_nearer_shape(resolution, step, max_aspect, height, width):
    if step > resolution:
        return
    buckets = bucket_sizes(resolution, step, max_aspect)
    chosen = nearest_bucket((height, width), buckets)

    def apart(bucket) -> float:
        return abs(math.log(bucket[1] / bucket[0]) - math.log(width / height))

    assert apart(chosen) <= min(map(apart, buckets)) + 1e-9
    assert nearest_bucket((width, height), buckets) == chosen[::-1] or math.isclose(
        apart(chosen), apart(nearest_bucket((width, height), buckets)[::-1]), abs_tol=1e-9
    )


def test_of_equally_near_buckets_the_larger_is_taken():
    assert nearest_bucket((10, 10), [(8, 8), (16, 16)]) == (16, 16)
