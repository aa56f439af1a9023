"""Pictures from adapters of every form, beside pictures made with diffusers alone."""

import functools
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lowrank_diffusion.seeds import derive_seed

PROMPT = "a red circle on a blue background"
FORMS = ["loha", "loha.safetensors", "loha_lora.safetensors", "lora", "lora.safetensors", "lora_lora.safetensors"]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def difference(one, other) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(one - other).max())


def by_diffusers(pipeline, prompt=1, image=1):
    """What diffusers' pipeline draws with the generator that a recipe names."""
    generator = torch.Generator().manual_seed(derive_seed(0, "sample", prompt, image))
    drawn = pipeline(PROMPT, width=64, height=64, num_inference_steps=2, guidance_scale=5.0, generator=generator)
    return np.asarray(drawn.images[0], dtype=int)


@pytest.fixture(scope="module")
def plain(made):
    """The base's own picture."""
    return by_diffusers(made.pipeline())


@pytest.fixture(scope="module")
def in_memory(made):
    """`in_memory("loha")`: the picture with the adapter that was never written to a file."""

    @functools.cache
    def in_memory(kind):
        pipeline = made.pipeline()
        made.adapt(pipeline, kind)
        return by_diffusers(pipeline)

    return in_memory


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_the_picture_of_the_adapter_in_memory(draw, in_memory, plain, form):
    (picture,), result, _ = draw(form)
    assert result.merged == {"unet": True, "text_encoder": True, "text_encoder_2": True}
    assert difference(picture, in_memory(form[:4])) <= 1
    assert difference(picture, plain) > 8


def test_diffusers_own_loader_gives_the_same_picture(made, draw):
    pipeline = made.pipeline()
    pipeline.load_lora_weights(made.folder / "lora_lora.safetensors")
    (picture,), _, _ = draw("lora_lora.safetensors", merged=False)
    assert difference(picture, by_diffusers(pipeline)) <= 1


def test_beside_the_weights_or_in_them_is_one_picture(draw, in_memory):
    (beside,), result, notes = draw("loha", merged=False)
    assert result.merged == {"unet": False, "text_encoder": False, "text_encoder_2": False}
    assert notes == [f"{name}: adapters stay beside the weights" for name in result.merged]
    assert difference(beside, in_memory("loha")) <= 1


def test_weight_0_is_the_bases_picture(draw, plain):
    for merged in (True, False):
        (picture,), _, _ = draw("loha", weights=[0.0], merged=merged)
        assert difference(picture, plain) == 0


def test_adapters_add_up(draw, plain, in_memory):
    (canceled,), _, _ = draw("loha", "loha.safetensors", weights=[0.75, -0.75])
    assert difference(canceled, plain) <= 1
    (whole,), result, notes = draw("loha", "loha_lora.safetensors", weights=[0.25, 0.75])
    assert difference(whole, in_memory("loha")) <= 1
    assert [(adapter.name, adapter.weight) for adapter in result.adapters] == [("loha", 0.25), ("loha_lora", 0.75)]
    assert notes[0].startswith("unet: adapters merged into 136 layers")


def test_half_precision_keeps_adapters_beside_the_weights(draw, in_memory):
    (picture,), result, notes = draw("loha", weights=[0.01], precision="bf16")
    assert set(result.merged.values()) == {False}
    assert "is lost by rounding to bfloat16 when they are merged" in notes[0]
    (_,), result, _ = draw("loha", weights=[0.01], precision="bf16", merged=True)
    assert set(result.merged.values()) == {True}
    assert json.loads(Image.open(result.images[0]).text["lowrank"])["precision"] == "bf16"
    assert picture.std() > 1


def test_batches_change_no_picture(made, draw):
    given = {"prompts": [PROMPT, "a blue square"], "images": 2, "scheduler": "euler-a", "negative": "grey"}
    one, _, _ = draw("loha", **given)
    three, result, _ = draw("loha", batch=3, grid=True, **given)
    assert max(difference(a, b) for a, b in zip(one, three, strict=True)) <= 1
    assert min(difference(one[0], other) for other in one[1:]) > 5
    names = ["01-01-a-red-circle-on-a-blue-background.png", "01-02-a-red-circle-on-a-blue-background.png"]
    assert [path.name for path in result.images] == [*names, "02-01-a-blue-square.png", "02-02-a-blue-square.png"]
    # Rows are prompts, with four pixels between pictures.
    sheet = np.asarray(Image.open(result.grid), dtype=int)
    assert sheet.shape == (132, 132, 3)
    assert difference(sheet[68:, :64], three[2]) == 0
    assert [each["image_number"] for each in json.loads(Image.open(result.grid).text["lowrank"])] == [1, 2, 1, 2]


def test_the_recipe_is_in_the_file_and_makes_the_picture_again(made, draw):
    asked = {"prompts": ["ein Kreis ☃"], "negative": "grün", "seed": 7, "guidance": 3.5, "scheduler": "dpm++-karras"}
    (picture,), result, _ = draw("loha_lora.safetensors", weights=[0.5], **asked)
    with Image.open(result.images[0]) as image:
        parameters, recipe = image.text["parameters"], json.loads(image.text["lowrank"])
    assert parameters == (
        "ein Kreis ☃ <lora:loha_lora:0.5>\nNegative prompt: grün\n"
        f"Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 3.5, Seed: {derive_seed(7, 'sample', 1, 1)}, Size: 64x64, "
        "Model: base, Version: lowrank 0.1.0"
    )
    digest = hashlib.sha256((made.folder / "loha_lora.safetensors").read_bytes()).hexdigest()
    assert recipe["adapters"] == [{"name": "loha_lora", "weight": 0.5, "files": {"loha_lora.safetensors": digest}}]
    again, _, _ = draw(
        "loha_lora.safetensors",
        weights=[each["weight"] for each in recipe["adapters"]],
        scheduler="dpm++-karras",
        **{key: recipe[key] for key in ("negative", "seed", "steps", "guidance", "precision")},
        prompts=[recipe["prompt"]],
        size=f"{recipe['width']}x{recipe['height']}",
    )
    assert difference(again[0], picture) == 0


def test_a_run_knows_its_base_its_size_and_its_prediction(made, draw, tmp_path):
    run = shutil.copytree(made.folder / "loha", tmp_path / "run")
    tree = {
        "name": "pets",
        "base": {"path": made.base},
        "data": {"resolution": 96},
        "loss": {"prediction": "v_prediction", "zero_terminal_snr": True},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    (run / "metrics.jsonl").touch()
    (picture,), result, _ = draw(run, base=None, size=None)
    assert picture.shape == (96, 96, 3)
    assert (result.base, result.adapters[0].name) == (made.base, "pets")
    assert set(result.adapters[0].files) == {
        f"{place}/adapter_{part}"
        for place in ("unet", "text_encoder_one", "text_encoder_two")
        for part in ("config.json", "model.safetensors")
    }
    (epsilon,), _, _ = draw("loha", size="96")
    assert difference(picture, epsilon) > 5


def test_a_folder_for_one_network_and_a_vae_of_its_own(made, draw):
    (one,), result, _ = draw("loha-unet")
    assert result.merged == {"unet": True}
    (other,), _, _ = draw("loha-unet", vae=f"{made.base}/vae")
    assert difference(one, other) == 0


def test_the_bases_size_is_the_usual(draw):
    (picture,), _, _ = draw("loha-unet", size=None)
    assert picture.shape == (64, 64, 3)
