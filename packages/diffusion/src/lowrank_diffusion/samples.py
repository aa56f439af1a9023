"""Pictures of the configured prompts, made as training goes on."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lowrank_core.files.tensors import write_bytes
from lowrank_diffusion.adapting import Adapters
from lowrank_diffusion.base import decoded
from lowrank_diffusion.cached import CachedText
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.families import family_of
from lowrank_diffusion.infer.schedulers import make_scheduler

_GAP = 4
"""Pixels between two pictures of a grid."""


class Sampler:
    """Draws with the networks that are being trained, by diffusers' pipeline and the base's own scheduler.

    The scheduler takes what the networks answer for what `loss.prediction` has them learn.
    """

    def __init__(self, config: DiffusionConfig, pipeline: Any, adapters: Adapters, text: CachedText) -> None:
        self.config, self.adapters, self.vae, self._text = config, adapters, pipeline.vae, text
        family = family_of(pipeline)
        # Without the text encoders, which may have left the device: prompts come embedded.
        parts = dict.fromkeys(family.encoders) | {"unet": adapters.unet}
        parts["scheduler"] = make_scheduler(pipeline.scheduler, None, config.loss)
        self._pipeline = type(pipeline)(**{**pipeline.components, **family.options, **parts})
        self._pipeline.set_progress_bar_config(disable=True)

    @staticmethod
    def captions(config: DiffusionConfig) -> list[str]:
        """What the text encoders must have embedded before they leave."""
        return [*config.sample.prompts, config.sample.negative] if config.sample.prompts else []

    @torch.no_grad()
    def draw(self) -> list[Image.Image]:
        """A square picture of each prompt, always from the same noise; nothing that training draws is changed."""
        sample, data = self.config.sample, self.config.data
        side = data.resolution // data.bucket_step * data.bucket_step
        unet: Any = self.adapters.unet
        home, pictures = self.vae.device, list[Image.Image]()
        self.adapters.train(False)
        self.vae.to(unet.device)
        try:
            # Ancestral schedulers aside, only the given generator is drawn from; the others' state is kept anyway.
            with torch.random.fork_rng():
                for prompt in sample.prompts:
                    # An empty negative prompt is what a dropped caption was in training.
                    text = self._text([prompt, sample.negative or None]).to(unet.device, unet.dtype)
                    pooled = {"pooled_prompt_embeds": text.pooled[:1], "negative_pooled_prompt_embeds": text.pooled[1:]}
                    latents = self._pipeline(
                        prompt_embeds=text.hidden[:1],
                        negative_prompt_embeds=text.hidden[1:],
                        **(pooled if text.pooled.numel() else {}),
                        height=side,
                        width=side,
                        num_inference_steps=sample.steps,
                        guidance_scale=sample.guidance,
                        generator=torch.Generator().manual_seed(sample.seed),
                        output_type="latent",
                    ).images
                    pictures += decoded(self.vae, latents)
        finally:
            self.vae.to(home)
            self.adapters.train(True)
        return pictures


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size beside and below each other, as near to a square as can be if no columns are given."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    size = (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
    canvas = Image.new("RGB", size, "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        canvas.paste(picture, (column * (width + _GAP), row * (height + _GAP)))
    return canvas


def save_grid(run: Path, step: int, pictures: Sequence[Image.Image]) -> Image.Image:
    """samples/step-N.png, written whole, and what it shows."""
    whole = grid(pictures)
    png(whole, run / "samples" / f"step-{step}.png")
    return whole


def png(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all."""
    content = io.BytesIO()
    picture.save(content, "png")
    write_bytes(path, content.getvalue())
