"""The drawings the tiny SDXL learns from, and its untrained parts as one diffusers pipeline."""

import random

import numpy as np
import pytest

from lowrank_diffusion.tiny.drawings import COLOURS, SHAPES, Drawing, all_words, random_drawing


def near(pixel, colour: str) -> bool:
    return int(np.abs(np.array(pixel, dtype=int) - COLOURS[colour]).max()) <= 12


def test_a_drawing_shows_what_its_caption_says():
    drawing = Drawing("circle", "red", "blue", place="left")
    assert drawing.caption == "a red circle at the left on a blue background"
    picture = drawing.draw(64, 64, random.Random(0))
    assert near(picture.getpixel((17, 32)), "red")
    assert near(picture.getpixel((47, 32)), "blue")


def test_two_shapes_and_the_article_before_a_vowel():
    drawing = Drawing("star", "orange", "white", second=("square", "green"))
    assert drawing.caption == "an orange star and a green square on a white background"
    picture = drawing.draw(80, 48, random.Random(0))
    assert picture.size == (80, 48)
    assert near(picture.getpixel((58, 24)), "green")


def test_every_shape_covers_its_middle_or_its_side():
    for shape in SHAPES:
        pixels = np.asarray(Drawing(shape, "black", "white", "large").draw(64, 64, random.Random(0)), dtype=int)
        covered = (pixels.max(axis=2) < 60).mean()
        assert 0.05 < covered < 0.4, shape


def test_equal_seeds_draw_equal_pictures():
    first, second = (random_drawing(rng).draw(64, 64, rng) for rng in (random.Random(5), random.Random(5)))
    assert first.tobytes() == second.tobytes()


def test_captions_use_known_words_alone():
    rng = random.Random(0)
    words = {word for _ in range(500) for word in random_drawing(rng).caption.split()}
    assert words == set(all_words())


@pytest.fixture(scope="module")
def pipeline():
    from lowrank_diffusion.tiny.pretrain import untrained

    return untrained()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_every_word_is_one_token_and_the_end_is_the_largest(pipeline):
    tokenizer = pipeline.tokenizer
    for word in all_words():
        assert len(tokenizer(word)["input_ids"]) == 3, word
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    spelled = tokenizer.decode(tokenizer("Some other text!")["input_ids"], skip_special_tokens=True)
    assert spelled == "some other text !"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_it_fits_into_eight_megabytes_at_half_precision(pipeline):
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 7.8e6


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_it_has_the_blocks_of_sdxl(pipeline):
    from lowrank_diffusion import sdxl

    config = pipeline.unet.config
    same = (
        "down_block_types",
        "up_block_types",
        "layers_per_block",
        "addition_embed_type",
        "use_linear_projection",
    )
    for key in same:
        assert tuple(np.atleast_1d(config[key])) == tuple(np.atleast_1d(sdxl.UNET[key])), key


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_saved_folder_makes_pictures(pipeline, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    pipeline.save_pretrained(tmp_path)
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    again.set_progress_bar_config(disable=True)
    image = again("a red circle on a blue background", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
