"""The training step's noise, targets, weights and loss, against diffusers and against the formulas in float64."""

import numpy as np
import pytest
import torch

from lowrank_core import LowrankError, UsageError
from lowrank_diffusion.config import LossConfig
from lowrank_diffusion.losses import squared_errors
from lowrank_diffusion.noise import TrainingNoise, training_noise
from lowrank_diffusion.seeds import derive_seed

SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
V_ZERO = LossConfig(prediction="v_prediction", zero_terminal_snr=True)


def sdxl(seed: int = 3, **loss) -> TrainingNoise:
    return training_noise(SDXL, LossConfig(**loss), seed)


def exact(rescaled: bool = False) -> np.ndarray:
    """SDXL's ᾱ in float64, and Algorithm 1 of Lin et al."""
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if rescaled:
        root = np.sqrt(kept)
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return kept


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 6, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 500, 998, 999])


def test_the_schedule_is_the_bases():
    assert np.allclose(sdxl().alphas_cumprod.numpy(), exact(), rtol=3e-5)
    short = training_noise(SDXL | {"num_train_timesteps": 100}, LossConfig(), 0)
    assert len(short.alphas_cumprod) == 100


def test_rescaling_ends_in_pure_noise_and_keeps_the_first_step():
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    kept = training_noise(SDXL, V_ZERO, 0).alphas_cumprod
    assert kept[-1] == 0
    assert kept[0] == pytest.approx(1 - 0.00085, rel=1e-6)
    assert np.allclose(kept.double().numpy(), exact(rescaled=True), rtol=1e-3, atol=1e-9)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.equal(kept, (1 - rescale_zero_terminal_snr(betas)).cumprod(0))
    assert torch.equal(training_noise(SDXL | {"rescale_betas_zero_snr": True}, V_ZERO, 0).alphas_cumprod, kept)


def test_noisy_latents_and_targets_are_those_of_diffusers(batch):
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    latents, noise, times = batch
    for zero in (False, True):
        theirs = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero
        )
        ours = sdxl(prediction="v_prediction", zero_terminal_snr=zero)
        assert torch.allclose(ours.noisy(latents, noise, times), theirs.add_noise(latents, noise, times), atol=1e-6)
        velocity = theirs.get_velocity(latents, noise, times)
        assert torch.allclose(ours.target(latents, noise, times), velocity, atol=1e-6)
    assert torch.equal(sdxl().target(latents, noise, times), noise)


def test_noisy_latents_by_hand(batch):
    latents, noise, times = batch
    kept = exact()[times.numpy()][:, None, None, None]
    noisy = np.sqrt(kept) * latents.numpy() + np.sqrt(1 - kept) * noise.numpy()
    assert np.allclose(sdxl().noisy(latents, noise, times).numpy(), noisy, atol=1e-5)


def test_min_snr_weights_by_hand():
    times = torch.arange(1000)
    snr = exact() / (1 - exact())
    assert torch.equal(sdxl().weights(times), torch.ones(1000))
    epsilon = sdxl(min_snr_gamma=5).weights(times).numpy()
    assert np.allclose(epsilon, np.minimum(snr, 5) / snr, rtol=1e-4)
    velocity = sdxl(min_snr_gamma=5, prediction="v_prediction").weights(times).numpy()
    assert np.allclose(velocity, np.minimum(snr, 5) / (snr + 1), rtol=1e-4)
    assert epsilon.min() < 0.01
    assert epsilon.max() == 1


def test_debiased_weights_by_hand_and_that_v_and_noise_then_mean_the_same(batch):
    snr = exact() / (1 - exact())
    times = torch.arange(1000)
    assert np.allclose(sdxl(debiased=True).weights(times).numpy(), 1 / np.sqrt(snr), rtol=1e-4)
    # ᾱ = 0.8 has SNR 4: weights 1/2 and 2/5.
    kept = torch.tensor([0.8])
    weights = [
        TrainingNoise(kept, kind, 0, LossConfig(debiased=True)).weights(torch.tensor([0])).item()
        for kind in ("epsilon", "v_prediction")
    ]
    assert weights == pytest.approx([0.5, 0.4])
    # One wrong guess of the clean latents, told as noise and as v.
    latents, noise, times = (tensor[2:3].double() if tensor.is_floating_point() else tensor[2:3] for tensor in batch)
    losses = []
    for kind in ("epsilon", "v_prediction"):
        process = sdxl(debiased=True, prediction=kind)
        noisy, guess = process.noisy(latents, noise, times), latents + 0.1
        share = process.alphas_cumprod[times].double()[:, None, None, None]
        meant = (noisy - share.sqrt() * guess) / (1 - share).sqrt()
        losses.append(process.loss(process.target(guess, meant, times), process.target(latents, noise, times), times))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)


def test_pure_noise_has_a_finite_weight():
    last = torch.tensor([999])
    kept = training_noise(SDXL, V_ZERO, 0).alphas_cumprod
    gamma, debiased = LossConfig(min_snr_gamma=5), LossConfig(debiased=True)
    assert TrainingNoise(kept, "epsilon", 0, gamma).weights(last) == 1
    assert TrainingNoise(kept, "v_prediction", 0, gamma).weights(last) == 0
    assert TrainingNoise(kept, "v_prediction", 0, debiased).weights(last) == 0


def test_the_loss_is_the_weighted_mean_of_errors_in_fp32(batch):
    predicted, target, times = batch
    process = sdxl(min_snr_gamma=5)
    errors = ((predicted.double() - target.double()) ** 2).mean(dim=(1, 2, 3))
    expected = (errors * process.weights(times).double()).sum() / 5
    assert process.loss(predicted, target, times).item() == pytest.approx(expected.item(), rel=1e-6)
    half = squared_errors(predicted.half(), target.half())
    assert half.dtype == torch.float32
    assert torch.allclose(half, errors.float(), rtol=1e-2)


def test_a_split_batch_draws_the_same_numbers_and_has_the_same_loss():
    process = sdxl(min_snr_gamma=5, noise_offset=0.1)
    whole, halves = range(4), (range(2), range(2, 4))
    shape = (4, 8, 6)
    times, noise = process.times(7, whole), process.noise(7, whole, shape)
    assert torch.equal(times, torch.cat([process.times(7, half) for half in halves]))
    assert torch.equal(noise, torch.cat([process.noise(7, half, shape) for half in halves]))
    losses = [process.loss(noise[half], torch.zeros(2, *shape), times[half]) for half in (slice(2), slice(2, 4))]
    assert process.loss(noise, torch.zeros_like(noise), times).item() == pytest.approx(sum(losses).item() / 2)


def test_seed_step_and_example_each_change_what_is_drawn():
    shape = (4, 8, 8)
    drawn = [sdxl().noise(0, [0], shape), sdxl(seed=4).noise(0, [0], shape)]
    drawn += [sdxl().noise(1, [0], shape), sdxl().noise(0, [1], shape)]
    assert len({tensor.numpy().tobytes() for tensor in drawn}) == 4
    assert sdxl().times(0, range(50)).tolist() != sdxl().times(1, range(50)).tolist()


def test_time_steps_are_uniform_over_the_whole_schedule():
    times = sdxl().times(0, range(2000))
    counts = torch.histc(times.float(), 10, 0, 1000)
    assert times.min() < 10
    assert 990 <= times.max() < 1000
    assert counts.min() > 140  # of 200 expected, four standard deviations
    assert counts.max() < 260


def test_time_steps_of_a_range_stay_in_it():
    for kind in ("uniform", "logit_normal"):
        times = sdxl(timesteps=kind, timestep_std=9.0, min_timestep=200, max_timestep=203).times(0, range(200))
        assert set(times.tolist()) == {200, 201, 202}
    assert sdxl(min_timestep=900).times(0, range(400)).min() >= 900
    assert torch.equal(sdxl(max_timestep=1000).times(0, range(9)), sdxl().times(0, range(9)))
    # A sigmoid that rounds to 1.
    assert sdxl(timesteps="logit_normal", timestep_mean=90).times(0, [0]) == 999


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5)])
def test_logit_normal_time_steps_have_that_distribution(mean, std):
    from scipy.stats import kstest, norm

    times = sdxl(timesteps="logit_normal", timestep_mean=mean, timestep_std=std).times(0, range(2000))
    share = (times.double().numpy() + 0.5) / 1000
    assert kstest(np.log(share / (1 - share)), norm(mean, std).cdf).pvalue > 0.01


def stretched(small: int, large: int) -> np.ndarray:
    """Bilinear interpolation as a matrix, with pixels as areas."""
    places = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(small)))


def test_multiresolution_noise_by_hand():
    shape, discount, layers, sizes = (3, 8, 6), 0.5, 2, set()
    for place in range(10):
        generator = torch.Generator().manual_seed(derive_seed(3, "noise", 6, place))
        total = torch.randn(*shape, generator=generator).double().numpy()
        torch.rand(1, generator=generator)
        total += torch.randn(1, *shape, generator=generator)[0].double().numpy()
        ratio = 2 + 2 * torch.rand(1, generator=generator).item()
        height, width = int(8 / ratio), int(6 / ratio)
        sizes.add((height, width))
        coarse = torch.randn(1, 3, height, width, generator=generator)[0].double().numpy()
        total += discount * stretched(height, 8) @ coarse @ stretched(width, 6).T
        drawn = sdxl(multires_noise=layers, multires_discount=discount).noise(6, [place], shape)[0]
        assert np.allclose(drawn.numpy(), total / total.std(ddof=1), atol=1e-5)
    assert len(sizes) > 1


def test_multiresolution_noise_has_unit_variance_and_more_of_the_coarse():
    plain, coarse = (
        sdxl(multires_noise=layers, multires_discount=0.8).noise(0, range(20), (4, 32, 24)) for layers in (0, 6)
    )
    assert torch.allclose(coarse.std(dim=(1, 2, 3)), torch.ones(20), atol=1e-5)
    means = [noise.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(-1, -2)).std() for noise in (plain, coarse)]
    assert means[0].item() == pytest.approx(1 / 8, rel=0.1)
    assert means[1] > 1.5 * means[0]


def test_noise_offset_shifts_whole_channels():
    shape = (4, 64, 64)
    plain, shifted = (sdxl(noise_offset=offset).noise(0, range(30), shape) for offset in (0.0, 0.5))
    shift = shifted - plain
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-5)
    assert shift[:, :, 0, 0].std() == pytest.approx(0.5, rel=0.25)
    assert plain.std() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("changed", "loss", "message"),
    [
        ({"beta_schedule": None}, LossConfig(), "FlowMatch of the base model has no beta_schedule, and adapters are"),
        ({"prediction_type": "sample"}, LossConfig(), "has prediction_type sample; set loss.prediction to epsilon or"),
        ({}, LossConfig(max_timestep=1001), "time steps 0 to 999; loss.min_timestep is 0 and loss.max_timestep 1001"),
        ({}, LossConfig(min_timestep=1000), "loss.min_timestep is 1000 and loss.max_timestep not given, so lower them"),
        ({"rescale_betas_zero_snr": True}, LossConfig(), "ends in pure noise, which a model that predicts noise"),
    ],
)
def test_schedulers_that_cannot_be_trained_on(changed, loss, message):
    scheduler = {key: value for key, value in (SDXL | changed).items() if value is not None}
    with pytest.raises(LowrankError, match=message) as raised:
        training_noise(scheduler | {"_class_name": "FlowMatch"}, loss, 0)
    assert isinstance(raised.value, UsageError) == ("pure noise" in message or "_timestep" in message)
