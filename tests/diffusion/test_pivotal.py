"""Runs that train a word beside the adapter, on a tiny SDXL in a few steps."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
SMALL = [
    "name=small",
    "data.resolution=48",
    "data.bucket_step=16",
    "data.max_images=4",
    "data.caption_dropout=0.3",
    "data.trigger=<pack>",
    "adapter.rank=2",
    "adapter.method=lora",
    "adapter.target=[attn2.to_q,attn2.to_v]",
    "cache.text=none",
    "train.steps=4",
    "train.batch_size=2",
    "train.lr=1e-2",
    "train.warmup=0",
    "train.device=cpu",
    "train.weight_decay=0.9",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=9",
    "track.validate_every=100",
    "sample.prompts=[]",
]
WORD = ["pivotal.token=<pack>", "pivotal.vectors=3", "pivotal.lr=0.01", "pivotal.until=0.75"]


@pytest.fixture(scope="module")
def fit(base):
    from lowrank_diffusion.load import load_config
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import run

    def fit(out, *overrides, observer=None):
        return run(load_config(None, [f"base.path={base}", *SMALL, *overrides]), out, observer or Silent())

    return fit


@pytest.fixture(scope="module")
def trained(fit, tmp_path_factory):
    out = tmp_path_factory.mktemp("pivotal") / "run"
    text = ["adapter.text_encoders=true", "sample.prompts=[a <pack>]", "sample.steps=1", "sample.every=4"]
    return out, fit(out, *WORD, *text, "pivotal.init=star", "pivotal.hold_spread=0")


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run):
    from lowrank_core.files.tensors import read_tensors

    return read_tensors(run / "small_embedding.safetensors")


def kept(run, step):
    """The vectors in a checkpoint."""
    from lowrank_core.files.tensors import read_tensors

    tensors, _ = read_tensors(run / "checkpoint" / f"step-{step:08}.safetensors")
    return {part: tensors[f"adapter/word/{part}"] for part in ("clip_l", "clip_g")}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_vectors_are_trained_up_to_the_pivot_without_decay_and_saved(trained, fit, base, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    out, summary = trained
    vectors, about = saved(out)
    assert {part: tuple(tensor.shape) for part, tensor in vectors.items()} == {"clip_l": (3, 48), "clip_g": (3, 80)}
    assert about["modelspec.architecture"].endswith("/textual-inversion")
    assert about["modelspec.trigger_phrase"] == "<pack>"
    assert not same(kept(out, 1), kept(out, 2))
    assert not same(kept(out, 2), kept(out, 3))
    assert same(kept(out, 3), kept(out, 4))
    assert same(kept(out, 4), vectors)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    for part, encoder in (("clip_l", pipeline.text_encoder), ("clip_g", pipeline.text_encoder_2)):
        star = encoder.get_input_embeddings().weight[pipeline.tokenizer("star").input_ids[1]]
        moved = (vectors[part] - star).abs()
        assert 1e-3 < moved.mean() < moved.max() < 0.0301  # three steps of Adam at the word's rate
    card = (out / "README.md").read_text()
    assert 'pipeline.load_textual_inversion(vectors["clip_g"], token="<pack>", tokenizer=pipeline.tokenizer_2' in card
    assert "`embedding:small_embedding`" in card
    # The base's own loss is that of the base's own reading of the word.
    plain = fit(tmp_path / "plain", "train.steps=1")
    assert not (tmp_path / "plain" / "small_embedding.safetensors").exists()
    assert plain.base_validation_loss == summary.base_validation_loss != summary.validation_loss
    assert summary.trainable_params > 3 * (48 + 80)


def test_the_run_draws_what_diffusers_draws_with_its_files(trained, base, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    from lowrank_diffusion.infer.request import Request
    from lowrank_diffusion.infer.run import infer
    from lowrank_diffusion.infer.studio import Told
    from lowrank_diffusion.seeds import derive_seed

    out, _ = trained
    theirs = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(out, weight_name="small_lora.safetensors")
    card = (out / "README.md").read_text()
    loading = [
        line for line in card.splitlines() if line.startswith(("from safetensors", "vectors =", "pipeline.load_t"))
    ]
    code = "\n".join(loading).replace("small_embedding", str(out / "small_embedding"))
    exec(code, {"pipeline": theirs})
    generator = torch.Generator().manual_seed(derive_seed(0, "sample", 1, 1))
    drawn = theirs("a <pack>", width=64, height=64, num_inference_steps=3, guidance_scale=5.0, generator=generator)

    def ours(*adapters, **given):
        values = {"prompts": ["a <pack>"], "steps": 3, "device": "cpu", "size": "64", "base": str(base)}
        values["out"] = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        result = infer(Request(list(adapters), **values | given), Told())
        return np.asarray(Image.open(result.images[0]), dtype=int), result

    picture, result = ours(out, merged=False)
    assert np.abs(picture - np.asarray(drawn.images[0], dtype=int)).max() <= 1
    recipe = json.loads(Image.open(result.images[0]).text["lowrank"])
    assert [(each["word"], each["file"]) for each in recipe["embeddings"]] == [
        ("<pack>", "small_embedding.safetensors")
    ]
    file = out / "small_embedding.safetensors"
    single, _ = ours(out / "small.safetensors", embeddings=[f"{file}:<other>"], prompts=["a <other>"], merged=False)
    assert np.abs(single - picture).max() == 0
    alone, _ = ours(embeddings=[str(file)])
    assert np.abs(alone - picture).max() > 3


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("overrides", "killed"),
    [
        (["train.ema=0.9", "prior.caption=a star", "prior.images=2", "prior.steps=1"], 2),
        (["adapter.text_encoders=true", "train.accumulate=2", "train.batch_size=1"], 3),
    ],
)
def test_a_killed_run_goes_on_with_the_same_bits(fit, tmp_path, overrides, killed):
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import resume

    class Stopping(Silent):
        def step_ended(self, row):
            if row.step == killed + 1:
                raise Killed

    overrides = [*WORD, *overrides, f"prior.path={tmp_path / 'class'}"]
    whole = fit(tmp_path / "whole", *overrides)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", *overrides, observer=Stopping())
    summary = resume(tmp_path / "killed", Silent())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert summary.validation_loss == whole.validation_loss
    assert summary.base_validation_loss == whole.base_validation_loss
    assert same(saved(tmp_path / "killed")[0], saved(tmp_path / "whole")[0])
    # Also a running average is, from the pivot on, what the adapter is trained with.
    assert same(saved(tmp_path / "whole")[0], kept(tmp_path / "whole", 4))
    if "train.ema=0.9" in overrides:
        # Two examples of one forward, or one of each of two.
        fit(tmp_path / "split", *overrides, "train.accumulate=2", "train.batch_size=1")
        assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_a_word_alone_learns_what_pictures_show(fit, tmp_path):
    import random

    from lowrank_diffusion.tiny.drawings import Drawing

    drawing, rng = Drawing("star", "red", "blue"), random.Random(0)
    for number in range(6):
        drawing.draw(64, 64, rng).save(tmp_path / f"{number}.png")
    pictures = [f"data.path={tmp_path}", "data.max_images=6", "data.resolution=64", "data.held_out=0.2"]
    told = ["data.caption='<pack>'", "data.caption_dropout=0", "base.path=tiny", "train.checkpoint_every=100"]
    rates = ["train.lr=1e-9", "pivotal.lr=0.02", "pivotal.until=1", "pivotal.hold_spread=0", "train.batch_size=3"]
    first = fit(tmp_path / "first", *WORD, *pictures, *told, *rates, "train.steps=1")
    summary = fit(tmp_path / "run", *WORD, *pictures, *told, *rates, "train.steps=16")
    assert summary.validation_loss < 0.8 * min(first.validation_loss, first.base_validation_loss)
