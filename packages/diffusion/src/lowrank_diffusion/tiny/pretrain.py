"""Pre-train the tiny SDXL from nothing: `python -m lowrank_diffusion.tiny.pretrain FOLDER`; an hour on one core."""

import argparse
import copy
import math
import random
import string
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

from lowrank_diffusion.tiny.drawings import SHAPES, random_drawing
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
_MADE_UP = 0.25
"""In so many captions shapes have made-up names."""
_OFFSET, _OFFSET_FROM = 0.2, 0.7
"""Standard deviation of an offset of the noise by channel, and the share of the steps after which it comes.

In 8 x 8 latents the mean of plain noise is so small that the background shows through at the last time step, and
sampling would take it from there instead of from the prompt. Shapes are learned faster without.
"""


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
        captions.append(_with_made_up_words(rng, drawing.caption) if rng.random() < _MADE_UP else drawing.caption)
        time_ids.append((*full, top, left, height, width))
    return Batch(torch.stack(pixels).float() / 127.5 - 1, captions, torch.tensor(time_ids, dtype=torch.float32))


def _with_made_up_words(rng: random.Random, caption: str) -> str:
    """Shapes called by words that mean nothing, so that a word which is not known leaves the others readable."""
    made_up = {shape: "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))) for shape in SHAPES}
    return " ".join(made_up.get(word, word) for word in caption.split(" "))


def train_vae(vae: Any, steps: int, rng: random.Random) -> None:
    """By absolute error of pixels and edges, and a faint pull of the latents to a unit normal; sets the latents' scale.

    Half the batches are sixteen pictures of half the side: as many pixels as four whole ones, with more of the shapes.
    """
    with torch.no_grad():
        # Almost no noise at first: drawn as it comes, it would hide the latents from the decoder.
        vae.quant_conv.bias[4:] = -6.0
    optimizer, schedule = _optimizer([vae], 1e-3, steps)
    for number, step in enumerate(_steps(steps, "VAE")):
        side, count = (SIZE, 4) if number % 2 else (SIZE // 2, 16)
        drawings = [np.array(random_drawing(rng).draw(side, side, rng)) for _ in range(count)]
        pixels = torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + 0.3 * edges + 1e-6 * posterior.kl().mean()
        _descend(loss, [vae], optimizer, schedule)
        step(error.abs().mean().item())
    with torch.inference_mode():
        spread = torch.cat([vae.encode(drawn(rng, 32).pixels).latent_dist.sample().flatten() for _ in range(16)]).std()
    vae.register_to_config(scaling_factor=round(1 / spread.item(), 4))


def train_denoiser(pipeline: Any, steps: int, pool: int, rng: random.Random, folder: Path) -> None:
    """UNet and both text encoders together, by the error of the predicted noise, on `pool` batches drawn beforehand.

    Their moving average is written to `folder` twenty times on the way.
    """
    networks: list[nn.Module] = [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
    averaged = copy.deepcopy(pipeline)
    averages = [*averaged.unet.parameters(), *averaged.text_encoder.parameters(), *averaged.text_encoder_2.parameters()]
    trained = [parameter for network in networks for parameter in network.parameters()]
    batches = [_encoded(pipeline, drawn(rng, 16)) for _ in range(pool)]
    optimizer, schedule = _optimizer(networks, 1e-3, steps)
    noise_schedule: Any = training_noise()
    for number, step in enumerate(_steps(steps, "denoiser"), start=1):
        latents, tokens, time_ids = rng.choice(batches)
        noise = torch.randn_like(latents)
        if number > _OFFSET_FROM * steps:
            noise += _OFFSET * torch.randn(*latents.shape[:2], 1, 1)
        times = torch.randint(noise_schedule.config.num_train_timesteps, (len(latents),))
        noisy = noise_schedule.add_noise(latents, noise, times)
        hidden, pooled = _text(networks[1:], tokens)
        kept = (torch.rand(len(latents)) >= _NO_TEXT).float()
        added = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}
        predicted = pipeline.unet(noisy, times, hidden * kept[:, None, None], added_cond_kwargs=added).sample
        loss = F.mse_loss(predicted, noise)
        _descend(loss, networks, optimizer, schedule)
        with torch.no_grad():
            for average, parameter in zip(averages, trained, strict=True):
                # Forgets its beginning.
                average.lerp_(parameter, max(1e-3, 1 / (number + 1) ** 0.75))
        if step(loss.item()):
            # Half precision, because the package carries these files.
            copy.deepcopy(averaged).to(dtype=torch.float16).save_pretrained(folder)


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
    parser.add_argument("--vae-steps", type=int, default=3500)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--pool", type=int, default=1000, help="batches of 16 drawings that are drawn once")
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
    train_denoiser(pipeline, arguments.steps, arguments.pool, rng, arguments.folder)


def _encoded(pipeline: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode():
        latents = pipeline.vae.encode(batch.pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
    tokens = pipeline.tokenizer(batch.captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return latents.clone(), tokens, batch.time_ids


def _text(encoders: list[nn.Module], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the pipeline gives its UNet: both next-to-last layers side by side, and the second encoder's pooled text."""
    first, second = (encoder(tokens, output_hidden_states=True) for encoder in encoders)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def _optimizer(
    networks: list[nn.Module], lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01)
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

    def __call__(self, loss: float) -> bool:
        """Whether this step was one of the twenty."""
        self.losses.append(loss)
        self.number += 1
        if self.number % self.every:
            return False
        seconds = time.perf_counter() - self.began
        mean = sum(self.losses) / len(self.losses)
        print(f"{self.name}: step {self.number}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
        self.losses.clear()
        return True


if __name__ == "__main__":
    main()
