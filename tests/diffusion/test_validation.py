"""The validation loss is one number for one model, and another for another."""

from dataclasses import replace

import pytest
import torch

from lowrank_diffusion.config import LossConfig
from lowrank_diffusion.encoding import Latents, Text
from lowrank_diffusion.noise import TrainingNoise
from lowrank_diffusion.seeds import derive_seed
from lowrank_diffusion.validation import HeldOut, time_grid, validation_losses

KEPT = torch.linspace(0.999, 0.005, 100)
PROCESS = TrainingNoise(KEPT, "epsilon", 3, LossConfig(min_snr_gamma=5, noise_offset=0.1, type="huber"))
SHAPES = ((4, 6, 8), (4, 8, 6), (4, 8, 6))
GENERATOR = torch.Generator().manual_seed(0)
PICTURES = [
    HeldOut(
        10 + number,
        Latents(torch.randn(shape, generator=GENERATOR), torch.ones(shape)),
        Text(torch.full((7, 5), float(number)), torch.full((6,), float(number))),
        (48, 64, 0, number, 48, 64),
    )
    for number, shape in enumerate(SHAPES)
]


def scaled(factor: float):
    return lambda noisy, times, text, time_ids: noisy * factor


def by_hand(factor: float, picture: HeldOut, time: int) -> float:
    generator = torch.Generator().manual_seed(derive_seed(3, "validation", picture.number, time))
    noise = torch.randn(picture.latents.mean.shape, generator=generator)
    noisy = KEPT[time] ** 0.5 * picture.latents.mean + (1 - KEPT[time]) ** 0.5 * noise
    return (noisy * factor - noise).square().mean().item()


def test_time_steps_are_spread_over_the_schedule():
    assert time_grid(1000).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert time_grid(1000, 1).tolist() == [500]


def test_each_error_by_hand_unweighted_and_without_noise_offset():
    losses = validation_losses(PROCESS, PICTURES, scaled(0.7))
    assert losses.shape == (3, 8)
    expected = [[by_hand(0.7, picture, int(time)) for time in time_grid(100)] for picture in PICTURES]
    assert torch.allclose(losses, torch.tensor(expected), rtol=1e-5)


def test_it_is_the_same_number_twice_and_moves_with_the_model_and_the_seed():
    losses = validation_losses(PROCESS, PICTURES, scaled(0.7))
    torch.randn(5)
    assert torch.equal(validation_losses(PROCESS, PICTURES, scaled(0.7)), losses)
    assert not torch.equal(validation_losses(PROCESS, PICTURES, scaled(0.71)), losses)
    assert not torch.equal(validation_losses(replace(PROCESS, seed=4), PICTURES, scaled(0.7)), losses)


def test_shares_and_batches_change_nothing():
    losses = validation_losses(PROCESS, PICTURES, scaled(0.7))
    assert torch.equal(validation_losses(PROCESS, PICTURES[1:], scaled(0.7)), losses[1:])
    assert torch.equal(validation_losses(PROCESS, PICTURES, scaled(0.7), batch_size=3), losses)
    assert validation_losses(PROCESS, [], scaled(0.7)).shape == (0, 8)


def test_a_perfect_model_has_no_error():
    times_seen = []

    def perfect(noisy, times, text, time_ids):
        picture = PICTURES[int(text.pooled[0, 0])]
        times_seen.extend(times.tolist())
        assert text.hidden.shape == (len(times), 7, 5)
        assert time_ids.tolist() == [list(map(float, picture.time_ids))] * len(times)
        kept = KEPT[times, None, None, None]
        return (noisy - kept.sqrt() * picture.latents.mean) / (1 - kept).sqrt()

    assert validation_losses(PROCESS, PICTURES, perfect).max().item() == pytest.approx(0, abs=1e-6)
    assert times_seen == time_grid(100).tolist() * 3


def test_no_graph_is_kept():
    factor = torch.ones((), requires_grad=True)
    losses = validation_losses(PROCESS, PICTURES, lambda noisy, *_: noisy * factor)
    assert not losses.requires_grad
