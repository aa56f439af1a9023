"""What one step of training asks of the UNet: noisy latents, the right answer, and how much a mistake counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.config import LossConfig
from lowrank_diffusion.families import TRAINED
from lowrank_diffusion.losses import errors
from lowrank_diffusion.seeds import derive_seed

Prediction = Literal["epsilon", "v_prediction"]


def training_noise(scheduler: Mapping[str, Any], loss: LossConfig, seed: int) -> "TrainingNoise":
    """The noise that a base model was trained with, changed where the run's configuration says so.

    Args:
        scheduler: the configuration of the base's scheduler, whichever of diffusers' it is.
        loss: prediction, errors, weights, noise, time steps and the schedule's rescaling.
        seed: of the run.

    Raises:
        LowrankError: the scheduler has no betas (flow matching, EDM), or predicts neither noise nor v.
        UsageError: the schedule ends in pure noise, and the model predicts noise; time steps that it has not.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    found = scheduler.get("_class_name", "its scheduler")
    if "beta_schedule" not in scheduler:
        raise LowrankError(f"{found} of the base model has no beta_schedule, and {TRAINED} as base.path")
    prediction = loss.prediction or scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise LowrankError(
            f"{found} of the base model has prediction_type {prediction}; "
            "set loss.prediction to epsilon or v_prediction"
        )
    rescaled = loss.zero_terminal_snr or bool(scheduler.get("rescale_betas_zero_snr"))
    if rescaled and prediction == "epsilon":
        raise UsageError(
            f"{found} of the base model ends in pure noise, which a model that predicts noise cannot learn from; "
            "set loss.prediction: v_prediction"
        )
    betas = {name: scheduler[name] for name in _BETAS if name in scheduler}
    ddpm: Any = DDPMScheduler(**betas, rescale_betas_zero_snr=rescaled)
    last = len(ddpm.alphas_cumprod)
    if max(loss.min_timestep + 1, loss.max_timestep or last) > last:
        raise UsageError(
            f"the base model has the time steps 0 to {last - 1}; loss.min_timestep is {loss.min_timestep} and "
            f"loss.max_timestep {loss.max_timestep or 'not given'}, so lower them"
        )
    return TrainingNoise(ddpm.alphas_cumprod, prediction, seed, loss)


_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


@dataclass(frozen=True)
class TrainingNoise:
    """Forward diffusion with a discrete schedule (Ho et al., 2020), its time steps, and the loss.

    What is drawn for example `i` of optimizer step `s` is a function of (seed, s, i) and drawn on the CPU. Splitting a
    batch over forwards, processes or machines therefore changes none of it.
    """

    alphas_cumprod: Tensor
    """`(time steps,)`, fp32: the share of the latents' variance that is left at each time step."""
    prediction: Prediction
    seed: int
    settings: LossConfig

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last time step is pure noise."""
        return not self.alphas_cumprod[-1]

    def times(self, step: int, examples: Sequence[int]) -> Tensor:
        """Time steps from `min_timestep` to before `max_timestep`, `(examples,)`, int64."""
        return torch.cat([self._time(_generator(self.seed, "time", step, example)) for example in examples])

    def _time(self, generator: torch.Generator) -> Tensor:
        settings = self.settings
        first, end = settings.min_timestep, settings.max_timestep or len(self.alphas_cumprod)
        if settings.timesteps == "uniform":
            return torch.randint(first, end, (1,), generator=generator)
        drawn = torch.randn(1, generator=generator) * settings.timestep_std + settings.timestep_mean
        # In fp32 the sigmoid of a large number is 1.
        return (first + drawn.sigmoid() * (end - first)).long().clamp(max=end - 1)

    def noise(self, step: int, examples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Noise of unit variance, `(examples, *shape)`, fp32.

        It is normal; `noise_offset` adds so many times a normal number to each channel, and `multires_noise` coarser
        layers, after which each example is divided by its standard deviation.
        """
        return torch.stack([self._noise(_generator(self.seed, "noise", step, example), shape) for example in examples])

    def _noise(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        noise, settings = torch.randn(*shape, generator=generator), self.settings
        if settings.noise_offset:
            noise += settings.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        if settings.multires_noise:
            noise = _multires(noise, settings.multires_noise, settings.multires_discount, generator)
        return noise

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The latents at those time steps, √ᾱ x + √(1 - ᾱ) ε; all are `(n, channels, height, width)`, times `(n,)`."""
        kept = self._kept(times)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the UNet should answer: ε, or v = √ᾱ ε - √(1 - ᾱ) x (Salimans and Ho, 2022)."""
        if self.prediction == "epsilon":
            return noise
        kept = self._kept(times)
        return kept.sqrt() * noise - (1 - kept).sqrt() * latents

    def weights(self, times: Tensor) -> Tensor:
        """Each example's weight, `(n,)`, fp32: 1, min-SNR's (Hang et al., 2023) or the debiased one (Yu et al., 2023).

        With SNR = ᾱ / (1 - ᾱ), min-SNR's are min(SNR, γ) / SNR for noise and min(SNR, γ) / (SNR + 1) for v. The
        debiased are 1 / √SNR for noise and, since an error of v is SNR / (SNR + 1) of one of noise, √SNR / (SNR + 1)
        for v.
        """
        gamma, velocity = self.settings.min_snr_gamma, self.prediction == "v_prediction"
        if gamma is None and not self.settings.debiased:
            return torch.ones(len(times), device=times.device)
        kept = self.alphas_cumprod.double().to(times.device)[times]
        snr = kept / (1 - kept)
        if gamma is None:
            return (snr.sqrt() / (snr + 1) if velocity else snr.rsqrt()).float()
        if velocity:
            return (snr.clamp(max=gamma) / (snr + 1)).float()
        # min(SNR, γ) / SNR, written so that an SNR of 0 gives its limit.
        return (gamma / snr).clamp(max=1).float()

    def loss(self, predicted: Tensor, target: Tensor, times: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weighted error, a number; the sum of weighted errors over the count, as papers have it.

        The weights, and those of a mask `(n, 1, height, width)`, are not divided by their sum. So the loss of a batch
        is the mean of its halves' losses.
        """
        each = errors(predicted, target, self.alphas_cumprod, times, self.settings)
        if mask is not None:
            each = mask * each
        return (self.weights(times) * each.mean(dim=(1, 2, 3))).mean()

    def _kept(self, times: Tensor) -> Tensor:
        return self.alphas_cumprod.to(times.device)[times, None, None, None]


def _multires(noise: Tensor, layers: int, discount: float, generator: torch.Generator) -> Tensor:
    """Multi-resolution noise (Whitaker, 2023), the variant of sd-scripts, for one example `(channels, height, width)`.

    Layer i has sides r^i times smaller, r drawn anew from 2 to 4, and weight discount^i; layer 0 is noise of full size
    once more. The layers end where one is a single number wide or high.
    """
    height, width = noise.shape[1:]
    for layer in range(layers):
        ratio = (2 + 2 * float(torch.rand(1, generator=generator))) ** layer
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn(1, len(noise), *size, generator=generator)
        noise = noise + discount**layer * interpolate(coarse, (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return noise / noise.std()


def _generator(seed: int, purpose: Literal["noise", "time"], step: int, example: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, purpose, step, example))
