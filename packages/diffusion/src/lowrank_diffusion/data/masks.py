"""How much each place of a picture counts in the loss: by its alpha channel, or by a mask beside it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lowrank_core.errors import LowrankError
from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.data.opening import alpha_of, check_pictures, has_alpha, rgb_of
from lowrank_diffusion.data.picture import Picture, Size, first_of
from lowrank_diffusion.data.views import View, cut


class Masks:
    """The masks of some pictures, cut as they are. A picture without a mask counts everywhere."""

    def __init__(self, data: DataConfig, pictures: Sequence[Picture], sizes: Sequence[Size]) -> None:
        """Look at every mask once.

        Args:
            data: `mask`, `unmasked_weight` and `crop`.
            pictures: those that views name by their places.
            sizes: each one's height and width when upright.

        Raises:
            LowrankError: no picture has a mask; one cannot be read, or has another size than its picture.
        """
        self._data, self._pictures = data, pictures
        self._known: dict[View, Tensor] = {}
        if data.mask == "alpha" and not any(map(has_alpha, pictures)):
            raise LowrankError(
                f"data.mask is alpha, but no picture in {data.path} has an alpha channel; "
                "save them with one, or set data.mask: file"
            )
        if data.mask == "file":
            self._check_files(sizes)

    def __call__(self, views: Sequence[View], size: tuple[int, int]) -> Tensor | None:
        """Weights from `unmasked_weight` to 1 for latents of this height and width, `(n, 1, *size)`, fp32, on the CPU.

        Each is the mean over the pixels of its place. None where no masks are asked for.
        """
        if self._data.mask == "none":
            return None
        masks = torch.stack([self._mask(view, size) for view in views])
        least = self._data.unmasked_weight
        return least + (1 - least) * masks

    def _mask(self, view: View, size: tuple[int, int]) -> Tensor:
        if view in self._known:
            return self._known[view]
        picture = self._pictures[view.picture]
        if self._data.mask == "file":
            image = None if picture.mask is None else rgb_of(picture.mask, (0, 0, 0)).convert("L")
        else:
            image = alpha_of(picture)
        if image is None:
            return torch.ones(1, *size)
        pixels = torch.from_numpy(np.array(cut(image, view))).float() / 255
        mask = interpolate(pixels[None, None], size, mode="area")[0]
        if self._data.crop == "centre":  # else a view hardly comes twice
            self._known[view] = mask
        return mask

    def _check_files(self, sizes: Sequence[Size]) -> None:
        masked = [(picture.mask, size) for picture, size in zip(self._pictures, sizes, strict=True) if picture.mask]
        if not masked:
            raise LowrankError(
                f"data.mask is file, but no picture in {self._data.path} has a mask beside it; "
                "name the mask of a.jpg a-masklabel.png"
            )
        found = check_pictures([mask for mask, _ in masked], 0.0, lambda _: None)[1]
        other = [mask.name for (mask, size), own in zip(masked, found, strict=True) if own != size]
        if other:
            raise LowrankError(
                f"{len(other)} of {len(masked)} masks have another size than their pictures: {first_of(other)}; "
                "make them as large"
            )
