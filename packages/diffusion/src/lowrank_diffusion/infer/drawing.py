"""Denoising: prompts and seeds to pictures, whatever the batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lowrank_core.errors import LowrankError
from lowrank_diffusion.encoding import TextEncoders
from lowrank_diffusion.seeds import derive_seed


@dataclass(frozen=True)
class Shot:
    """One picture: its prompt's number and its own among those of the prompt, both from 1."""

    prompt: str
    prompt_number: int
    image_number: int

    def noise_seed(self, seed: int) -> int:
        return derive_seed(seed, "sample", self.prompt_number, self.image_number)


def shots_of(prompts: Sequence[str], images: int) -> list[Shot]:
    """`images` pictures of each prompt, prompt by prompt."""
    return [Shot(prompt, n, k) for n, prompt in enumerate(prompts, 1) for k in range(1, images + 1)]


@torch.inference_mode()
def draw(
    pipeline: Any,
    shots: Sequence[Shot],
    *,
    seed: int,
    negative: str | None,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    batch: int,
    encoders: TextEncoders | None = None,
    go_on: Callable[[float], bool] = lambda share: True,
) -> Iterator[tuple[Shot, Image.Image]]:
    """Pictures, as they are done.

    Noise comes from a generator of each picture's own, on the CPU and in fp32: neither batches nor the device change
    it. Without a negative prompt guidance goes away from zeros, as diffusers' pipeline does for SDXL.

    Args:
        pipeline: an SDXL of diffusers, on its device.
        shots: what to draw.
        seed: of all pictures.
        negative: what guidance goes away from.
        size: width and height, multiples of 8.
        steps: of the scheduler.
        guidance: the scale; 1 and below does without.
        batch: how many pictures are drawn at once.
        encoders: SDXL's, with words that prompts may have; None leaves prompts to the pipeline.
        go_on: told after each step which share of all steps is done, says whether to take the next; the pictures that
            were being drawn are then dropped.

    Raises:
        LowrankError: a picture comes out as NaN, or memory does not suffice.
    """
    # diffusers takes ten seconds to import.
    from lowrank_diffusion.base import decoded

    width, height = size
    for start in range(0, len(shots), batch):
        part = shots[start : start + batch]
        generators = [torch.Generator().manual_seed(shot.noise_seed(seed)) for shot in part]

        def step_ended(
            pipeline: Any, step: int, time: Any, kept: Any, done: int = start, now: int = len(part)
        ) -> dict[str, Tensor]:
            share = (done + now * (step + 1) / pipeline.num_timesteps) / len(shots)
            # diffusers' own way to leave its loop.
            pipeline._interrupt = not go_on(share)
            return {}

        try:
            latents: Tensor = pipeline(
                **_told([shot.prompt for shot in part], negative, encoders),
                latents=_noise(pipeline, generators, width, height),
                generator=generators,
                width=width,
                height=height,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
                callback_on_step_end=step_ended,
            ).images
            if pipeline.interrupt:
                return
            _check_finite(latents, part)
            pictures = decoded(pipeline.vae, latents)
        except torch.OutOfMemoryError:
            raise LowrankError(
                f"{len(part)} pictures of {width}x{height} do not fit into the device's memory; "
                "lower --batch or --size, or take --precision bf16"
            ) from None
        yield from zip(part, pictures, strict=True)


def _told(prompts: list[str], negative: str | None, encoders: TextEncoders | None) -> dict[str, Any]:
    """What the pipeline is told, embedded where there are encoders; it knows itself what no negative prompt is."""
    others = None if negative is None else [negative] * len(prompts)
    if encoders is None:
        return {"prompt": prompts, "negative_prompt": others}
    text = encoders(prompts)
    told = {"prompt_embeds": text.hidden, "pooled_prompt_embeds": text.pooled}
    if others is not None:
        other = encoders(others)
        told |= {"negative_prompt_embeds": other.hidden, "negative_pooled_prompt_embeds": other.pooled}
    return told


def _noise(pipeline: Any, generators: Sequence[torch.Generator], width: int, height: int) -> Tensor:
    factor = pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, height // factor, width // factor)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(pipeline.unet.dtype)


def _check_finite(latents: Tensor, shots: Sequence[Shot]) -> None:
    for shot, finite in zip(shots, latents.isfinite().all(dim=(1, 2, 3)).tolist(), strict=True):
        if not finite:
            dtype = str(latents.dtype).removeprefix("torch.")
            raise LowrankError(
                f"picture {shot.image_number} of prompt {shot.prompt_number} came out as NaN in {dtype}; "
                "lower the adapters' --weight or --guidance, or take --precision fp32"
            )
