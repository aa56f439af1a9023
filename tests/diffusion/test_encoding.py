"""Embedded captions and latents, against diffusers' own pipeline on an untrained tiny SDXL."""

import pytest
import torch

from lowrank_core import LowrankError
from lowrank_diffusion.encoding import Latents, PictureEncoder, Text, TextEncoders, sampled, vae_dtype

pytestmark = pytest.mark.filterwarnings("default")
CAPTIONS = ["a red star", "", "a small green moon at the left on a blue background", "an " * 60]


@pytest.fixture(scope="module")
def pipeline():
    from lowrank_diffusion.tiny.pretrain import untrained

    torch.manual_seed(0)
    return untrained()


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_text_is_what_the_pipeline_encodes(pipeline):
    hidden, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    text = TextEncoders.of(pipeline)(CAPTIONS)
    assert text.hidden.shape == (4, 32, 48 + 80)
    assert text.pooled.shape == (4, 80)
    assert torch.equal(text.hidden, hidden)
    assert torch.equal(text.pooled, pooled)


@torch.no_grad()
def test_pooling_is_at_the_first_end_token_of_the_second_encoder(pipeline):
    ids = pipeline.tokenizer_2(CAPTIONS[:1], padding="max_length", return_tensors="pt").input_ids
    end = ids[0].tolist().index(pipeline.tokenizer_2.eos_token_id)
    assert end == 4  # start, a, red, star
    last = pipeline.text_encoder_2(ids).last_hidden_state[0, end]
    pooled = TextEncoders.of(pipeline)(CAPTIONS[:1]).pooled[0]
    assert torch.allclose(pooled, pipeline.text_encoder_2.text_projection(last), atol=1e-6)


def test_text_encoders_can_be_trained_through(pipeline):
    TextEncoders.of(pipeline)(["a red star"]).hidden.sum().backward()
    weight = pipeline.text_encoder.get_input_embeddings().weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    pipeline.text_encoder.zero_grad()
    pipeline.text_encoder_2.zero_grad()


def test_captions_that_are_cut_off_are_found(pipeline):
    assert TextEncoders.of(pipeline).too_long(CAPTIONS) == [CAPTIONS[3]]


def test_a_batch_of_text_comes_apart_and_together():
    batch = Text(torch.rand(2, 3, 4), torch.rand(2, 5))
    again = Text.stacked(batch.unstacked())
    assert torch.equal(again.hidden, batch.hidden)
    assert torch.equal(again.pooled, batch.pooled)
    half = batch.to(dtype=torch.bfloat16)
    assert (half.hidden.dtype, half.pooled.dtype) == (torch.bfloat16, torch.bfloat16)


@torch.no_grad()
def test_latents_are_the_scaled_posterior_of_the_vae(pipeline, pixels):
    posterior = pipeline.vae.encode(pixels).latent_dist
    scale = pipeline.vae.config.scaling_factor
    latents = PictureEncoder(pipeline.vae)(pixels, ["a", "b"])
    for number, each in enumerate(latents):
        assert each.mean.shape == (4, 12, 20)
        assert torch.equal(each.mean, posterior.mean[number] * scale)
        assert torch.equal(each.std, posterior.std[number] * scale)


@torch.no_grad()
def test_a_draw_is_the_posteriors_own_with_our_generator(pipeline, pixels):
    from lowrank_diffusion.seeds import derive_seed

    latents = PictureEncoder(pipeline.vae)(pixels, ["a", "b"])
    drawn = sampled(latents, seed=3, step=5, examples=[8, 9])
    for number in range(2):
        generator = torch.Generator().manual_seed(derive_seed(3, "vae", 5, 8 + number))
        theirs = pipeline.vae.encode(pixels).latent_dist
        theirs.mean, theirs.std = theirs.mean[number : number + 1], theirs.std[number : number + 1]
        expected = theirs.sample(generator) * pipeline.vae.config.scaling_factor
        assert torch.allclose(drawn[number], expected[0], atol=1e-6)
    assert torch.equal(drawn[1:], sampled(latents[1:], 3, 5, [9]))
    assert not torch.equal(drawn, sampled(latents, 3, 6, [8, 9]))


@torch.no_grad()
def test_a_vae_with_latent_statistics_is_undone_by_the_pipeline(pipeline, pixels):
    vae = pipeline.vae
    before = vae.config.latents_mean, vae.config.latents_std
    mean, std = [1.0, -2.0, 0.5, 0.0], [2.0, 1.0, 0.5, 3.0]
    vae.register_to_config(latents_mean=mean, latents_std=std)
    try:
        latents = PictureEncoder(vae)(pixels[:1], ["a"])[0]
        # As the pipeline does before it decodes.
        shaped_mean, shaped_std = (torch.tensor(values).view(4, 1, 1) for values in (mean, std))
        undone = latents.mean * shaped_std / vae.config.scaling_factor + shaped_mean
        assert torch.allclose(undone, vae.encode(pixels[:1]).latent_dist.mean[0], atol=1e-5)
    finally:
        vae.register_to_config(latents_mean=before[0], latents_std=before[1])


def test_the_vae_runs_in_fp32_unless_bf16_is_asked_for():
    assert {name: vae_dtype(name) for name in ("fp32", "fp16", "bf16")} == {
        "fp32": torch.float32,
        "fp16": torch.float32,
        "bf16": torch.bfloat16,
    }


def test_nan_latents_name_the_picture(pipeline, pixels):
    broken = pixels.clone()
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(LowrankError, match=r"makes NaN of b.png in float32; set train.precision: fp32, or give .*fp16"):
        PictureEncoder(pipeline.vae)(broken, ["a.png", "b.png"])


def test_bf16_latents_are_kept_in_fp32(pipeline, pixels):
    from copy import deepcopy

    latents: Latents = PictureEncoder(deepcopy(pipeline.vae).to(torch.bfloat16))(pixels[:1], ["a"])[0]
    assert latents.mean.dtype == latents.std.dtype == torch.float32
    exact = PictureEncoder(pipeline.vae)(pixels[:1], ["a"])[0]
    assert torch.allclose(latents.mean, exact.mean, atol=0.05)
