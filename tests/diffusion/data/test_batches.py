"""Every picture has its turns, in batches of one shape, whatever step a run begins at."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_diffusion.data.batches import GlobalBatches, split_held_out

SQUARE, TALL, WIDE = (64, 64), (80, 48), (48, 80)
some_buckets = st.dictionaries(st.integers(0, 60), st.sampled_from([SQUARE, TALL, WIDE]), min_size=1, max_size=25)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(some_buckets, st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_every_epoch_shows_each_picture(buckets, size, repeats, seed):
    batches = GlobalBatches(buckets, size, repeats, seed)
    members = Counter(buckets.values())
    seen: Counter[int] = Counter()
    for epoch in range(4):
        for step in range(batches.steps_before(epoch), batches.steps_before(epoch + 1)):
            assert batches.epoch_of(step) == epoch
            batch = batches.batch(step)
            assert len(batch) == size
            assert len({buckets[picture] for picture in batch}) == 1
            seen.update(batch)
        for picture, bucket in buckets.items():
            # Above what is due, only a bucket's last batch can have added.
            assert (epoch + 1) * repeats <= seen[picture] <= (epoch + 1) * repeats + -(-size // members[bucket])
        for bucket in members:
            extra = sum(seen[p] for p in buckets if buckets[p] == bucket) - (epoch + 1) * repeats * members[bucket]
            assert 0 <= extra < size


@settings(max_examples=50, deadline=None, derandomize=True)
@given(some_buckets, st.integers(1, 9), st.integers(0, 10**9))
def test_any_step_is_known_without_those_before(buckets, size, step):
    batches = GlobalBatches(buckets, size, 1, 7)
    assert batches.batch(step) == GlobalBatches(dict(reversed(buckets.items())), size, 1, 7).batch(step)
    assert batches.steps_before(batches.epoch_of(step)) <= step < batches.steps_before(batches.epoch_of(step) + 1)


def test_whole_epochs_have_no_repetition_and_differ():
    batches = GlobalBatches(dict.fromkeys(range(12), SQUARE), 4, 1, 0)
    epochs = [[picture for step in range(3 * n, 3 * n + 3) for picture in batches.batch(step)] for n in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = GlobalBatches(dict.fromkeys(range(12), SQUARE), 4, 1, 1)
    assert other.batch(0) != batches.batch(0)


def test_shapes_alternate_in_no_fixed_order():
    buckets = {number: (SQUARE, TALL, WIDE)[number % 3] for number in range(60)}
    batches = GlobalBatches(buckets, 2, 1, 0)
    shapes = [buckets[batches.batch(step)[0]] for step in range(60)]
    assert Counter(shapes[:30]) == Counter(shapes[30:]) == {SQUARE: 10, TALL: 10, WIDE: 10}
    assert shapes[:30] != shapes[30:]
    assert shapes[:30] != sorted(shapes[:30])


def test_a_lone_shape_fills_its_batch_and_then_waits():
    batches = GlobalBatches({0: TALL} | dict.fromkeys(range(1, 9), SQUARE), 4, 1, 0)
    steps = [batches.batch(step) for step in range(batches.steps_before(8))]
    assert steps.count([0, 0, 0, 0]) == 2
    assert [0, 0, 0, 0] in steps[:3]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.floats(0, 0.999), st.integers(0, 2**32 - 1))
def test_held_out_pictures_are_apart_from_the_rest(count, share, seed):
    notes: list[str] = []
    train, held_out = split_held_out(count, share, seed, notes.append)
    assert sorted(train + held_out) == list(range(count))
    assert train
    if share and count > 1:
        assert len(held_out) == max(1, min(count - 1, round(share * count)))
    else:
        assert not held_out
    assert bool(notes) == bool(share and count == 1)


def test_held_out_pictures_are_chosen_by_the_seed(notes):
    assert split_held_out(100, 0.1, 0, notes.append) == split_held_out(100, 0.1, 0, notes.append)
    assert split_held_out(100, 0.1, 0, notes.append) != split_held_out(100, 0.1, 1, notes.append)


def test_of_a_single_picture_none_is_held_out(notes):
    assert split_held_out(1, 0.1, 0, notes.append) == ([0], [])
    assert notes == ["there is one picture only, so that none is held out and no validation loss is computed"]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_held_out_pictures_are_in_no_batch(share, notes):
    train, held_out = split_held_out(20, share, 3, notes.append)
    batches = GlobalBatches(dict.fromkeys(train, SQUARE), 3, 1, 3)
    seen = {picture for step in range(batches.steps_before(3)) for picture in batches.batch(step)}
    assert seen == set(train)
    assert not seen & set(held_out)
