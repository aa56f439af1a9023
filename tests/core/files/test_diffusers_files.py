"""diffusers' LoRA files: a LoHa exported to one loads through load_lora_weights on a tiny SDXL and gives the same."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_core
from lowrank_core import AdaLoRA, LoHa, LoRA
from lowrank_core.errors import LowrankError
from lowrank_core.files import convert, read, write
from lowrank_core.files.diffusers_file import diffusers_tensors
from lowrank_core.files.model import layers_of_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def parts():
    """A U-Net and two text encoders of SDXL's topology and next to no width, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        cross_attention_dim=32,
        norm_num_groups=4,
    )
    width = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = CLIPTextConfig(**width, projection_dim=16, vocab_size=50, bos_token_id=0, eos_token_id=2)
    return unet.eval(), CLIPTextModel(text).eval(), CLIPTextModelWithProjection(text).eval()


@pytest.fixture(autouse=True)
def _one_thread():
    # Layers this small only wait for each other's threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapted(model, config):
    model = lowrank_core.inject(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in lowrank_core.trainable_parameters(model):
            parameter.normal_(std=0.3)
    return model.eval()


def pipeline(parts):
    unet, one, two = (copy.deepcopy(part) for part in parts)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    return StableDiffusionXLPipeline(vae, one, two, None, None, unet, EulerDiscreteScheduler())


def noise(unet):
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 32), (2, 16), (2, 6))]
    conditions = {"text_embeds": drawn[2], "time_ids": drawn[3]}
    with torch.no_grad():
        return unet(drawn[0], 7, encoder_hidden_states=drawn[1], added_cond_kwargs=conditions).sample


UNET_TARGETS = ["attn2.to_q", "attn1.to_out.0", "conv_shortcut", "downsamplers.0.conv", "conv_in", "proj_in"]
CONFIGS = {
    "loha": LoHa(rank=2, alpha=3, target_modules=UNET_TARGETS, rank_pattern={"proj_in": 3}),
    "loha-tucker": LoHa(rank=2, alpha=3, target_modules=UNET_TARGETS, tucker=True),
    "adalora": AdaLoRA(rank=3, target_rank=2, alpha=3, target_modules=UNET_TARGETS),
    "lora-dora": LoRA(rank=2, alpha=3, target_modules=UNET_TARGETS, weight_decompose="out"),
    "loha-dora": LoHa(rank=2, alpha=3, target_modules=UNET_TARGETS, weight_decompose="out"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loha", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(CONFIGS)[1:])])
def test_an_export_loads_through_diffusers_and_gives_the_same(parts, tmp_path, kind):
    ours = adapted(parts[0], CONFIGS[kind])
    lowrank_core.save(ours, tmp_path, "diffusers")
    pipe = pipeline(parts)
    pipe.load_lora_weights(tmp_path)
    plain = noise(parts[0])
    assert (noise(ours) - plain).abs().max() > 1e-2
    torch.testing.assert_close(noise(pipe.unet), noise(ours), rtol=1e-4, atol=1e-5)
    again = lowrank_core.load(copy.deepcopy(parts[0]), tmp_path)
    torch.testing.assert_close(noise(again), noise(ours), rtol=1e-4, atol=1e-5)


def encoded(model):
    with torch.no_grad():
        return model(torch.tensor([[0, 5, 9, 2]])).last_hidden_state


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", pytest.param("kohya", marks=pytest.mark.slow)])
def test_all_three_models_in_one_file(parts, tmp_path, form):
    config = LoRA(rank=2, alpha=3, target_modules=["q_proj", "out_proj", "fc1"])
    models = [adapted(parts[0], LoRA(rank=2, alpha=3, target_modules=UNET_TARGETS))]
    models += [adapted(part, config) for part in parts[1:]]
    files = [lowrank_core.files.adapter_file_of(model) for model in models]
    assert [file.component for file in files] == ["unet", "te1", "te2"]
    path = write(files, tmp_path / "all.safetensors", form)
    pipe = pipeline(parts)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    torch.testing.assert_close(noise(pipe.unet), noise(models[0]), rtol=1e-4, atol=1e-5)
    for theirs, ours, base in ((pipe.text_encoder, models[1], parts[1]), (pipe.text_encoder_2, models[2], parts[2])):
        torch.testing.assert_close(encoded(theirs), encoded(ours), rtol=1e-4, atol=1e-5)
        again = lowrank_core.load(copy.deepcopy(base), path)
        torch.testing.assert_close(encoded(again), encoded(ours), rtol=1e-5, atol=1e-6)
    # Folders of a pipeline's models, from the file alone.
    convert(path, tmp_path / "folders", "peft")
    assert sorted(p.name for p in (tmp_path / "folders").iterdir()) == ["text_encoder_one", "text_encoder_two", "unet"]
    folders = read(tmp_path / "folders")
    assert [file.component for file in folders] == ["unet", "te1", "te2"]
    again = lowrank_core.load(copy.deepcopy(parts[1]), tmp_path / "folders")
    torch.testing.assert_close(encoded(again), encoded(models[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_kohya_loha_of_a_small_unet_comes_back_by_both_names(parts, tmp_path):
    ours = adapted(parts[0], CONFIGS["loha"])
    lowrank_core.save(ours, tmp_path / "k.safetensors", "kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_q.hada_w1_a" in tensors
    save_file(tensors, tmp_path / "bare.safetensors")
    again = lowrank_core.load(copy.deepcopy(parts[0]), tmp_path / "bare.safetensors")
    torch.testing.assert_close(noise(again), noise(ours), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_merged_pipeline_gives_what_the_adapters_give(parts, tmp_path):
    for part, name in zip(parts, ("unet", "text_encoder", "text_encoder_2"), strict=True):
        part.save_pretrained(tmp_path / "base" / name)
    (tmp_path / "base" / "model_index.json").write_text("{}")
    unet = adapted(parts[0], CONFIGS["loha"])
    text = adapted(parts[1], LoHa(rank=2, target_modules=["q_proj"], weight_decompose="in"))
    files = [lowrank_core.files.adapter_file_of(model) for model in (unet, text)]
    layers = {file.component: layers_of_model(m) for file, m in zip(files, (unet, text), strict=True)}
    write(files, tmp_path / "k.safetensors", "kohya", layers)
    done = convert(tmp_path / "k.safetensors", tmp_path / "out", "merged", base=tmp_path / "base")
    assert done.lost_energy < 1e-10
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert (tmp_path / "out" / "text_encoder_2" / "model.safetensors").is_file()
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    torch.testing.assert_close(noise(merged), noise(unet), rtol=1e-4, atol=1e-5)
    merged = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    torch.testing.assert_close(encoded(merged), encoded(text), rtol=1e-4, atol=1e-5)


def lora(prefix, rank=2):
    return {f"{prefix}.lora_{x}.weight": torch.ones(s) for x, s in (("A", (rank, 4)), ("B", (4, rank)))}


def test_a_configuration_in_the_metadata_gives_the_scale(tmp_path):
    fields = {"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["conv_in"]}
    save_file(lora("unet.conv_in"), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
    assert read(tmp_path / "a.safetensors")[0].scaling("conv_in") == 3
    save_file(lora("unet.conv_in"), tmp_path / "b.safetensors")
    assert read(tmp_path / "b.safetensors")[0].scaling("conv_in") == 1


def test_an_alpha_beside_the_factors_gives_the_scale(tmp_path):
    save_file(lora("unet.conv_in") | {"unet.conv_in.alpha": torch.tensor(6.0)}, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors")[0].scaling("conv_in") == 3


def test_what_is_wrong_with_such_a_file_is_said(tmp_path):
    def error(tensors, message, metadata=None):
        save_file(tensors, tmp_path / "a.safetensors", metadata)
        with pytest.raises(LowrankError, match=message):
            read(tmp_path / "a.safetensors")

    error(lora("unet.x") | {"unet.x.weight": torch.ones(1)}, r"belong to no LoRA module: unet\.x\.weight")
    error(lora("unet.x") | {"unet.x.alpha": torch.tensor(0.0)}, "x has alpha 0.0, expected a positive number; correct")
    error({"unet.x.lora_A.weight": torch.ones(2, 4)}, "no whole lora adapter")
    error(lora("unet.x"), "lora_adapter_metadata in its metadata that is not JSON", {"lora_adapter_metadata": "{"})
    dora = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.use_dora": True})}
    error(lora("unet.x"), "x has no magnitude, but the file's metadata says otherwise; write the file anew", dora)


@pytest.mark.slow
def test_what_diffusers_cannot_take_is_refused(parts, tmp_path):
    decomposed = adapted(parts[0], LoRA(rank=2, target_modules=["to_q"], weight_decompose="in"))
    with pytest.raises(LowrankError, match="diffusers reads LoRA alone, and of DoRA's magnitudes those of the outputs"):
        lowrank_core.save(decomposed, tmp_path / "a", "diffusers")
    unknown = adapted(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRA(rank=2, target_modules=["0"]))
    with pytest.raises(LowrankError, match="diffusers needs to know which model an adapter is for"):
        lowrank_core.save(unknown, tmp_path / "a", "diffusers")
    saved = adapted(parts[0], LoRA(rank=2, target_modules=["to_q"], modules_to_save=["conv_out"]))
    with pytest.raises(LowrankError, match="no place for modules trained whole"):
        lowrank_core.save(saved, tmp_path / "a", "diffusers")
    whole = lowrank_core.files.adapter_file_of(adapted(parts[0], LoHa(rank=2, target_modules=["to_q"])))
    with pytest.raises(LowrankError, match=r"diffusers reads LoRA alone, .* convert the adapter to LoRA first"):
        diffusers_tensors([whole])
    words = adapted(parts[1], LoRA(rank=2, target_modules=["token_embedding"]))
    with pytest.raises(LowrankError, match="no place for embeddings"):
        lowrank_core.save(words, tmp_path / "a", "diffusers")


@pytest.mark.slow
def test_our_names_of_sdxls_layers_are_those_of_the_model():
    from lowrank_core.files.sdxl import text_layers, unet_layers

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            transformer_layers_per_block=(1, 2, 10),
            projection_class_embeddings_input_dim=2816,
            cross_attention_dim=2048,
        )
        text = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=64, num_hidden_layers=32, num_attention_heads=2, intermediate_size=64)
        )
    assert set(layers_of_model(unet)) == set(unet_layers())
    linear = {name for name, geometry in layers_of_model(text).items() if "embedding" not in name}
    assert linear == set(text_layers())
