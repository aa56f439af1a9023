"""What training writes, in the hands of others: LyCORIS and diffusers get from the files what we have in memory."""

import logging
import warnings

import numpy as np
import pytest
import torch
from ldm_layout import under_ldm_names, unet_layers
from PIL import Image
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RUN = [
    "name=small",
    "data.resolution=48",
    "data.bucket_step=16",
    "data.max_images=3",
    "adapter.rank=2",
    # Not conv_out: at this width LyCORIS cannot load its own LoKr of it (it takes the kernel for inputs).
    "adapter.target=[attn1.to_q,attn2.to_k,to_out.0,ff.net.0.proj,proj_in,resnets.0.conv1,conv_shortcut,"
    "downsamplers.0.conv,time_emb_proj,time_embedding.linear_1]",
    "adapter.text_encoders=true",
    "adapter.text_target=[q_proj,out_proj,fc2]",
    "cache.text=none",
    "train.steps=2",
    "train.lr=0.05",  # what is trained must show
    "train.warmup=0",
    "train.device=cpu",
    "track.validate_every=100",
    "sample.prompts=[]",
]
PLACES = {"unet": "unet", "text_encoder_one": "text_encoder", "text_encoder_two": "text_encoder_2"}


@pytest.fixture(scope="module", params=["lora", "loha", "lokr", "adalora", "lora+dora", "loha+dora", "lokr+dora"])
def trained(request, base, tmp_path_factory):
    """A run of each method."""
    from lowrank_diffusion.load import load_config
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import run

    out = tmp_path_factory.mktemp("peers") / request.param
    method, _, dora = request.param.partition("+")
    more = ["train.steps=8", "adapter.target_rank=1"] if method == "adalora" else []
    more += ["adapter.dora=true"] if dora else []
    run(load_config(None, [f"base.path={base}", *RUN, f"adapter.method={method}", *more]), out, Silent())
    return out


def pipeline(base):
    from diffusers import StableDiffusionXLPipeline

    made = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def answers(pipe) -> list[torch.Tensor]:
    """What the UNet and both text encoders give for fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    noisy, text, pooled = (torch.randn(s, generator=generator) for s in ((1, 4, 8, 8), (1, 32, 128), (1, 80)))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    tokens = torch.arange(32)[None]
    encoded = [encoder(tokens).last_hidden_state for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    return [pipe.unet(noisy, 500, encoder_hidden_states=text, added_cond_kwargs=added).sample, *encoded]


def with_ours(base, run):
    """The pipeline with the run's PEFT folders, or with its single file where PEFT has no form for it, read by us."""
    import lowrank_core

    pipe = pipeline(base)
    for place, name in PLACES.items():
        source = run / ("small.safetensors" if run.name in ("loha+dora", "lokr+dora") else place)
        lowrank_core.load(getattr(pipe, name), source).eval()
    return pipe


def with_level(encoder: nn.Module) -> nn.Module:
    """A text encoder with the level `text_model`, which versions of transformers have or have not."""
    if hasattr(encoder, "text_model"):
        return encoder
    root = nn.Module()
    root.text_model = encoder
    return root


def test_lycoris_reads_the_kohya_file_and_gives_the_same(trained, base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lycoris.kohya import create_network_from_weights
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)

    from safetensors.torch import load_file

    theirs = pipeline(base)
    plain = answers(theirs)
    # sd-scripts hands LyCORIS the original network; here it is diffusers' layers under the names they have there.
    layers = unet_layers(channels=(32, 48, 64), depths=(0, 1, 2), text=128, added=176)
    unet = under_ldm_names(theirs.unet, layers)
    encoders = [with_level(theirs.text_encoder), with_level(theirs.text_encoder_2)]
    path = trained / "small.safetensors"
    network, _ = create_network_from_weights(1.0, str(path), None, encoders, unet)
    assert len(network.unet_loras) + len(network.text_encoder_loras) == len(
        {key.partition(".")[0] for key in load_file(path)}
    )
    network.apply_to(encoders, unet, apply_text_encoder=True, apply_unet=True)
    network.eval()
    for ours, given, before in zip(answers(with_ours(base, trained)), answers(theirs), plain, strict=True):
        assert (ours - before).abs().max() > 1e-2
        torch.testing.assert_close(given, ours, rtol=1e-4, atol=2e-5)


def test_diffusers_loads_the_equal_lora_and_draws_the_same(trained, base, tmp_path):
    from lowrank_diffusion.infer.request import Request
    from lowrank_diffusion.infer.run import infer
    from lowrank_diffusion.infer.studio import Told
    from lowrank_diffusion.seeds import derive_seed

    if trained.name.startswith("lokr"):
        assert not (trained / "small_lora.safetensors").exists()
        return
    theirs = pipeline(base)
    theirs.load_lora_weights(trained, weight_name="small_lora.safetensors")
    for ours, given in zip(answers(with_ours(base, trained)), answers(theirs), strict=True):
        torch.testing.assert_close(given, ours, rtol=1e-4, atol=2e-5)
    request = Request([trained], ["a red circle"], steps=3, device="cpu", size="64", merged=False, out=tmp_path / "out")
    drawn = infer(request, Told())
    generator = torch.Generator().manual_seed(derive_seed(0, "sample", 1, 1))
    (picture,) = theirs(
        "a red circle", width=64, height=64, num_inference_steps=3, guidance_scale=5.0, generator=generator
    ).images
    ours = np.asarray(Image.open(drawn.images[0]), dtype=int)
    assert np.abs(ours - np.asarray(picture, dtype=int)).max() <= 1
