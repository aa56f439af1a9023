"""Merged and extracted adapters draw what they stand for."""

import numpy as np
import pytest
import torch

import lowrank_core
from lowrank_core.files import combine, convert, extract

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
FORMS = {"kohya": "sum.safetensors", "diffusers": "sum_lora.safetensors", "peft": "sum"}


def difference(one, other) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(one - other).max())


@pytest.mark.parametrize("form", FORMS)
def test_a_merged_adapter_draws_what_both_draw_together(made, draw, tmp_path, form):
    out = tmp_path / FORMS[form]
    sources = [made.folder / name for name in ("lora.safetensors", "loha")]
    done = combine(sources, [0.7, 0.3], out, form=form, base=made.folder / "base")
    assert {layer.component for layer in done.layers} == {"unet", "te1", "te2"}
    (both,), _, _ = draw("lora.safetensors", "loha", weights=[0.7, 0.3])
    (merged,), result, _ = draw(out)
    assert difference(merged, both) <= 1
    assert set(result.merged) == {"unet", "text_encoder", "text_encoder_2"}
    for other in ({"weights": [1, 1]}, {"weights": [0.3, 0.7]}):
        assert difference(draw("lora.safetensors", "loha", **other)[0][0], both) > 8


def test_diffusers_loads_a_merged_file(made, draw, tmp_path):
    sources = [made.folder / name for name in ("lora", "loha")]
    combine(sources, [0.7, 0.3], tmp_path / "sum.safetensors", form="diffusers", base=made.folder / "base")
    (ours,), _, _ = draw(tmp_path / "sum.safetensors")
    pipeline = made.pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name="sum.safetensors")
    assert difference(by_diffusers(pipeline), ours) <= 1


def by_diffusers(pipeline):
    from lowrank_diffusion.seeds import derive_seed

    generator = torch.Generator().manual_seed(derive_seed(0, "sample", 1, 1))
    prompt = "a red circle on a blue background"
    drawn = pipeline(prompt, width=64, height=64, num_inference_steps=2, guidance_scale=5.0, generator=generator)
    return np.asarray(drawn.images[0], dtype=int)


@pytest.fixture(scope="module")
def tuned(made, tmp_path_factory):
    """The base with the LoHa in its weights."""
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    convert(made.folder / "loha", folder, "merged", base=made.folder / "base")
    return folder


@pytest.mark.parametrize(("method", "rank"), [("loha", 2), ("lora", 4)])
def test_an_extracted_adapter_draws_what_the_tuned_model_draws(made, draw, tuned, tmp_path, method, rank):
    done = extract(made.folder / "base", tuned, tmp_path / "out.safetensors", method=method, rank=rank)
    assert done.kept_energy > 1 - 1e-6
    assert {layer.component for layer in done.layers} == {"unet", "te1", "te2"}
    (known,), _, _ = draw("loha")
    (extracted,), _, _ = draw(tmp_path / "out.safetensors")
    (whole,), _, _ = draw("loha", base=str(tuned), weights=[0])
    assert difference(extracted, known) <= 1
    assert difference(extracted, whole) <= 1


def test_peft_loads_an_extracted_loha(made, tuned, tmp_path):
    from peft import PeftModel

    extract(made.folder / "base" / "unet", tuned / "unet", tmp_path / "out", method="loha", rank=2, form="peft")
    torch.manual_seed(0)
    unet, other = made.pipeline().unet, made.pipeline().unet
    made_inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 7}
    added = {
        "text_embeds": torch.randn(
            1, other.config.projection_class_embeddings_input_dim - 6 * other.config.addition_time_embed_dim
        ),
        "time_ids": torch.ones(1, 6),
    }
    made_inputs |= {
        "encoder_hidden_states": torch.randn(1, 5, other.config.cross_attention_dim),
        "added_cond_kwargs": added,
    }
    lowrank_core.load(unet, made.folder / "loha" / "unet")
    theirs = PeftModel.from_pretrained(other, tmp_path / "out")
    with torch.no_grad():
        wanted, found = unet(**made_inputs).sample, theirs(**made_inputs).sample
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
