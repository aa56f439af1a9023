"""The mathematics of codecs, and how named arrays become one row of numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_fl.codecs import (
    HALF,
    INDICES,
    LEVELS,
    SCALES,
    VALUES,
    Half,
    Int8,
    TopK,
    Undecodable,
    count,
    largest,
    make_codec,
    update,
)
from lowrank_fl.config import CodecConfig
from lowrank_fl.packing import Layout

LOSSY = ("fp16", "int8", "topk")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(low: float = -1e4, high: float = 1e4):
    return st.lists(st.floats(low, high, width=32), min_size=1, max_size=40).map(torch.tensor)


def there_and_back(name: str, arrays: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    layout = Layout.of(arrays)
    codec = make_codec(name, CodecConfig(top_k=0.3))
    packed = codec.encode(layout.flat(arrays), layout.sizes, generator(seed))
    return layout.arrays(codec.decode(packed, layout.sizes), arrays)


SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=6)
DTYPES = st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSY)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_arrays_keep_their_names_shapes_and_dtypes(name, data):
    shapes = data.draw(SHAPES)
    rng = np.random.default_rng(0)
    arrays = {f"w{n}": (5 * rng.normal(size=s)).astype(data.draw(DTYPES)) for n, s in enumerate(shapes)}
    decoded = there_and_back(name, arrays)
    assert list(decoded) == list(arrays)
    for key, array in arrays.items():
        assert (decoded[key].dtype, decoded[key].shape) == (array.dtype, array.shape)
        if not np.issubdtype(array.dtype, np.floating):
            np.testing.assert_array_equal(decoded[key], array)


@pytest.mark.parametrize("name", LOSSY)
def test_statistics_of_norms_are_left_alone(name):
    arrays = {"w": np.ones(4, np.float32), "norm.running_var": np.full(3, 1e-9, np.float32)}
    np.testing.assert_array_equal(there_and_back(name, arrays)["norm.running_var"], arrays["norm.running_var"])


@pytest.mark.parametrize("name", LOSSY)
def test_zeros_stay_zeros_and_a_model_may_be_empty(name):
    arrays = {"w": np.zeros((2, 3), np.float32), "scalar": np.zeros((), np.float32)}
    for key, decoded in there_and_back(name, arrays).items():
        np.testing.assert_array_equal(decoded, arrays[key])
    assert there_and_back(name, {}) == {}


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(name, wrong):
    arrays = {"fine": np.ones(3, np.float32), "w": np.array([1, wrong, 2, 3], np.float32)}
    decoded = there_and_back(name, arrays)
    assert not np.isfinite(decoded["w"]).all()
    assert np.isfinite(decoded["fine"]).all()


@pytest.mark.slow
@given(st.lists(st.floats(width=16, allow_nan=False), min_size=1))
def test_half_precision_is_exact_on_its_own_numbers(values):
    flat = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(Half().decode(Half().encode(flat, [len(flat)], generator()), [len(flat)]), flat)


def test_half_precision_ends_at_its_largest_number():
    flat = torch.tensor([1e9, -1e9, 65519.0, 65504.0])
    decoded = Half().decode(Half().encode(flat, [4], generator()), [4])
    assert decoded.tolist() == [65504, -65504, 65504, 65504]


@pytest.mark.slow
@given(numbers(), st.integers(0, 100))
@settings(deadline=None)
def test_eight_bits_err_by_less_than_a_step(flat, seed):
    decoded = Int8().decode(Int8().encode(flat, [len(flat)], generator(seed)), [len(flat)])
    step = max(flat.abs().max().item() / 127, torch.finfo(torch.float32).tiny)
    assert (decoded - flat).abs().max().item() <= step * (1 + 1e-4)


def test_eight_bits_have_the_right_mean_and_spread():
    flat = torch.tensor([1.0, 0.3, -0.123, 0.004, -0.9999, 0.0])
    draws = 20_000
    many = flat.repeat(draws)
    decoded = Int8().decode(Int8().encode(many, [len(many)], generator()), [len(many)]).view(draws, -1)
    # Between two levels a distance d above the lower one the variance is step² · d (1 - d).
    step = 1 / 127
    part = torch.remainder(flat.double() * 127, 1)
    expected = step * (part * (1 - part)).sqrt()
    errors = (decoded.double().mean(0) - flat.double()).abs()
    assert bool((errors <= 5 * expected / math.sqrt(draws) + 1e-7).all())
    torch.testing.assert_close(decoded.double().std(0), expected, rtol=0.05, atol=1e-4)


def test_every_array_has_a_step_of_its_own():
    flat = torch.tensor([1e-6, -2e-6, 3e4, 1.0])
    packed = Int8().encode(flat, [2, 2], generator())
    np.testing.assert_allclose(packed[SCALES], [2e-6 / 127, 3e4 / 127], rtol=1e-6)
    assert packed[LEVELS].dtype == np.int8
    assert abs(Int8().decode(packed, [2, 2])[0] - 1e-6) < 2e-6 / 127


@pytest.mark.slow
@given(numbers(), st.floats(0.01, 1))
@settings(deadline=None)
def test_the_largest_entries_are_the_largest(flat, share):
    kept = largest(flat, share).tolist()
    # By sorting, the first of equal ones first.
    order = sorted(range(len(flat)), key=lambda index: (-abs(flat[index].item()), index))
    assert kept == sorted(order[: max(1, round(share * len(flat)))])


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(-50, 50), min_size=12, max_size=12), min_size=1, max_size=6))
@settings(deadline=None)
def test_what_was_sent_and_what_is_left_are_all_that_was_given(rounds):
    codec = TopK(0.2)
    left, arrived = torch.zeros(12), torch.zeros(12)
    for given_now in rounds:
        owed = left + torch.tensor(given_now, dtype=torch.float32)
        sent = codec.decode(codec.encode(owed, [5, 7], generator()), [5, 7])
        assert int((sent != 0).sum()) <= count(12, 0.2) == 2
        left = owed - sent
        arrived += sent
    assert torch.equal(arrived + left, torch.tensor(rounds, dtype=torch.float32).sum(0))


@pytest.mark.parametrize(
    ("codec", "packed", "reason"),
    [
        (Half(), {}, "codec/half is missing; there is nothing"),
        (Half(), {HALF: np.zeros(3, np.float16)}, r"codec/half is float16 \(3,\), not float16 \(4,\)"),
        (Half(), {HALF: np.zeros(4, np.float32)}, r"codec/half is float32 \(4,\), not float16 \(4,\)"),
        (Int8(), {LEVELS: np.zeros(4, np.int8)}, "codec/scales is missing; there is codec/levels"),
        (
            TopK(0.5),
            {INDICES: np.array([0, 4], np.int32), VALUES: np.ones(2, np.float32)},
            "rising numbers from 0 to 3",
        ),
        (TopK(0.5), {INDICES: np.array([-1, 2], np.int32), VALUES: np.ones(2, np.float32)}, "rising numbers"),
        (TopK(0.5), {INDICES: np.array([2, 2], np.int32), VALUES: np.ones(2, np.float32)}, "rising numbers"),
        (TopK(0.5), {INDICES: np.array([2, 3], np.int32), VALUES: np.ones(3, np.float32)}, "codec/values is float32"),
        (TopK(0.5), {INDICES: np.array([2], np.int32), VALUES: np.ones(1, np.float32)}, "1 entries came where 2 of 4"),
    ],
)
def test_what_does_not_decode_is_said(codec, packed, reason):
    with pytest.raises(Undecodable, match=reason):
        codec.decode(packed, [1, 3])


def test_a_client_needs_what_it_held_to_take_in_changes():
    changes = {INDICES: np.array([1], np.int32), VALUES: np.array([5], np.float32)}
    assert update(torch.zeros(3), changes, 3).tolist() == [0, 5, 0]
    assert update(None, {VALUES: np.ones(3, np.float32)}, 3).tolist() == [1, 1, 1]
    with pytest.raises(Undecodable, match="the client no longer has what it received before"):
        update(None, changes, 3)


def test_a_layout_travels():
    layout = Layout.of({"a.weight": np.zeros((2, 3), np.float32), "n": np.zeros((), np.int64)})
    assert Layout.from_bytes(layout.to_bytes()) == layout


@pytest.mark.parametrize("text", [b"", b"[1]", b'[["w","no-dtype",[1]]]', b'[["w","float32",[-1]]]', b"\xff"])
def test_a_layout_that_is_none(text):
    with pytest.raises(Undecodable, match="the arrays are"):
        Layout.from_bytes(text)
