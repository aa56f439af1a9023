"""What of a picture a step sees: resized, cut to a bucket, maybe mirrored, and the time ids that tell SDXL so."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowrank_core.errors import LowrankError
from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.data.buckets import bucket_sizes, nearest_bucket
from lowrank_diffusion.data.opening import Colour, rgb_of
from lowrank_diffusion.data.picture import Picture, Size
from lowrank_diffusion.seeds import Purpose, derive_seed


@dataclass(frozen=True)
class View:
    """One cut of one picture; equal views show equal pixels, so that a view is the key of what is cached."""

    picture: int
    """Its place in the list of pictures."""
    height: int
    width: int
    """The bucket's, in pixels."""
    original: Size
    """The upright picture's, before any resizing."""
    top: int
    left: int
    """The cut's corner in the resized and, if `flipped`, already mirrored picture."""
    flipped: bool = False

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Original size, corner of the cut, target size, each with the height or top first.

        SDXL's micro-conditioning (Podell et al., 2023, section 2.2), in the order of diffusers'
        pipeline. The target is the bucket; a picture that was enlarged shows it by its original size.
        """
        return (*self.original, self.top, self.left, self.height, self.width)


class Views:
    """The cuts of all pictures, each in the bucket nearest to its shape.

    Args:
        sizes: Each picture's height and width when upright.
        data: Resolution, buckets, crop and flip.
        seed: The run's.
    """

    def __init__(self, sizes: Sequence[Size], data: DataConfig, seed: int) -> None:
        buckets = bucket_sizes(data.resolution, data.bucket_step, data.max_aspect if data.buckets else 1.0)
        self.sizes = list(sizes)
        self.buckets = [nearest_bucket(size, buckets) for size in sizes]
        """Each picture's bucket."""
        self._flip, self._crop, self._seed = data.flip, data.crop, seed

    def view_of(self, picture: int, step: int, index: int) -> View:
        """How a step shows a picture: a function of the seed, the step and the place in its global batch."""
        flipped = self._draw("flip", step, index).random() < self._flip
        if self._crop == "centre":
            return self.centred(picture, flipped)
        rng = self._draw("crop", step, index)
        top, left = (int(rng.random() * (spare + 1)) for spare in self._spare(picture))
        return self._view(picture, top, left, flipped)

    def centred(self, picture: int, flipped: bool = False) -> View:
        """The middle of a picture; not mirrored, it is how validation sees it."""
        top, left = (spare // 2 for spare in self._spare(picture))
        return self._view(picture, top, left, flipped)

    def all_of(self, picture: int) -> list[View]:
        """Everything that `view_of` may return where cuts are centred: what a cache must hold."""
        ways = {0.0: [False], 1.0: [True]}.get(self._flip, [False, True])
        return [self.centred(picture, flipped) for flipped in ways]

    @property
    def enlarged(self) -> list[int]:
        """The pictures with fewer pixels than their bucket in a side."""
        return [
            number
            for number, (size, bucket) in enumerate(zip(self.sizes, self.buckets, strict=True))
            if size[0] < bucket[0] or size[1] < bucket[1]
        ]

    def _spare(self, picture: int) -> Size:
        """What the resized picture has beyond its bucket."""
        (height, width), bucket = resized(self.sizes[picture], self.buckets[picture]), self.buckets[picture]
        return height - bucket[0], width - bucket[1]

    def _view(self, picture: int, top: int, left: int, flipped: bool) -> View:
        height, width = self.buckets[picture]
        return View(picture, height, width, self.sizes[picture], top, left, flipped)

    def _draw(self, purpose: Purpose, step: int, index: int) -> random.Random:
        return random.Random(derive_seed(self._seed, purpose, step, index))


def resized(original: Size, bucket: Size) -> Size:
    """The smallest size of the original's shape that covers the bucket."""
    scale = max(bucket[0] / original[0], bucket[1] / original[1])
    return max(bucket[0], round(original[0] * scale)), max(bucket[1], round(original[1] * scale))


def pixels_of(picture: Picture, view: View, background: Colour) -> Tensor:
    """Float32 `(3, height, width)` from -1 to 1, resized by Lanczos's filter.

    Raises:
        LowrankError: the picture, which it names, cannot be read or has another size than when the run began.
    """
    image = rgb_of(picture, background)
    if (image.height, image.width) != view.original:
        raise LowrankError(
            f"{picture.name} has {image.height}x{image.width} pixels (height x width), and had "
            f"{view.original[0]}x{view.original[1]} when this run looked first; start the run anew"
        )
    return torch.from_numpy(np.array(cut(image, view))).permute(2, 0, 1).float() / 127.5 - 1


def cut(image: Image.Image, view: View) -> Image.Image:
    """An upright picture of the view's original size, resized, cut and perhaps mirrored, in its own mode."""
    height, width = resized(view.original, (view.height, view.width))
    left = width - view.left - view.width if view.flipped else view.left
    # The cut in the original's pixels, so that no long narrow picture is enlarged as a whole.
    down, right = image.height / height, image.width / width
    box = (left * right, view.top * down, (left + view.width) * right, (view.top + view.height) * down)
    image = image.resize((view.width, view.height), Image.Resampling.LANCZOS, box)
    if view.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
