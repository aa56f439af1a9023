"""How wrong a prediction is: squares, or errors that outliers weigh less in."""

import torch
from torch import Tensor

from lowrank_diffusion.config import LossConfig


def squared_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each example, `(n,)`, computed in fp32."""
    return (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))


def errors(predicted: Tensor, target: Tensor, kept: Tensor, times: Tensor, settings: LossConfig) -> Tensor:
    """Each number's error by `settings.type`, in fp32 and in the shape of `predicted`, `(n, channels, height, width)`.

    With d the difference and c the threshold of its time step, `huber` is 2c (√(d² + c²) - c), which is d² where d is
    small and 2c|d| where it is large, and `smooth_l1` is that over c: 2|d| where d is large. They are the pseudo-Huber
    losses of Khrapov et al. (2024) as kohya's sd-scripts scales them.

    Args:
        predicted: by the UNet.
        target: what it should have answered.
        kept: the schedule's ᾱ, `(time steps,)`.
        times: `(n,)`.
        settings: type, threshold and its schedule.
    """
    square = (predicted.float() - target.float()).square()
    if settings.type == "l2":
        return square
    threshold = thresholds(kept.to(times.device), times, settings)[:, None, None, None]
    # √(d² + c²) - c loses small errors to rounding; this is the same number.
    smooth = 2 * square / ((square + threshold.square()).sqrt() + threshold)
    return threshold * smooth if settings.type == "huber" else smooth


def thresholds(kept: Tensor, times: Tensor, settings: LossConfig) -> Tensor:
    """The threshold c of each time step, `(n,)`: squares up to about there, absolute errors beyond.

    Khrapov et al.'s exponential schedule falls from 1 to `huber_c` as c^(t/T), since outliers do most harm in noisy
    steps; `snr` is (1 - c) / (1 + σ)² + c with σ² = (1 - ᾱ) / ᾱ, sd-scripts' default.
    """
    least = settings.huber_c
    if settings.huber_schedule == "exponential":
        return least ** (times.float() / len(kept))
    if settings.huber_schedule == "snr":
        sigma = ((1 - kept[times]) / kept[times]).sqrt()
        return (1 - least) / (1 + sigma).square() + least
    return torch.full((len(times),), least, device=times.device)
