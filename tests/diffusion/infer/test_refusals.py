"""What `infer` does not do, and how it says so."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lowrank_core import LowrankError, UsageError
from lowrank_diffusion.infer.drawing import draw as sampled
from lowrank_diffusion.infer.drawing import shots_of
from lowrank_diffusion.infer.request import Request
from lowrank_diffusion.infer.run import infer
from lowrank_diffusion.infer.schedulers import SAMPLERS, make_scheduler
from lowrank_diffusion.infer.sources import Base, sources_of
from lowrank_diffusion.infer.studio import Told, slug


@pytest.fixture
def ask(tmp_path):
    """`ask(adapter, steps=0)` up to where a base would be loaded."""
    (tmp_path / "one.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")

    def ask(*adapters, **given):
        values = {"prompts": ["a circle"], "base": "nowhere", "out": tmp_path / "new", "device": "cpu"}
        infer(Request([tmp_path / each for each in adapters], **values | given), Told())

    return ask


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": []}, "an adapter draws what --prompt says; give at least one"),
        ({"images": 0}, "--images must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295, got -1"),
        ({"guidance": float("nan")}, "--guidance must be a number from 0, got nan"),
        ({"scheduler": "eular"}, "--scheduler is one of ddim, ddpm, dpm++"),
        ({"size": "64by64"}, "--size is WIDTHxHEIGHT, such as 1024x768, got '64by64'"),
        ({"size": "64x60"}, "--size takes multiples of 8, from 16, got 64x60"),
        ({"precision": "int8"}, "--precision is one of auto, fp32, bf16, fp16, got 'int8'"),
        ({"weights": [0.5, 0.5]}, "--weight is given 2 times for 1 adapters; give one for each, or none"),
        ({"weights": [float("inf")]}, "--weight must be a finite number, got inf"),
        ({"base": None}, "an adapter's files do not say which model they are for; give it with --base"),
    ],
)
def test_requests_that_cannot_be_meant(ask, given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        ask("one.safetensors", **given)


def test_an_adapter_is_asked_for(ask):
    with pytest.raises(UsageError, match="infer takes an adapter: the folder of a run"):
        ask()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone", None, "there is no file or folder"),
        ("old.ckpt", b"\x80\x02", "opening a pickle can run code, so it is never opened here"),
        ("picture.png", b"\x89PNG and so on", "is not a safetensors file; give one, or a PEFT folder"),
        ("cut.safetensors", b"\xff\x00\x00\x00\x00\x00\x00\x00{", "is cut off"),
    ],
)
def test_files_that_are_no_adapter_are_refused_before_a_base_is_loaded(ask, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LowrankError, match=re.escape(message)) as caught:
        ask(name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["gone.safetensors"], "there is no file"),
        (["word.safetensors:two words"], "'two words' is no word for embeddings: it has a space or a comma"),
        (
            ["word.safetensors", "again.safetensors:<BAG>"],
            "both bring the word <bag>; leave one out, or give it another",
        ),
        (["word.safetensors:<bag>_1", "again.safetensors:<bag>"], "both bring the word <bag>_1"),
        (
            ["half.safetensors"],
            "as many rows, at most 75, of clip_l and of clip_g: it has clip_l [2, 48]; give another",
        ),
        (["long.safetensors"], "it has clip_g [76, 80], clip_l [76, 48]; give another file"),
        (["uneven.safetensors"], "it has clip_g [1, 80], clip_l [2, 48]; give another file"),
    ],
)
def test_embeddings_that_cannot_be_meant(ask, tmp_path, asked, message):
    save_file({"clip_l": torch.ones(2, 48)}, tmp_path / "half.safetensors")
    for name, first, second in (("word", 2, 2), ("again", 2, 2), ("long", 76, 76), ("uneven", 2, 1)):
        tensors = {"clip_l": torch.ones(first, 48), "clip_g": torch.ones(second, 80)}
        save_file(tensors, tmp_path / f"{name}.safetensors", {"modelspec.trigger_phrase": "<bag>"})
    with pytest.raises(LowrankError, match=re.escape(message)):
        ask(embeddings=[str(tmp_path / each) for each in asked])


def make_run(folder, **values):
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "adapter_config.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "metrics.jsonl").touch()


def test_a_run_without_an_adapter_is_told_from_one_with(ask, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: pets\n")
    with pytest.raises(LowrankError, match="has no adapter yet; wait for its end, or go on with it by"):
        ask("run")


def test_another_tools_config_yaml_beside_an_adapter_makes_no_run_of_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "config.yaml").write_text("job: extension\n")
    (source,) = sources_of([tmp_path], print)
    assert (source.run, source.name) == (None, tmp_path.name)


def test_runs_that_do_not_go_together(ask, tmp_path):
    make_run(tmp_path / "one", base={"path": "a/b"})
    make_run(tmp_path / "two", base={"path": "c/d"})
    make_run(tmp_path / "three", base={"path": "a/b"}, loss={"prediction": "v_prediction"})
    with pytest.raises(UsageError, match=re.escape("these runs have different bases (a/b, c/d); choose one with")):
        ask("one", "two", base=None)
    with pytest.raises(UsageError, match="were trained to predict different things"):
        ask("one", "three", base=None)


def test_a_device_that_is_not_there(ask):
    with pytest.raises(LowrankError, match="device 'nothing' cannot be used here"):
        ask("one.safetensors", device="nothing")


@pytest.mark.parametrize(("is_folder", "message"), [(True, "already holds files"), (False, "is a file")])
def test_nothing_is_written_over(ask, tmp_path, is_folder, message):
    out = tmp_path / "out"
    if is_folder:
        out.mkdir()
        (out / "01-01-a-circle.png").touch()
    else:
        out.touch()
    with pytest.raises(LowrankError, match=f"{message}; choose a new or empty folder with --out"):
        ask("one.safetensors", out=out)


def test_prompts_in_names_of_files():
    assert slug("A red-haired Fox, 4k!") == "a-red-haired-fox-4k"
    assert slug("Käse") == "kase"
    assert slug("☃") == "picture"
    assert len(slug("word " * 50)) <= 40


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_every_scheduler_draws(made):
    pipeline = made.pipeline()
    own, shots = pipeline.scheduler, shots_of(["a circle"], 1)
    given = {"seed": 0, "negative": None, "size": (64, 64), "steps": 3, "guidance": 2.0, "batch": 1}
    for name in SAMPLERS:
        pipeline.scheduler = make_scheduler(own, name, Base("a/b"))
        ((_, picture),) = list(sampled(pipeline, shots, **given))
        assert np.asarray(picture).std() > 1, name


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_scheduler_that_cannot_end_in_pure_noise(made):
    own = made.pipeline().scheduler
    base = Base("a/b", prediction="v_prediction", zero_terminal_snr=True)
    with pytest.raises(UsageError, match=re.escape("HeunDiscreteScheduler cannot follow a schedule that ends in")):
        make_scheduler(own, "heun", base)
    config = make_scheduler(own, "ddim", base).config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    heun = make_scheduler(own, "heun", Base("a/b"))
    stand_in = make_scheduler(heun, None, base)
    with pytest.raises(UsageError, match=re.escape("which this base or run has; choose --scheduler ddim, euler or")):
        make_scheduler(stand_in, "heun", Base("a/b"))
    assert (type(stand_in).__name__, stand_in.config.rescale_betas_zero_snr) == ("DDIMScheduler", True)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k.replace("down_blocks.1", "down_blocks.7"): v for k, v in t.items()}, "does not have"),
        (lambda t: {k: v.repeat(1, 2) if k.endswith("lora_A.weight") else v for k, v in t.items()}, "for this layer"),
        (lambda t: {"some.thing": torch.ones(2)}, "its keys are some.thing"),
        (lambda t: {}, "holds no tensors"),
    ],
)
def test_adapters_that_do_not_fit_the_base(made, draw, tmp_path, change, message):
    path = tmp_path / "other.safetensors"
    save_file(change(load_file(made.folder / "lora_lora.safetensors")), path)
    with pytest.raises(LowrankError, match=re.escape(message)) as caught:
        draw(path)
    assert str(path) in str(caught.value)
    assert not list(tmp_path.glob("out-*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_embeddings_that_do_not_fit_the_base(draw, tmp_path):
    for name, width in (("wide", 768), ("red", 48)):
        save_file({"clip_l": torch.ones(2, width), "clip_g": torch.ones(2, 80)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        LowrankError, match=r"768 wide as clip_l, and the base's are 48 wide; give one that was trained"
    ):
        draw(embeddings=[str(tmp_path / "wide.safetensors")])
    with pytest.raises(UsageError, match=r"bring the word red, .* name another, as --embedding FILE:<red>"):
        draw(embeddings=[str(tmp_path / "red.safetensors")])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_kohya_file_for_real_sdxl(made, draw, tmp_path):
    path = tmp_path / "real.safetensors"
    name = "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 1280), f"{name}.lora_up.weight": torch.ones(1280, 2)}, path)
    with pytest.raises(LowrankError, match="names layers that are not in the model") as caught:
        draw(path)
    assert str(caught.value).startswith(f"{path} does not go onto this base: ")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_base_that_is_missing_or_no_sdxl(draw, tmp_path):
    with pytest.raises(LowrankError, match=r"--base is .*/gone, which is no folder that exists"):
        draw("lora-unet", base=str(tmp_path / "gone"))
    with pytest.raises(LowrankError, match=r"--vae is .*/gone, and there is no such folder"):
        draw("lora-unet", vae=str(tmp_path / "gone"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(LowrankError, match="adapters are trained for SDXL and Stable Diffusion 1; give one as --base"):
        draw("lora-unet", base=str(tmp_path / "other"))
    make_run(tmp_path / "run", base={"path": str(tmp_path / "gone")})
    with pytest.raises(LowrankError, match=r"base.path is .*/gone, which is no folder that exists"):
        draw(tmp_path / "run", base=None)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_pictures_that_come_out_as_nan_are_not_written(draw, tmp_path):
    with pytest.raises(LowrankError, match="came out as NaN in float32"):
        draw("lora-unet", weights=[1e30])
    assert not list(tmp_path.glob("out-*/*.png"))
