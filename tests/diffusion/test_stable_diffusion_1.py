"""Stable Diffusion 1 through the same runs: one text encoder, no pooled text, no sizes, and kohya's other names."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank_core import LowrankError, UsageError
from lowrank_core.files.tensors import read_tensors
from lowrank_diffusion.base_files import check_base

SMALL = [
    "name=a",
    "data.resolution=48",
    "data.bucket_step=16",
    "data.max_images=4",
    "data.caption_dropout=0.5",
    "adapter.method=lora",
    "adapter.rank=2",
    "adapter.target=[to_q,to_v,proj_in]",
    "train.steps=2",
    "train.batch_size=2",
    "train.lr=0.2",
    "train.device=cpu",
    "sample.prompts=[a house]",
    "sample.steps=2",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Its four resolutions, small, untrained, as diffusers saves it; the scheduler is its usual one."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from lowrank_diffusion.tiny.networks import tiny_text_encoders, tiny_vae
    from lowrank_diffusion.tiny.tokenizer import tiny_tokenizer

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    encoder, _ = tiny_text_encoders(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 16, 32, 32),
        cross_attention_dim=48,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    folder = tmp_path_factory.mktemp("sd1")
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_run_and_all_that_reads_its_files(base, tmp_path):
    from diffusers import StableDiffusionPipeline

    from lowrank_diffusion.infer.request import Request
    from lowrank_diffusion.infer.run import infer
    from lowrank_diffusion.infer.studio import Told
    from lowrank_diffusion.load import load_config
    from lowrank_diffusion.plan import plan
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import run

    torch.set_num_threads(1)
    whole = [*SMALL, f"base.path={base}", "cache.text=none", "adapter.text_encoders=true"]
    config = load_config(None, whole)
    summary = run(config, tmp_path / "run", Silent())
    assert plan(config, pytest.fail).trainable_params == summary.trainable_params
    assert (tmp_path / "run" / "samples" / "step-2.png").is_file()
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {
        "unet", "text_encoder_one", "samples", "checkpoint",
    }  # fmt: skip
    assert "- stable-diffusion\n" in (tmp_path / "run" / "README.md").read_text()

    tensors, metadata = read_tensors(tmp_path / "run" / "a.safetensors")
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    modules = {name.partition(".")[0] for name in tensors}
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in modules
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in modules
    assert all(name.startswith(("lora_te_text_model_", "lora_unet_")) for name in modules)

    # diffusers reads both files with the pictures of our own drawing.
    request = Request([tmp_path / "run"], ["a house"], steps=3, device="cpu", merged=False, out=tmp_path / "drawn")
    picture = np.asarray(Image.open(infer(request, Told()).images[0]), dtype=int)
    from lowrank_diffusion.infer.drawing import draw, shots_of

    for file in ("a.safetensors", "a_lora.safetensors", None):
        pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        if file is not None:
            pipeline.load_lora_weights(tmp_path / "run", weight_name=file)
        given = {"seed": 0, "negative": None, "size": (48, 48), "steps": 3, "guidance": 5.0, "batch": 1}
        ((_, theirs),) = draw(pipeline, shots_of(["a house"], 1), **given)
        difference = np.abs(picture - np.asarray(theirs, dtype=int)).max()
        assert difference > 3 if file is None else difference <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_captions_that_are_cached_or_left_out(base, tmp_path):
    from lowrank_diffusion.base import load_base
    from lowrank_diffusion.encoding import TextEncoders
    from lowrank_diffusion.load import load_config
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import run

    torch.set_num_threads(1)
    for name, cache in (("none", "none"), ("disk", "disk")):
        small = [*SMALL, f"base.path={base}", "sample.prompts=[]", f"cache.text={cache}"]
        run(load_config(None, [*small, f"cache.folder={tmp_path / 'cache'}"]), tmp_path / name, Silent())
    assert losses(tmp_path / "none") == pytest.approx(losses(tmp_path / "disk"), rel=1e-5)
    pipeline = load_base(str(base), None, None, torch.float32, pytest.fail)
    text = TextEncoders.of(pipeline)(["a house", ""])
    expected, empty = pipeline.encode_prompt("a house", "cpu", 1, True)
    assert torch.equal(text.hidden, torch.cat([expected, empty]))
    assert text.pooled.shape == (2, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_word_of_its_own_is_for_sdxl(base):
    from lowrank_diffusion.base import load_base
    from lowrank_diffusion.load import load_config
    from lowrank_diffusion.pivotal import new_word

    config = load_config(None, ["pivotal.token=<pack>", "cache.text=none"])
    with pytest.raises(
        UsageError, match="token is for SDXL's two text encoders, and this base is Stable Diffusion 1; le"
    ):
        new_word(config, load_base(str(base), None, None, torch.float32, pytest.fail))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_one_file_is_the_folder_to_the_bit(base, tmp_path):
    from ldm_checkpoint import save_ldm

    from lowrank_diffusion.base import load_base
    from lowrank_diffusion.unpacking import unpacked

    folder = load_base(str(base), None, None, torch.float32, pytest.fail)
    path, notes = save_ldm(folder, tmp_path / "m.safetensors", v_pred=torch.empty(0)), []
    file = load_base(str(path), None, None, torch.float32, notes.append, config=str(base))
    assert notes == [f"{path} predicts v, as its tensor v_pred says"]
    for name in ("unet", "vae", "text_encoder"):
        expected, found = (getattr(pipeline, name).state_dict() for pipeline in (folder, file))
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    model = unpacked(str(path), "BASE")
    for part, name in (("unet", "unet"), ("te1", "text_encoder")):
        expected = getattr(folder, name).state_dict()
        # Beside what the network has, a file may hold numbers that follow from others.
        found = {key: tensor for key, tensor in model.networks[part].items() if not key.endswith("position_ids")}
        assert found.keys() == {key.removeprefix("text_model.") for key in expected}
        assert all(torch.equal(tensor, found[key.removeprefix("text_model.")]) for key, tensor in expected.items())
    assert type(file.scheduler) is type(folder.scheduler)
    assert file.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(
        LowrankError, match="tiny is of SDXL, and the file is of Stable Diffusion 1; give such a one as"
    ):
        load_base(str(path), None, None, torch.float32, print, config="tiny")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_stable_diffusion_2_is_named(base):
    unet = base / "unet" / "config.json"
    kept = unet.read_text()
    try:
        unet.write_text(json.dumps(json.loads(kept) | {"cross_attention_dim": 1024}))
        with pytest.raises(
            LowrankError,
            match="is a Stable Diffusion 2, and adapters are trained for SDXL and",
        ):
            check_base(base, "base")
    finally:
        unet.write_text(kept)
