"""The tiny SDXL as the package carries it: pre-trained, so that prompts decide what is drawn."""

from pathlib import Path

import numpy as np
import pytest

from lowrank_diffusion.base_files import base_folder
from lowrank_diffusion.tiny.drawings import COLOURS

FOLDER = base_folder("tiny", None, lambda line: None)
BACKGROUNDS = ["blue", "yellow", "green", "white", "purple", "red"]
SEEDS = 4


def test_it_takes_at_most_eight_megabytes():
    assert sum(file.stat().st_size for file in Path(FOLDER).rglob("*") if file.is_file()) < 8e6


def nearest(pixel: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.abs(pixel - np.array(COLOURS[name])).sum()))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_prompt_decides_background_and_shape():
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(FOLDER, add_watermarker=False, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [f"a large black circle on a {colour} background" for colour in BACKGROUNDS for _ in range(SEEDS)]
    noise = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)] * len(BACKGROUNDS)
    drawn = pipeline(prompts, generator=noise, num_inference_steps=15, guidance_scale=4, output_type="np").images * 255
    corners = [nearest(np.median(picture[:8, :8], axis=(0, 1))) for picture in drawn]
    middles = [nearest(np.median(picture[28:36, 28:36], axis=(0, 1))) for picture in drawn]
    asked = [colour for colour in BACKGROUNDS for _ in range(SEEDS)]
    assert np.mean([found == colour for found, colour in zip(corners, asked, strict=True)]) > 0.75
    assert np.mean([found == "black" for found in middles]) > 0.6
