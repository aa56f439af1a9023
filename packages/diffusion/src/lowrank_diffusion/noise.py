"""What one step of training asks of the UNet: noisy latents, the right answer, and how much a mistake counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.config import LossConfig
from lowrank_diffusion.seeds import derive_seed

Prediction = Literal["epsilon", "v_prediction"]


def training_noise(scheduler: Mapping[str, Any], loss: LossConfig, seed: int) -> "TrainingNoise":
    """The noise that a base model was trained with, changed where the run's configuration says so.

    Args:
        scheduler: the configuration of the base's scheduler, whichever of diffusers' it is.
        loss: prediction, weights and the schedule's rescaling.
        seed: of the run.

    Raises:
        LowrankError: the scheduler has no betas (flow matching, EDM), or predicts neither noise nor v.
        UsageError: the schedule ends in pure noise, and the model predicts noise.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    found = scheduler.get("_class_name", "its scheduler")
    if "beta_schedule" not in scheduler:
        raise LowrankError(f"{found} of the base model has no beta_schedule, as SDXL's has; give an SDXL as base.path")
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
    return TrainingNoise(ddpm.alphas_cumprod, prediction, seed, loss.min_snr_gamma, loss.noise_offset)


_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


@dataclass(frozen=True)
class TrainingNoise:
    """Forward diffusion with a discrete schedule (Ho et al., 2020), uniform time steps, and the loss.

    What is drawn for example `i` of optimizer step `s` is a function of (seed, s, i) and drawn on the CPU. Splitting a
    batch over forwards, processes or machines therefore changes none of it.
    """

    alphas_cumprod: Tensor
    """`(time steps,)`, fp32: the share of the latents' variance that is left at each time step."""
    prediction: Prediction
    seed: int
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0

    def times(self, step: int, examples: Sequence[int]) -> Tensor:
        """Uniform time steps, `(examples,)`, int64."""
        draws = [
            torch.randint(len(self.alphas_cumprod), (1,), generator=_generator(self.seed, "time", step, example))
            for example in examples
        ]
        return torch.cat(draws)

    def noise(self, step: int, examples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Unit normal noise, `(examples, *shape)`, fp32, with `noise_offset` times a normal number on each channel."""
        return torch.stack([self._noise(_generator(self.seed, "noise", step, example), shape) for example in examples])

    def _noise(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        noise = torch.randn(*shape, generator=generator)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
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
        """Each example's weight, `(n,)`, fp32: 1, or min-SNR's (Hang et al., 2023).

        With SNR = ᾱ / (1 - ᾱ) they are min(SNR, γ) / SNR for noise and min(SNR, γ) / (SNR + 1) for v.
        """
        if self.min_snr_gamma is None:
            return torch.ones(len(times), device=times.device)
        kept = self.alphas_cumprod.double().to(times.device)[times]
        snr = kept / (1 - kept)
        if self.prediction == "v_prediction":
            return (snr.clamp(max=self.min_snr_gamma) / (snr + 1)).float()
        # min(SNR, γ) / SNR, written so that an SNR of 0 gives its limit.
        return (self.min_snr_gamma / snr).clamp(max=1).float()

    def loss(self, predicted: Tensor, target: Tensor, times: Tensor) -> Tensor:
        """The weighted squared error, a number; the sum of weighted errors over the count, as papers have it.

        The weights are not divided by their sum. So the loss of a batch is the mean of its halves' losses.
        """
        return (self.weights(times) * squared_errors(predicted, target)).mean()

    def _kept(self, times: Tensor) -> Tensor:
        return self.alphas_cumprod.to(times.device)[times, None, None, None]


def squared_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each example, `(n,)`, computed in fp32."""
    return (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))


def _generator(seed: int, purpose: Literal["noise", "time"], step: int, example: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, purpose, step, example))
