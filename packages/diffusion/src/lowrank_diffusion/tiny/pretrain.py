"""Pre-train the tiny SDXL from nothing: `python -m lowrank_diffusion.tiny.pretrain FOLDER`; two hours on two cores."""

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lowrank_diffusion.tiny.drawings import random_drawing
from lowrank_diffusion.tiny.networks import (
    SIZE,
    sampling_noise,
    tiny_text_encoders,
    tiny_unet,
    tiny_vae,
    training_noise,
)
from lowrank_diffusion.tiny.tokenizer import tiny_tokenizer

_SHAPES = ((SIZE, SIZE), (SIZE, SIZE), (SIZE - 16, SIZE + 16), (SIZE + 16, SIZE - 16))
"""Height and width of the pictures: square ones as often as oblong ones."""
_NO_TEXT = 0.1
"""So many captions are replaced by zeros, which classifier-free guidance needs."""


@dataclass(frozen=True)
class Batch:
    """Pictures of one shape. pixels: `(n, 3, height, width)` from -1 to 1; time_ids: `(n, 6)`, as SDXL's UNet reads."""

    pixels: Tensor
    captions: list[str]
    time_ids: Tensor


def drawn(rng: random.Random, size: int) -> Batch:
    """A batch of drawings, some of them enlarged from fewer pixels and some cropped, and time ids that say so."""
    height, width = rng.choice(_SHAPES)
    pixels, captions, time_ids = [], [], []
    for _ in range(size):
        drawing = random_drawing(rng)
        # A crop's place in the enlarged drawing, as SDXL was told it.
        around = rng.choice((0, 0, 0, 8, 16))
        top, left = rng.randint(0, around), rng.randint(0, around)
        small = rng.choice((1, 1, 1, 1, 2, 3))
        full = (height + around) // small, (width + around) // small
        picture = drawing.draw(full[1], full[0], rng)
        if small > 1 or around:
            enlarged = picture.resize((width + around, height + around))
            picture = enlarged.crop((left, top, left + width, top + height))
        pixels.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        captions.append(drawing.caption)
        time_ids.append((*full, top, left, height, width))
    return Batch(torch.stack(pixels).float() / 127.5 - 1, captions, torch.tensor(time_ids, dtype=torch.float32))


def train_vae(vae: Any, steps: int, rng: random.Random) -> None:
    """By absolute error and a faint pull of the latents towards a unit normal; sets the latents' scale."""
    optimizer, schedule = _optimizer([vae], 2e-3, steps)
    for step in _steps(steps, "VAE"):
        pixels = drawn(rng, 16).pixels.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        loss = F.l1_loss(vae.decode(posterior.sample()).sample, pixels) + 1e-5 * posterior.kl().mean()
        step(loss.item())
        _descend(loss, [vae], optimizer, schedule)
    with torch.inference_mode():
        spread = torch.cat([vae.encode(drawn(rng, 32).pixels).latent_dist.sample().flatten() for _ in range(16)]).std()
    vae.register_to_config(scaling_factor=round(1 / spread.item(), 4))


def train_denoiser(pipeline: Any, steps: int, pool: int, rng: random.Random) -> None:
    """UNet and both text encoders together, by the error of the predicted noise, on `pool` batches drawn beforehand."""
    unet, encoders = pipeline.unet, (pipeline.text_encoder, pipeline.text_encoder_2)
    batches = [_encoded(pipeline, drawn(rng, 32)) for _ in range(pool)]
    networks: list[nn.Module] = [unet, *encoders]
    averages = [AveragedModel(network, avg_fn=_slowly) for network in networks]
    optimizer, schedule = _optimizer(networks, 2e-3, steps)
    noise_schedule: Any = training_noise()
    for step in _steps(steps, "denoiser"):
        latents, tokens, time_ids = rng.choice(batches)
        noise = torch.randn_like(latents)
        times = torch.randint(noise_schedule.config.num_train_timesteps, (len(latents),))
        noisy = noise_schedule.add_noise(latents, noise, times)
        hidden, pooled = _text(encoders, tokens)
        kept = (torch.rand(len(latents)) >= _NO_TEXT).float()
        added = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}
        predicted = unet(noisy, times, hidden * kept[:, None, None], added_cond_kwargs=added).sample
        loss = F.mse_loss(predicted, noise)
        step(loss.item())
        _descend(loss, networks, optimizer, schedule)
        for average, network in zip(averages, networks, strict=True):
            average.update_parameters(network)
    for average, network in zip(averages, networks, strict=True):
        network.load_state_dict(average.module.state_dict())


def untrained() -> Any:
    """All parts put together as an ordinary diffusers pipeline."""
    tokenizer: Any = tiny_tokenizer()
    first, second = tiny_text_encoders(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    make: Any = StableDiffusionXLPipeline
    return make(
        vae=tiny_vae(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(),
        scheduler=sampling_noise(),
        add_watermarker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pipeline goes; a VAE that it holds already is kept")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument("--pool", type=int, default=2000, help="batches of 32 drawings that are drawn once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    pipeline = untrained()
    folder = arguments.folder / "vae"
    if folder.exists():
        pipeline.vae = AutoencoderKL.from_pretrained(folder)
    else:
        train_vae(pipeline.vae, arguments.vae_steps, rng)
        pipeline.vae.save_pretrained(folder)
    train_denoiser(pipeline, arguments.steps, arguments.pool, rng)
    # Half precision, because the package carries these files.
    pipeline.to(dtype=torch.float16).save_pretrained(arguments.folder)


def _encoded(pipeline: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode():
        latents = pipeline.vae.encode(batch.pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
    tokens = pipeline.tokenizer(batch.captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return latents.clone(), tokens, batch.time_ids


def _text(encoders: tuple[nn.Module, ...], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the pipeline gives its UNet: both next-to-last layers side by side, and the second encoder's pooled text."""
    first, second = (encoder(tokens, output_hidden_states=True) for encoder in encoders)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def _slowly(average: Tensor, now: Tensor, updates: Tensor | int) -> Tensor:
    """A moving average that forgets its beginning."""
    return average.lerp(now, max(1e-3, 1 / (int(updates) + 1) ** 0.75))


def _optimizer(
    networks: list[nn.Module], lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    warm = min(200, steps // 10 + 1)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _descend(
    loss: Tensor,
    networks: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for network in networks for p in network.parameters()], 1.0)
    optimizer.step()
    schedule.step()


def _steps(count: int, name: str) -> Iterator["_Progress"]:
    progress = _Progress(count, name)
    for _ in range(count):
        yield progress


class _Progress:
    """Prints the mean loss twenty times on the way."""

    def __init__(self, count: int, name: str) -> None:
        self.every, self.name, self.losses, self.number = max(1, count // 20), name, [0.0][:0], 0
        self.began = time.perf_counter()

    def __call__(self, loss: float) -> None:
        self.losses.append(loss)
        self.number += 1
        if self.number % self.every == 0:
            seconds = time.perf_counter() - self.began
            print(f"{self.name}: step {self.number}, loss {sum(self.losses) / len(self.losses):.4f}, {seconds:.0f} s")
            self.losses.clear()


if __name__ == "__main__":
    main()
