"""Which pictures make up which optimizer step."""

from collections.abc import Mapping

import numpy as np

from lowrank_diffusion.data.picture import Note, Size
from lowrank_diffusion.seeds import derive_seed


def split_held_out(count: int, share: float, seed: int, note: Note) -> tuple[list[int], list[int]]:
    """The numbers of the pictures to train on, and of those held out for validation.

    Above a share of 0 at least one is held out and at least one is not; of a single picture none
    is, which `note` is told.
    """
    if share and count == 1:
        note("there is one picture only, so that none is held out and no validation loss is computed")
    held = min(max(1, round(share * count)), count - 1) if share else 0
    order = np.random.default_rng(derive_seed(seed, "split")).permutation(count).tolist()
    return sorted(order[held:]), sorted(order[:held])


class GlobalBatches:
    """Batches of one bucket each, as a function of the seed and the step alone.

    Every bucket has an endless sequence of its own, its pictures shuffled anew again and again, and
    its batches cut that sequence without gaps. So what the last batch of an epoch lacks comes from
    the next epoch's beginning, which then goes on behind it: after n epochs every picture has been
    shown n times `repeats`, and only a bucket's last batch can have shown some more often.

    Args:
        buckets: Each picture's bucket, by the picture's number.
        size: Pictures in a batch, of all processes and accumulated forwards together.
        repeats: How often an epoch shows each picture.
        seed: The run's.
    """

    def __init__(self, buckets: Mapping[int, Size], size: int, repeats: int, seed: int) -> None:
        assert buckets, "split_held_out leaves at least one picture"
        self.size, self.repeats, self.seed = size, repeats, seed
        self._members = [
            np.array([picture for picture, own in sorted(buckets.items()) if own == bucket])
            for bucket in sorted(set(buckets.values()))
        ]

    def batch(self, step: int) -> list[int]:
        """The numbers of the pictures of optimizer step `step`, counted from 0; all of one bucket."""
        epoch = self.epoch_of(step)
        begun, ended = self._batches_before(epoch), self._batches_before(epoch + 1)
        turns = np.repeat(np.arange(len(self._members)), ended - begun)
        turns = self._shuffled(turns, 0, epoch)
        place = step - int(begun.sum())
        bucket = int(turns[place])
        number = int(begun[bucket]) + int((turns[:place] == bucket).sum())
        return self._stretch(bucket, number * self.size)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to, counted from 0."""
        # An epoch without a batch of its own is possible where batches are larger than the data.
        low, high = 0, 1
        while self.steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle)
        return low

    def steps_before(self, epoch: int) -> int:
        """How many steps come before an epoch's first."""
        return int(self._batches_before(epoch).sum())

    def _batches_before(self, epoch: int) -> np.ndarray:
        """For each bucket, the batches that show its pictures as often as the epochs before should."""
        return np.array([-(-epoch * self.repeats * len(members) // self.size) for members in self._members])

    def _stretch(self, bucket: int, start: int) -> list[int]:
        """A batch's worth of a bucket's endless sequence."""
        members = self._members[bucket]
        first, last = start // len(members), (start + self.size - 1) // len(members)
        rounds = np.concatenate([self._shuffled(members, bucket + 1, number) for number in range(first, last + 1)])
        return rounds[start - first * len(members) :][: self.size].tolist()

    def _shuffled(self, numbers: np.ndarray, which: int, turn: int) -> np.ndarray:
        return np.random.default_rng(derive_seed(self.seed, "order", which, turn)).permutation(numbers)
