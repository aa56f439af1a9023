"""A tiny untrained SDXL as a diffusers folder, and one LoRA and one LoHa on it in every form of file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lowrank_core
from lowrank_core import LoHa, LoRA
from lowrank_diffusion.infer.request import Request
from lowrank_diffusion.infer.run import infer
from lowrank_diffusion.infer.studio import Told

PROMPT = "a red circle on a blue background"
NETWORKS = {"unet": "unet", "text_encoder_one": "text_encoder", "text_encoder_two": "text_encoder_2"}


@dataclass(frozen=True)
class Made:
    """`base`, and beside it each of `lora` and `loha` as PEFT folders, kohya's file and diffusers' file."""

    folder: Path

    @property
    def base(self) -> str:
        return str(self.folder / "base")

    def pipeline(self):
        """The base, loaded by diffusers."""
        from diffusers import StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline.from_pretrained(self.base, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @staticmethod
    def adapt(pipeline, kind: str) -> None:
        """Put the adapter on in memory, with the very values that the files have."""
        for number, name in enumerate(NETWORKS.values()):
            torch.manual_seed(number)
            network = getattr(pipeline, name)
            targets = ["to_q", "to_k", "to_v", "to_out.0"] if name == "unet" else ["q_proj", "v_proj", "out_proj"]
            config = LoRA if kind == "lora" else LoHa
            lowrank_core.inject(network, config(rank=2, alpha=4, target_modules=targets))
            for parameter in lowrank_core.trainable_parameters(network):
                # Larger changes would saturate attention, which makes much of rounding.
                torch.nn.init.normal_(parameter, std=0.2 if kind == "lora" else 0.4)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    from lowrank_core.files import adapter_file_of, write
    from lowrank_core.files.model import layers_of_model
    from lowrank_diffusion.tiny.pretrain import untrained

    made = Made(tmp_path_factory.mktemp("infer"))
    torch.manual_seed(0)
    untrained().save_pretrained(made.base)
    for kind in ("lora", "loha"):
        pipeline = made.pipeline()
        made.adapt(pipeline, kind)
        networks = {place: getattr(pipeline, name) for place, name in NETWORKS.items()}
        for place, network in networks.items():
            lowrank_core.save(network, made.folder / kind / place)
        files = [adapter_file_of(network) for network in networks.values()]
        layers = {file.component: layers_of_model(n) for file, n in zip(files, networks.values(), strict=True)}
        write(files, made.folder / f"{kind}.safetensors", "kohya", layers)
        write(files, made.folder / f"{kind}_lora.safetensors", "diffusers", layers)
        lowrank_core.save(networks["unet"], made.folder / f"{kind}-unet")
    return made


@pytest.fixture
def draw(made, tmp_path):
    """`draw("loha", steps=2)`: pictures as arrays, the result, and what was noted; each call in a folder of its own."""

    def draw(*adapters, **given):
        notes = []
        values = {"prompts": [PROMPT], "base": made.base, "steps": 2, "device": "cpu", "size": "64"}
        values["out"] = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        result = infer(Request([made.folder / each for each in adapters], **values | given), Told(notes.append))
        return [np.asarray(Image.open(path), dtype=int) for path in result.images], result, notes

    return draw
