"""Merged weights: the float64 sum, rounded once, whatever the layer; and what is wrong with a base."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_core
from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA
from lowrank_core.errors import LowrankError
from lowrank_core.files import adapter_file_of, convert, read, write
from lowrank_core.files.merged import write_merged

TARGETS = ["conv_in", "pointwise", "to_q", "to_out.0", "head"]
CONFIGS = {
    "lora": LoRA(rank=3, alpha=2, target_modules=TARGETS),
    "dora": LoRA(rank=3, alpha=2, target_modules=TARGETS, weight_decompose="out"),
    "loha": LoHa(rank=3, alpha=2, target_modules=TARGETS, alpha_pattern={"head": 7}),
    "loha-tucker-dora-in": LoHa(rank=3, alpha=2, target_modules=TARGETS, tucker=True, weight_decompose="in"),
    "lokr": LoKr(rank=2, alpha=3, target_modules=TARGETS, factor=2),
    "adalora": AdaLoRA(rank=4, target_rank=2, alpha=3, target_modules=TARGETS),
}


def base_of(net, folder, dtype=torch.float32):
    net = copy.deepcopy(net).to(dtype)
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merged_weight_is_the_float64_sum_rounded_once(net, adapted, tmp_path, kind, dtype):
    base = base_of(net, tmp_path / "base", dtype)
    model = adapted(CONFIGS[kind])
    report = write_merged([adapter_file_of(model)], base, tmp_path / "out")
    weights, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    lost = energy = 0.0
    for path, adapter in lowrank_core.adapters_of(model).items():
        before, after = weights.pop(f"{path}.weight").double(), merged.pop(f"{path}.weight")
        change = adapter.double().change(before, torch.float64)
        assert after.dtype == dtype
        off = (after.double() - (before + change)).abs()
        spacing = torch.finfo(dtype).eps * (before + change).abs() + torch.finfo(dtype).tiny
        assert (off <= spacing / 2 + 1e-12).all()
        lost, energy = lost + float(off.square().sum().detach()), energy + float(change.square().sum().detach())
    assert report.lost_energy == pytest.approx(lost / energy, rel=1e-3, abs=1e-13)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in weights.items())


def test_a_base_in_several_files_with_other_files_beside_them(net, adapted, tmp_path):
    state = net.state_dict()
    (tmp_path / "base").mkdir()
    for number, names in enumerate((list(state)[:4], list(state)[4:]), start=1):
        save_file({name: state[name] for name in names}, tmp_path / "base" / f"model-0000{number}-of-00002.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    model = adapted(LoRA(rank=2, target_modules=["to_q"], modules_to_save=["head"]))
    lowrank_core.save(model, tmp_path / "adapter")
    done = convert(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    assert done.keys == len(state)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    merged: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(file)
    trained = read(tmp_path / "adapter")[0].saved
    assert set(trained) == {"head.weight", "head.bias"}
    assert all(torch.equal(merged[name], tensor) for name, tensor in trained.items())


def test_layers_that_store_their_weight_the_other_way_round(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4))
    base = base_of(model, tmp_path / "base")
    lowrank_core.inject(model, LoRA(rank=2, target_modules=["0"], init_weights="random"))
    lowrank_core.save(model, tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "out", "merged", base=base)
    lowrank_core.merge(model)
    merged = load_file(tmp_path / "out" / "model.safetensors")["0.weight"]
    torch.testing.assert_close(merged, model[0].weight.detach(), rtol=0, atol=0)


def test_gpt2s_linear_layer(tmp_path):
    conv1d = type("Conv1D", (torch.nn.Module,), {})
    layer = conv1d()
    layer.nf, layer.weight = 6, torch.nn.Parameter(torch.randn(4, 6))
    model = torch.nn.ModuleDict({"c_attn": layer})
    base = base_of(model, tmp_path / "base")
    config = LoRA(rank=2, target_modules=["c_attn"], init_weights="random", other_fields={"fan_in_fan_out": True})
    lowrank_core.inject(model, config)
    lowrank_core.save(model, tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "out", "merged", base=base)
    lowrank_core.merge(model)
    merged = load_file(tmp_path / "out" / "model.safetensors")["c_attn.weight"]
    torch.testing.assert_close(merged, layer.weight.detach(), rtol=0, atol=0)


def merging(adapted, tmp_path, weights, message):
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    lowrank_core.save(adapted(LoRA(rank=2, target_modules=["to_q"], modules_to_save=["head"])), tmp_path / "adapter")
    with pytest.raises(LowrankError, match=message):
        convert(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_that_does_not_fit(net, adapted, tmp_path):
    state = {**net.state_dict(), "mid_blocks.0.to_q.weight": torch.ones(3, 3)}
    merging(
        adapted, tmp_path, state, r"mid_blocks.0.to_q has factors for a weight of 16 x 12, but the model's is 3 x 3"
    )


def test_a_base_without_the_layers(adapted, tmp_path):
    merging(adapted, tmp_path, {"other.weight": torch.ones(3, 3)}, "layers that the model does not have: mid_blocks")


def test_a_base_without_what_was_trained_whole(net, adapted, tmp_path):
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("head")}
    merging(adapted, tmp_path, state, r"the base has no head\.")


def test_a_quantized_base(net, adapted, tmp_path):
    state = {**net.state_dict(), "mid_blocks.0.to_q.weight": torch.ones(16, 12, dtype=torch.int8)}
    merging(adapted, tmp_path, state, r"mid_blocks.0.to_q.weight is quantized \(torch.int8\)")


def test_a_dtype_that_is_too_narrow(net, adapted, tmp_path):
    base = base_of(net, tmp_path / "base", torch.float16)
    model = adapted(LoRA(rank=2, alpha=1e9, target_modules=["head"]))
    with pytest.raises(LowrankError, match=r"merging into head.weight gives numbers that float16 cannot hold"):
        write_merged([adapter_file_of(model)], base, tmp_path / "out")


def test_a_part_for_a_model_that_the_base_does_not_hold_is_not_dropped(tmp_path):
    (tmp_path / "base" / "unet").mkdir(parents=True)
    save_file({"conv_in.weight": torch.ones(2, 2)}, tmp_path / "base" / "unet" / "model.safetensors")
    keys = ["lora_unet_conv_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    tensors = {f"{key}.lora_{way}.weight": torch.ones(2, 2) for key in keys for way in ("up", "down")}
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(LowrankError, match="the adapter has a part for te1, which is not in the base"):
        convert(tmp_path / "k.safetensors", tmp_path / "out", "merged", base=tmp_path / "base")


def test_an_adapter_of_another_model_than_the_base_holds(net, adapted, tmp_path):
    for part in ("unet", "text_encoder"):
        (tmp_path / "base").mkdir(exist_ok=True)
        base_of(net, tmp_path / "base" / part)
    write([adapter_file_of(adapted(CONFIGS["lora"]))], tmp_path / "text_encoder_two", "peft")
    with pytest.raises(LowrankError, match="the adapter's te2 is not in the base, which holds unet, te1"):
        convert(tmp_path / "text_encoder_two", tmp_path / "out", "merged", base=tmp_path / "base")


def test_weights_are_merged_anew_over_those_that_are_there(net, adapted, tmp_path):
    base = base_of(net, tmp_path / "base")
    lowrank_core.save(adapted(CONFIGS["lora"]), tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "merged", "merged", base=base)
    (tmp_path / "merged" / "old.txt").touch()
    convert(tmp_path / "adapter", tmp_path / "merged", "merged", base=base, overwrite=True)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["model.safetensors"]
