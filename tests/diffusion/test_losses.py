"""Errors by type and threshold, by hand."""

import pytest
import torch
from pydantic import ValidationError

from lowrank_diffusion.config import LossConfig
from lowrank_diffusion.losses import errors, squared_errors, thresholds

KEPT = torch.tensor([1.0, 0.5, 0.2, 0.0])
"""σ² = (1 - ᾱ) / ᾱ is 0, 1, 4 and infinite."""


def one(difference: float, time: int = 0, **loss) -> float:
    predicted = torch.full((1, 1, 1, 1), 5.0 + difference)
    return errors(predicted, torch.full_like(predicted, 5.0), KEPT, torch.tensor([time]), LossConfig(**loss)).item()


def test_each_type_by_hand():
    # 3, 4, 5 is a right triangle: 2c (5 - 4) and 2 (5 - 4), in tenths.
    hand = {"l2": 0.09, "huber": 0.08, "smooth_l1": 0.2}
    for kind, value in hand.items():
        assert one(0.3, type=kind, huber_c=0.4, huber_schedule="constant") == pytest.approx(value, rel=1e-5)


def test_small_differences_are_squares_and_large_ones_absolute():
    constant = {"huber_c": 0.25, "huber_schedule": "constant"}
    # 2^-12, which 5 can carry in fp32; √(d² + c²) - c as it stands would keep one digit of it.
    assert one(2.0**-12, type="huber", **constant) == pytest.approx(2.0**-24, rel=1e-5)
    assert one(1000.0, type="huber", **constant) == pytest.approx(2 * 0.25 * (1000 - 0.25), rel=1e-5)
    assert one(-1000.0, type="smooth_l1", **constant) == pytest.approx(2 * (1000 - 0.25), rel=1e-5)


def test_thresholds_fall_from_one():
    times = torch.arange(4)
    drawn = {kind: thresholds(KEPT, times, LossConfig(huber_c=0.1, huber_schedule=kind)) for kind in SCHEDULES}
    for kind, expected in SCHEDULES.items():
        assert drawn[kind].tolist() == pytest.approx(expected, rel=1e-5)


SCHEDULES = {
    "constant": [0.1] * 4,
    "exponential": [1, 0.1**0.25, 0.1**0.5, 0.1**0.75],
    "snr": [1, 0.1 + 0.9 / 4, 0.1 + 0.9 / 9, 0.1],
}


def test_each_example_has_the_threshold_of_its_time_step():
    predicted = torch.full((2, 1, 1, 2), 3.0)
    each = errors(predicted, torch.zeros_like(predicted), KEPT, torch.tensor([0, 3]), LossConfig(type="smooth_l1"))
    assert each[:, 0, 0, 1].tolist() == pytest.approx([2 * (10**0.5 - 1), 2 * (9.01**0.5 - 0.1)], rel=1e-5)


def test_squares_are_the_mean_of_errors():
    batch = torch.arange(24.0).reshape(2, 3, 2, 2)
    whole = errors(batch, torch.ones_like(batch), KEPT, torch.tensor([0, 1]), LossConfig())
    assert torch.equal(whole.mean(dim=(1, 2, 3)), squared_errors(batch, torch.ones_like(batch)))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"debiased": True, "min_snr_gamma": 5}, "debiased and min_snr_gamma both weigh time steps; leave one of them"),
        ({"noise_offset": 0.1, "multires_noise": 6}, "noise_offset and multires_noise both shift whole areas; set one"),
        ({"min_timestep": 500, "max_timestep": 500}, "max_timestep is 500, not above min_timestep, 500"),
    ],
)
def test_choices_that_exclude_each_other(values, sentence):
    with pytest.raises(ValidationError, match=sentence):
        LossConfig(**values)
