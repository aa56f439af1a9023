"""kohya's files: names, alphas, and PEFT → kohya → PEFT without losing a bit."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_core
from lowrank_core import LoHa, LoKr, LoRA
from lowrank_core.errors import LowrankError
from lowrank_core.files import convert, read

TARGETS = ["conv_in", "pointwise", "to_q", "to_out.0", "head"]
PATTERNS = {"rank_pattern": {"to_q": 3, r"mid_blocks\.1\.to_out\.0": 5}, "alpha_pattern": {"head": 3.0, "to_q": 7}}
CONFIGS = {
    "lora": LoRA(rank=4, alpha=0.7, target_modules=TARGETS, **PATTERNS),
    "rslora": LoRA(rank=3, alpha=6, target_modules=TARGETS, rank_stabilized=True),
    "dora": LoRA(rank=4, alpha=6, target_modules=TARGETS, weight_decompose="out"),
    "loha": LoHa(rank=3, alpha=5, target_modules=TARGETS, **PATTERNS),
    "loha-tucker": LoHa(rank=3, alpha=5, target_modules=TARGETS, tucker=True, **PATTERNS),
    "lokr": LoKr(rank=2, alpha=3, target_modules=TARGETS, factor=2, **PATTERNS),
    "lokr-tucker": LoKr(rank=1, alpha=3, target_modules=TARGETS, tucker=True),
    "lokr-both": LoKr(rank=1, alpha=0.3, target_modules=TARGETS, decompose_both=True),
    "lokr-whole": LoKr(rank=16, alpha=8, target_modules=TARGETS),
    "lokr-whole-odd": LoKr(rank=16, alpha=5, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_from_peft_to_kohya_and_back_every_bit_is_kept(adapted, tmp_path, kind):
    lowrank_core.save(adapted(CONFIGS[kind]), tmp_path / "peft")
    done = convert(tmp_path / "peft", tmp_path / "k.safetensors", "kohya")
    assert (done.exact, done.lost_energy) == (True, 0)
    convert(tmp_path / "k.safetensors", tmp_path / "again", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def composed(tensors, name, shape):
    """What ComfyUI makes of a module: alpha over the rank it sees times the product, written out."""
    f = {key.removeprefix(name + "."): tensor.double() for key, tensor in tensors.items() if key.startswith(name + ".")}
    alpha = float(f["alpha"])
    if "lora_up.weight" in f:
        up, down = f["lora_up.weight"].flatten(1), f["lora_down.weight"].flatten(1)
        return (alpha / down.shape[0] * up @ down).view(shape)
    if "hada_t1" in f:
        sides = [
            torch.einsum("pqhw,qi,po->oihw", f[f"hada_t{s}"], f[f"hada_w{s}_b"], f[f"hada_w{s}_a"]) for s in (1, 2)
        ]
        return alpha / f["hada_w1_b"].shape[0] * sides[0] * sides[1]
    if "hada_w1_a" in f:
        product = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
        return (alpha / f["hada_w1_b"].shape[0] * product).view(shape)
    dim = None
    if "lokr_w1" not in f:
        dim, f["lokr_w1"] = f["lokr_w1_b"].shape[0], f["lokr_w1_a"] @ f["lokr_w1_b"]
    if "lokr_w2" not in f:
        dim = f["lokr_w2_b"].shape[0]
        f["lokr_w2"] = (
            torch.einsum("pqhw,qi,po->oihw", f["lokr_t2"], f["lokr_w2_b"], f["lokr_w2_a"])
            if "lokr_t2" in f
            else f["lokr_w2_a"] @ f["lokr_w2_b"]
        )
    first, second = f["lokr_w1"], f["lokr_w2"]
    first = first.reshape(*first.shape, *(1,) * (second.dim() - 2))
    return (1 if dim is None else alpha / dim) * torch.kron(first, second.contiguous()).reshape(shape)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "dora"])
def test_alpha_over_the_rank_that_readers_see_gives_pefts_scale(adapted, tmp_path, kind):
    model = adapted(CONFIGS[kind])
    lowrank_core.save(model, tmp_path / "k.safetensors", "kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    for path, adapter in lowrank_core.adapters_of(model).items():
        flat = "lycoris_" + path.replace(".", "_")
        expected = adapter.compose().detach().double()
        torch.testing.assert_close(composed(tensors, flat, expected.shape), expected, rtol=1e-5, atol=1e-6)


def unet_file(names):
    """A LoHa for these layers of a U-Net, of width 6."""
    factors = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 6), "hada_w2_a": (6, 2), "hada_w2_b": (2, 6)}
    return {f"{name}.{factor}": torch.randn(shape) for name in names for factor, shape in factors.items()}


BOTH_WAYS = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ),
    "lora_unet_down_blocks_0_resnets_1_conv1": (
        "lora_unet_input_blocks_2_0_in_layers_2",
        "down_blocks.0.resnets.1.conv1",
    ),
    "lora_unet_down_blocks_0_downsamplers_0_conv": (
        "lora_unet_input_blocks_3_0_op",
        "down_blocks.0.downsamplers.0.conv",
    ),
    "lora_unet_mid_block_resnets_1_time_emb_proj": (
        "lora_unet_middle_block_2_emb_layers_1",
        "mid_block.resnets.1.time_emb_proj",
    ),
    "lora_unet_mid_block_attentions_0_proj_in": ("lora_unet_middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
    "lora_unet_up_blocks_1_resnets_2_conv_shortcut": (
        "lora_unet_output_blocks_5_0_skip_connection",
        "up_blocks.1.resnets.2.conv_shortcut",
    ),
    "lora_unet_up_blocks_0_upsamplers_0_conv": ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
    "lora_unet_conv_in": ("lora_unet_input_blocks_0_0", "conv_in"),
    "lora_unet_time_embedding_linear_2": ("lora_unet_time_embed_2", "time_embedding.linear_2"),
    "lora_unet_add_embedding_linear_1": ("lora_unet_label_emb_0_0", "add_embedding.linear_1"),
}


@pytest.mark.parametrize("way", ["diffusers", "sgm"])
def test_sdxl_blocks_are_read_under_both_names_and_written_under_sgms(tmp_path, way):
    given = list(BOTH_WAYS) if way == "diffusers" else [sgm for sgm, _ in BOTH_WAYS.values()]
    save_file(unet_file(given), tmp_path / "given.safetensors")
    (file,) = read(tmp_path / "given.safetensors")
    assert file.component == "unet"
    assert set(file.modules) == {path for _, path in BOTH_WAYS.values()}
    convert(tmp_path / "given.safetensors", tmp_path / "written.safetensors", "kohya")
    written = {key.partition(".")[0] for key in load_file(tmp_path / "written.safetensors")}
    assert written == {sgm for sgm, _ in BOTH_WAYS.values()}


def test_no_two_layers_of_sdxl_have_one_name():
    from lowrank_core.files.sdxl import text_layers, to_sgm, unet_layers

    flat = [name.replace(".", "_") for name in unet_layers()]
    sgm = [to_sgm(name).replace(".", "_") for name in unet_layers()]
    # 70 transformer blocks of 10 linear layers, 11 transformers with 2 more, 17 residual blocks, 4 resamplings, 6 ends.
    assert len(flat) == 700 + 22 + 17 * 3 + 11 + 4 + 6
    assert len(set(flat) | set(sgm)) == 2 * len(flat)
    assert len(set(text_layers())) == len(text_layers())


def test_text_encoders_keep_their_level_in_files_whatever_the_model_has(tmp_path):
    names = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"]
    keys = [f"lora_te{te}_text_model_{name.replace('.', '_')}" for te in (1, 2) for name in names]
    save_file(unet_file(keys), tmp_path / "te.safetensors")
    files = read(tmp_path / "te.safetensors", {"te1": names, "te2": [f"text_model.{name}" for name in names]})
    assert [file.component for file in files] == ["te1", "te2"]
    assert list(files[0].modules) == names
    assert list(files[1].modules) == [f"text_model.{name}" for name in names]
    lowrank_core.files.write(files, tmp_path / "again.safetensors", "kohya")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "again.safetensors")} == set(keys)
    files = read(tmp_path / "again.safetensors", {"te1": [f"text_model.{name}" for name in names]})
    assert [(file.component, list(file.modules)) for file in files] == [
        ("te1", [f"text_model.{name}" for name in names])
    ]


def test_metadata_says_what_others_look_for(adapted, tmp_path):
    lowrank_core.save(adapted(CONFIGS["loha-tucker"]), tmp_path / "k.safetensors", "kohya")
    (file,) = read(tmp_path / "k.safetensors")
    assert file.metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(file.metadata["ss_network_args"]) == {"algo": "loha", "use_tucker": "True"}
    assert (file.metadata["ss_network_dim"], file.metadata["ss_network_alpha"]) == ("3", "5")
    assert len(file.metadata["sshs_model_hash"]) == 64


def test_a_module_without_alpha_has_scale_one_and_its_own_rank(tmp_path):
    tensors = unet_file(["lora_unet_conv_in", "lora_unet_conv_out"])
    tensors["lora_unet_conv_out.alpha"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "a.safetensors")
    (file,) = read(tmp_path / "a.safetensors")
    assert (file.scaling("conv_in"), file.scaling("conv_out")) == (1, 0.25)


def broken(**changes):
    tensors = unet_file(["lora_unet_conv_in", "lora_unet_conv_out"])
    for key, value in changes.items():
        name = f"lora_unet_conv_in.{key}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (broken(strange=torch.ones(1)), "keys that belong to no LoRA, LoHa or LoKr module: lora_unet_conv_in.strange"),
        (broken(hada_w2_b=None), "no whole loha adapter"),
        (broken(hada_w2_b=torch.ones(3, 6)), r"hada_w2_b of shape \(3, 6\), which does not fit hada_w1_a"),
        (broken(hada_w2_b=torch.ones(2)), r"expected 2 dimensions"),
        (broken(dora_scale=torch.ones(6, 1)), "dora_scale for some modules only"),
        (broken(dora_scale=torch.ones(2, 3)), r"dora_scale of shape \(2, 3\)"),
        (broken(alpha=torch.tensor(-1.0)), "alpha -1.0, expected a positive number"),
        (broken(alpha=torch.tensor(torch.inf)), "conv_in has alpha inf, expected a finite number"),
        (broken(alpha=torch.tensor(torch.nan)), "conv_in has alpha nan, expected a finite number; correct the file"),
        (broken(hada_w2_b=torch.full((2, 6), torch.nan)), "hada_w2_b with numbers that are not finite; take an earl"),
        (broken(hada_w2_b=torch.ones(2, 6).int()), "conv_in has hada_w2_b in int32, .* convert the file to bf16"),
        (broken(hada_w2_b=torch.ones(2, 6).to(torch.float8_e4m3fn)), "hada_w2_b in float8_e4m3fn, which"),
        (unet_file(["lora_unet_no_such_layer"]), r"not in SDXL: no_such_layer; give the model .* \(--base FOLDER"),
        (unet_file(["lora_unet_conv_in", "lora_unet_input_blocks_0_0"]), "names conv_in twice"),
        (
            broken() | {f"lora_unet_time_embedding_linear_1.lora_{w}.weight": torch.ones(2, 2) for w in ("up", "down")},
            "mixes algorithms",
        ),
        ({f"lora_unet_conv_in.hada_w{s}_{e}": torch.ones(0, 0) for s in (1, 2) for e in "ab"}, "rank 0"),
        (
            {**broken(), "lora_unet_conv_out.alpha": torch.ones(1), "lora_unet_proj.alpha": torch.ones(1)},
            "without factors",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LowrankError, match=message):
        read(tmp_path / "a.safetensors")


def test_names_that_a_model_does_not_have_are_an_error_and_it_stays_as_it_was(net, adapted, tmp_path):
    lowrank_core.save(adapted(CONFIGS["lora"]), tmp_path / "k.safetensors", "kohya")
    other = copy.deepcopy(net)
    del other.mid_blocks[1]
    before = str(other)
    with pytest.raises(LowrankError, match=r"layers that the model does not have: mid_blocks\.1\.to_out"):
        lowrank_core.load(other, tmp_path / "k.safetensors")
    assert str(other) == before


def test_two_modules_of_one_flat_name_are_refused(tmp_path):
    save_file(unet_file(["lycoris_a_b"]), tmp_path / "k.safetensors")
    with pytest.raises(LowrankError, match=r"a_b could be a_b or a\.b|a_b could be a\.b or a_b"):
        read(tmp_path / "k.safetensors", {"": ["a.b", "a_b"]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRA(rank=2, target_modules=["to_q"], modules_to_save=["head"]), "no place for modules trained whole"),
    ],
)
def test_what_a_kohya_file_cannot_hold_is_refused(adapted, tmp_path, config, message):
    with pytest.raises(LowrankError, match=message):
        lowrank_core.save(adapted(config), tmp_path / "k.safetensors", "kohya")


def test_embeddings_have_no_place_in_a_kohya_file(tmp_path):
    model = lowrank_core.inject(torch.nn.Sequential(torch.nn.Embedding(5, 4)), LoRA(rank=2, target_modules=["0"]))
    with pytest.raises(LowrankError, match=r"no place for embeddings \(0\)"):
        lowrank_core.save(model, tmp_path / "k.safetensors", "kohya")


def rewritten(adapted, tmp_path, **changes):
    """A file of a LoHa, with entries of its metadata changed."""
    lowrank_core.save(adapted(CONFIGS["loha"]), tmp_path / "k.safetensors", "kohya")
    (file,) = read(tmp_path / "k.safetensors")
    metadata = {**file.metadata, **{key.replace("__", "."): value for key, value in changes.items()}}
    save_file(load_file(tmp_path / "k.safetensors"), tmp_path / "changed.safetensors", metadata)
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lowrank__modules": "{"}, "has lowrank.modules in its metadata that is not JSON"),
        ({"lowrank__modules": '{"x": "a", "y": "a"}'}, "gives two modules one name in lowrank.modules of its metadata"),
        ({"lowrank__adapter_configs": "[]"}, "has lowrank.adapter_configs in its metadata that is not JSON"),
        (
            {"lowrank__adapter_configs": json.dumps({"": {"peft_type": "LOKR"}})},
            "holds loha factors, but its metadata says lokr",
        ),
        (
            {"lowrank__adapter_configs": json.dumps({"": {"peft_type": "LOHA", "r": 7}})},
            "has rank [35] for .*, but its metadata says 7",
        ),
    ],
)
def test_metadata_that_does_not_fit_the_factors(adapted, tmp_path, changes, message):
    with pytest.raises(LowrankError, match=message):
        read(rewritten(adapted, tmp_path, **changes))


def test_metadata_that_does_not_know_of_the_magnitudes(adapted, tmp_path):
    lowrank_core.save(adapted(CONFIGS["dora"]), tmp_path / "k.safetensors", "kohya")
    (file,) = read(tmp_path / "k.safetensors")
    metadata = {**file.metadata}
    metadata["lowrank.adapter_configs"] = metadata["lowrank.adapter_configs"].replace('"use_dora": true', '"r": 4')
    save_file(load_file(tmp_path / "k.safetensors"), tmp_path / "k.safetensors", metadata)
    with pytest.raises(LowrankError, match="has magnitudes for conv_in, but its metadata says otherwise; write it a"):
        read(tmp_path / "k.safetensors")


def test_modules_that_would_share_a_flat_name_are_not_written(tmp_path):
    inner = torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"a": inner, "a_b": torch.nn.Linear(2, 2)})
    lowrank_core.inject(model, LoRA(rank=1, target_modules=["a.b", "a_b"]))
    with pytest.raises(LowrankError, match=r"a_b and a\.b would both be called lycoris_a_b; write a PEFT folder"):
        lowrank_core.save(model, tmp_path / "k.safetensors", "kohya")


def test_the_writer_itself_takes_no_adalora(adapted):
    from lowrank_core.files.kohya_write import kohya_tensors

    model = adapted(lowrank_core.AdaLoRA(rank=3, target_rank=2, target_modules=["head"]))
    with pytest.raises(LowrankError, match="kohya files have no adalora; convert it to plain LoRA first"):
        kohya_tensors([lowrank_core.files.adapter_file_of(model)])
