"""Pictures on the way: from the networks in training, with the scheduler that goes with what they learn."""

import pytest
import torch

from lowrank_core import LoRA, inject
from lowrank_diffusion.adapting import Adapters
from lowrank_diffusion.cached import CachedText
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.encoding import TextEncoders

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def untrained():
    from lowrank_diffusion.tiny.pretrain import untrained

    torch.manual_seed(0)
    pipeline = untrained()
    inject(pipeline.unet, LoRA(rank=1, target_modules=["to_q"]))
    return pipeline


def sampler(pipeline, loss):
    from lowrank_diffusion.samples import Sampler

    config = DiffusionConfig.model_validate(
        {
            "loss": loss,
            "data": {"resolution": 48, "bucket_step": 16},
            "sample": {"prompts": ["a house"], "steps": 3},
        }
    )
    text = CachedText(TextEncoders.of(pipeline), None, {}, torch.float32, "zeros")
    return Sampler(config, pipeline, Adapters({"unet": pipeline.unet}), text)


def test_the_scheduler_goes_with_what_is_learned(untrained):
    own = sampler(untrained, {})._pipeline.scheduler
    assert type(own) is type(untrained.scheduler)
    assert dict(own.config) == dict(untrained.scheduler.config)
    assert own is not untrained.scheduler
    found = sampler(untrained, {"prediction": "v_prediction", "zero_terminal_snr": True})._pipeline.scheduler.config
    assert (found.prediction_type, found.rescale_betas_zero_snr, found.timestep_spacing) == (
        "v_prediction",
        True,
        "trailing",
    )


def test_pictures_differ_by_what_the_answers_mean(untrained):
    (noise,) = sampler(untrained, {}).draw()
    (velocity,) = sampler(untrained, {"prediction": "v_prediction"}).draw()
    assert noise.size == velocity.size == (48, 48)
    assert noise.tobytes() != velocity.tobytes()
