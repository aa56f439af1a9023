"""The validation loss: always the same pictures, noise and time steps, so that two of its values can be compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_diffusion.encoding import Latents, Text
from lowrank_diffusion.losses import squared_errors
from lowrank_diffusion.noise import TrainingNoise
from lowrank_diffusion.seeds import derive_seed

Predict = Callable[[Tensor, Tensor, Text, Tensor], Tensor]
"""The UNet: noisy latents `(n, channels, height, width)`, time steps `(n,)`, text of n captions, time ids `(n, 6)`."""
TIMES = 8
"""Time steps for each picture."""


@dataclass(frozen=True)
class HeldOut:
    """A picture that is not trained on."""

    number: int
    """Its place among all pictures; its noise is a function of this and the run's seed."""
    latents: Latents
    text: Text
    time_ids: tuple[int, ...]


def time_grid(schedule: int, count: int = TIMES) -> Tensor:
    """The middles of `count` equal parts of a schedule of so many time steps, `(count,)`."""
    return torch.tensor([(2 * part + 1) * schedule // (2 * count) for part in range(count)])


@torch.no_grad()
def validation_losses(
    noise: TrainingNoise,
    pictures: Sequence[HeldOut],
    predict: Predict,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = TIMES,
) -> Tensor:
    """Squared errors, unweighted, of every picture at every time step of the grid.

    The latents are the means that the VAE gives. Processes may share the pictures out, since none depends on another.

    Args:
        noise: the run's; its seed fixes the noise, and of `LossConfig` only prediction and schedule play a part.
        pictures: of any sizes.
        predict: in evaluation mode; what it is given lies on `device`, latents and time ids in fp32.
        device: where `predict` computes.
        batch_size: the most latents that it is given at once.

    Returns:
        `(pictures, TIMES)`, fp32, on the CPU; its mean is the validation loss.
    """
    grid = time_grid(len(noise.alphas_cumprod))
    losses = [
        torch.cat([_losses(noise, picture, times, predict, device) for times in grid.split(batch_size)])
        for picture in pictures
    ]
    return torch.stack(losses) if losses else torch.empty(0, TIMES)


def _losses(
    noise: TrainingNoise, picture: HeldOut, times: Tensor, predict: Predict, device: torch.device | str
) -> Tensor:
    drawn = torch.stack([_noise(noise.seed, picture, int(time)) for time in times]).to(device)
    latents, moved = picture.latents.mean.to(device).expand_as(drawn), times.to(device)
    text = Text.stacked([picture.text] * len(times)).to(device)
    time_ids = torch.tensor([picture.time_ids] * len(times), dtype=torch.float32, device=device)
    predicted = predict(noise.noisy(latents, drawn, moved), moved, text, time_ids)
    return squared_errors(predicted, noise.target(latents, drawn, moved)).cpu()


def _noise(seed: int, picture: HeldOut, time: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "validation", picture.number, time))
    return torch.randn(picture.latents.mean.shape, generator=generator)
