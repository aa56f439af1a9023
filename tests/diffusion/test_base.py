"""Which folders are an SDXL, and what is said of the others."""

import json

import pytest
import torch

from lowrank_core import LowrankError
from lowrank_diffusion.base import load_base
from lowrank_diffusion.base_files import base_folder, check_base, identity_of
from lowrank_diffusion.config import BaseConfig

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
PARTS = (*NETWORKS, "tokenizer", "tokenizer_2", "scheduler")


@pytest.fixture
def folder(tmp_path):
    """As diffusers saves an SDXL, but for the numbers."""
    for part in PARTS:
        (tmp_path / part).mkdir()
    for part in NETWORKS:
        (tmp_path / part / "model.safetensors").write_bytes(b"none")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return tmp_path


def silent(text: str) -> None:
    pytest.fail(f"noted: {text}")


def test_a_whole_folder_passes(folder):
    check_base(folder, "base")


def test_another_pipeline_is_named(folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(LowrankError, match="base is a StableDiffusion3Pipeline, and adapters are trained for SDXL and"):
        check_base(folder, "base")


@pytest.mark.parametrize("content", [None, "no JSON", "[]"])
def test_a_folder_that_is_no_pipeline(folder, content):
    (folder / "model_index.json").unlink()
    if content is not None:
        (folder / "model_index.json").write_text(content)
    with pytest.raises(LowrankError, match=r"base is no diffusers folder: .* give the folder of an SDXL"):
        check_base(folder, "base")


def test_missing_parts_and_pickles_are_named(folder):
    (folder / "tokenizer_2").rmdir()
    with pytest.raises(LowrankError, match=r"base lacks tokenizer_2; give the folder of a whole SDXL"):
        check_base(folder, "base")
    (folder / "tokenizer_2").mkdir()
    (folder / "unet" / "model.safetensors").rename(folder / "unet" / "model.bin")
    with pytest.raises(LowrankError, match=r"base has no safetensors in unet, and nothing else is read"):
        check_base(folder, "base")


@pytest.mark.parametrize("path", ["no/such/folder", "nowhere", "/tmp/nowhere-at-all"])
def test_what_is_neither_a_folder_nor_a_hub_id(path):
    with pytest.raises(LowrankError, match=r"which is no folder that exists; give a diffusers folder or the file of"):
        base_folder(path, None, silent)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(LowrankError, match=r"which is a file; give a diffusers folder"):
        base_folder(str(tmp_path / "model.safetensors"), None, silent)


@pytest.mark.slow
def test_weights_that_are_none_are_one_sentence(folder):
    with pytest.raises(LowrankError, match=r"cannot be loaded \(.*\); give the folder of a whole SDXL"):
        load_base(str(folder), None, None, torch.float32, silent)
    with pytest.raises(LowrankError, match=r"base.vae is nowhere, and there is no such folder"):
        load_base(str(folder), "nowhere", None, torch.float32, silent)


def test_a_base_is_told_apart_by_what_it_consists_of(folder):
    config = BaseConfig(path=str(folder))
    text, vae = identity_of(config, ["text_encoder"]), identity_of(config, ["vae"])
    (folder / "vae" / "model.safetensors").write_bytes(b"others")
    assert identity_of(config, ["text_encoder"]) == text
    assert identity_of(config, ["vae"]) != vae
    own = BaseConfig(path=str(folder), vae=str(folder / "unet"))
    assert identity_of(own, ["vae"]) != identity_of(config, ["vae"])
    assert identity_of(own, ["text_encoder"]) == text
