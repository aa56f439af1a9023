"""What a run trains on: its pictures, which of them are held out, and how each is cut."""

import hashlib
import json
from dataclasses import dataclass

from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.data.batches import GlobalBatches, split_held_out
from lowrank_diffusion.data.opening import check_pictures
from lowrank_diffusion.data.picture import Note, Picture, first_of
from lowrank_diffusion.data.sources import find_pictures
from lowrank_diffusion.data.views import View, Views


@dataclass(frozen=True)
class Material:
    """Pictures are named by their places in `pictures` everywhere."""

    pictures: list[Picture]
    views: Views
    trained: list[int]
    held_out: list[int]
    batches: GlobalBatches
    """Of trained pictures; a batch is that of all processes and accumulated forwards together."""

    @property
    def captions(self) -> list[str]:
        return [picture.caption for picture in self.pictures]

    @property
    def cached_views(self) -> list[View]:
        """Every cut that training and validation will ask for, where cuts are centred."""
        held_out = [self.views.centred(number) for number in self.held_out]
        return held_out + [view for number in self.trained for view in self.views.all_of(number)]

    @property
    def digest(self) -> str:
        """Changes when pictures are added, taken out or renamed, have another size, or another caption."""
        listed = [(p.name, p.caption, size) for p, size in zip(self.pictures, self.views.sizes, strict=True)]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def find_material(config: DiffusionConfig, global_batch: int, note: Note, *, decode: bool = True) -> Material:
    """Look at every picture of the configuration once; `decode` as `check_pictures` has it.

    Raises:
        LowrankError: there are none, captions are missing, or too many are broken.
        UsageError: the configuration's keys do not fit the data.
    """
    data = config.data
    pictures, sizes = check_pictures(find_pictures(data, config.seed, note), data.tolerated_broken, note, decode)
    trained, held_out = split_held_out(len(pictures), data.held_out, config.seed, note)
    views = Views(sizes, data, config.seed)
    if views.enlarged:
        names = first_of([pictures[number].name for number in views.enlarged])
        note(f"{len(views.enlarged)} of {len(pictures)} pictures are smaller than their bucket and enlarged: {names}")
    buckets = {number: views.buckets[number] for number in trained}
    return Material(pictures, views, trained, held_out, GlobalBatches(buckets, global_batch, data.repeats, config.seed))
