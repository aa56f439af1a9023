"""What the UNet is given for any example of any step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_diffusion.cached import CachedLatents, CachedText
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.data.captions import Captions
from lowrank_diffusion.data.masks import Masks
from lowrank_diffusion.encoding import Text, sampled
from lowrank_diffusion.material import Material
from lowrank_diffusion.noise import TrainingNoise
from lowrank_diffusion.validation import HeldOut


@dataclass(frozen=True)
class Batch:
    """Examples of one bucket, on the training device."""

    noisy: Tensor
    """`(n, channels, height, width)`, fp32, like `target`."""
    times: Tensor
    """`(n,)`."""
    text: Text
    time_ids: Tensor
    """`(n, 6)`, fp32: bf16 tells sizes above 1024 apart in steps of 8."""
    target: Tensor
    mask: Tensor | None = None
    """`(n, 1, height, width)`, fp32: how much each place counts; None where all count fully."""


class Examples:
    """Examples are functions of (seed, step, place in the global batch), whoever computes which of them."""

    def __init__(
        self,
        config: DiffusionConfig,
        material: Material,
        latents: CachedLatents,
        text: CachedText,
        noise: TrainingNoise,
        device: torch.device,
    ) -> None:
        self.config, self.material, self.device = config, material, device
        self._latents, self._text, self._noise = latents, text, noise
        self._captions = Captions(config.data, config.seed)
        self._masks = Masks(config.data, material.pictures, material.views.sizes)

    def batch(self, step: int, places: Sequence[int]) -> Batch:
        """The examples at these places of the global batch of optimizer step `step`, counted from 0."""
        numbers = self.material.batches.batch(step)
        views = [self.material.views.view_of(numbers[place], step, place) for place in places]
        device, seed = self.device, self.config.seed
        latents = sampled(self._latents(views), seed, step, places).to(device)
        times = self._noise.times(step, places).to(device)
        noise = self._noise.noise(step, places, latents.shape[1:]).to(device)
        mask = self._masks(views, (latents.shape[-2], latents.shape[-1]))
        return Batch(
            noisy=self._noise.noisy(latents, noise, times),
            times=times,
            text=self._text(
                [self._captions.of(self.material.pictures[numbers[place]].caption, step, place) for place in places]
            ).to(device),
            time_ids=torch.tensor([view.time_ids for view in views], dtype=torch.float32, device=device),
            target=self._noise.target(latents, noise, times),
            mask=None if mask is None else mask.to(device),
        )

    @torch.no_grad()
    def held_out(self) -> list[HeldOut]:
        """The pictures of the validation loss, with their captions, as the text encoders embed them now."""
        material = self.material
        views = [material.views.centred(number) for number in material.held_out]
        latents = self._latents(views)
        return [
            HeldOut(view.picture, each, self._text([self._captions.plain(caption)]).unstacked()[0], view.time_ids)
            for view, each in zip(views, latents, strict=True)
            for caption in [material.pictures[view.picture].caption]
        ]
