"""Adapters out of two models: what a known adapter changed is found again, and what a rank keeps is said."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_core
from lowrank_core import LoHa, LoKr, LoRA
from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files import adapter_file_of, extract
from lowrank_core.files.merged import write_merged

TARGETS = ["conv_in", "pointwise", "to_q", "to_out.0"]
KNOWN = {
    "lora": LoRA(rank=2, alpha=3, target_modules=TARGETS),
    "loha": LoHa(rank=2, alpha=3, target_modules=TARGETS),
    "loha-tucker": LoHa(rank=2, alpha=3, target_modules=TARGETS, tucker=True),
}


@pytest.fixture
def models(net, adapted, tmp_path):
    """`models(config)`: a base, the base with a random adapter in its weights, both folders, and ΔW by layer."""

    def models(config, dtype=torch.float32):
        base, tuned = tmp_path / "base", tmp_path / "tuned"
        base.mkdir()
        save_file(copy.deepcopy(net).to(dtype).state_dict(), base / "model.safetensors")
        model = adapted(config)
        write_merged([adapter_file_of(model)], base, tuned)
        before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
        differing = [name for name in before if not torch.equal(before[name], after[name])]
        return base, tuned, {n.removesuffix(".weight"): (after[n].double() - before[n].double()) for n in differing}

    return models


@torch.no_grad()
def loaded(net, path):
    model = lowrank_core.load(copy.deepcopy(net), path).double()
    return {
        name: adapter.change(torch.zeros(adapter.geometry.weight_shape).double(), torch.float64)
        for name, adapter in lowrank_core.adapters_of(model).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "peft"])
@pytest.mark.parametrize(("known", "method"), [("lora", "lora"), ("loha", "loha"), ("loha-tucker", "loha")])
def test_a_known_adapter_is_found_again(net, models, tmp_path, known, method, form):
    base, tuned, changes = models(KNOWN[known])
    out = tmp_path / ("out.safetensors" if form == "kohya" else "out")
    done = extract(base, tuned, out, method=method, rank=2, form=form)
    found = loaded(net, out)
    assert set(found) == set(changes) == {layer.name for layer in done.layers}
    assert set(found) == set(lowrank_core.adapters_of(lowrank_core.load(copy.deepcopy(net), out)))
    for name, change in changes.items():
        assert float((found[name] - change).norm()) < 1e-3 * float(change.norm()), name
    assert done.kept_energy > 1 - 1e-6
    assert (done.unchanged, done.left_out) == (1, ())


@pytest.mark.parametrize("method", ["lora", pytest.param("loha", marks=pytest.mark.slow)])
def test_what_is_kept_is_what_the_file_has(net, models, tmp_path, method):
    base, tuned, changes = models(LoKr(rank=8, target_modules=TARGETS, factor=2))
    done = extract(base, tuned, tmp_path / "out", method=method, rank=2, form="peft")
    found = loaded(net, tmp_path / "out")
    energy = lost = 0.0
    for layer in done.layers:
        change = changes[layer.name]
        off = float((found[layer.name] - change).square().sum())
        assert layer.shape == tuple(change.shape)
        assert layer.energy == pytest.approx(float(change.square().sum()))
        assert layer.lost == pytest.approx(off, rel=1e-3)
        best = float(torch.linalg.svdvals(change.flatten(1))[2:].square().sum())
        # LoRA is the best of its rank, and a LoHa no worse.
        assert layer.lost == pytest.approx(best) if method == "lora" else layer.lost <= best * (1 + 1e-9)
        energy, lost = energy + layer.energy, lost + layer.lost
    assert done.kept_energy == pytest.approx(1 - lost / energy)
    assert 0.1 < done.kept_energy < 0.99


def test_small_layers_get_factors_of_their_own_rank(net, models, tmp_path):
    base, tuned, changes = models(LoKr(rank=8, target_modules=TARGETS, factor=2))
    done = extract(base, tuned, tmp_path / "out", rank=10, form="peft")
    assert {layer.name: layer.rank for layer in done.layers} == {
        name: min(10, *change.flatten(1).shape) for name, change in changes.items()
    }


def test_other_tensors_that_differ_are_named(models, tmp_path):
    base, tuned, _ = models(KNOWN["lora"])
    tensors = load_file(tuned / "model.safetensors")
    tensors["head.bias"] += 1
    save_file(tensors, tuned / "model.safetensors")
    assert extract(base, tuned, tmp_path / "out", rank=2, form="peft").left_out == ("head.bias",)


def test_embeddings_are_no_linear_layers(tmp_path):
    for number, name in enumerate(("base", "tuned")):
        tensors = {"text_model.embeddings.token_embedding.weight": torch.zeros(7, 4) + number}
        tensors["text_model.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(6, 4) + number
        (tmp_path / name / "text_encoder").mkdir(parents=True)
        save_file(tensors, tmp_path / name / "text_encoder" / "model.safetensors")
    done = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1, form="peft")
    assert [(layer.component, layer.name) for layer in done.layers] == [("te1", "text_model.encoder.layers.0.mlp.fc1")]
    assert done.left_out == ("text_model.embeddings.token_embedding.weight",)


def test_a_folder_of_one_network_says_which_it_is(models, tmp_path):
    base, tuned, _ = models(KNOWN["lora"])
    for folder in (base, tuned):
        (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    extract(base, tuned, tmp_path / "out.safetensors", rank=2)
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "out.safetensors"))
    extract(base, tuned, tmp_path / "out", rank=2, form="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "UNet2DConditionModel"


def test_models_of_different_dtypes(net, models, tmp_path):
    base, tuned, changes = models(KNOWN["lora"])
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, base / "model.safetensors")
    done = extract(base, tuned, tmp_path / "out", rank=6, form="peft")
    # What rounding the base took is a change too, also of the layer that was not adapted.
    assert {layer.name for layer in done.layers} == {*changes, "head"}


def refusal(base, tuned, out, **given):
    with pytest.raises(LowrankError) as caught:
        extract(base, tuned, out, **{"rank": 2, **given})
    return str(caught.value)


def test_what_cannot_be_extracted(models, tmp_path):
    base, tuned, _ = models(KNOWN["lora"])
    out, busy = tmp_path / "out", tmp_path / "busy.safetensors"
    busy.touch()
    assert "there is no file or folder" in refusal(base, tmp_path / "gone", out)
    (tmp_path / "empty").mkdir()
    assert "there are no safetensors weights in" in refusal(base, tmp_path / "empty", out)
    assert "every layer of" in refusal(base, base, out)
    assert "--rank 99 is more than any layer has, at most 12" in refusal(base, tuned, out, rank=99)
    with pytest.raises(UsageError, match="--method is one of lora, loha, got 'full'"):
        extract(base, tuned, out, method="full")
    assert "is there already; choose another name" in refusal(base, tuned, busy)
    assert "tuned is TUNED itself, and what is read" in refusal(base, tuned, tuned, overwrite=True)
    assert not out.exists()


def changed(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"head.weight": torch.zeros(5, 12)}),
            "head.weight is 6 x 12 in .*base and 5 x 12 in .*tuned",
        ),
        (lambda t: t.pop("head.weight"), "tuned lacks layers that .*base has: head.weight"),
        (lambda t: t.update({"more.weight": torch.zeros(5, 12)}), "base lacks layers that .*tuned has: more.weight"),
        (lambda t: t["head.weight"].fill_(torch.nan), "head.weight has numbers that are not finite"),
        (lambda t: t.update({"head.weight": torch.zeros(6, 12).char()}), r"head.weight is quantized \(int8\)"),
        (lambda t: t.update({"model.diffusion_model.a.weight": t["head.weight"].clone()}), "save it as a diffusers"),
    ],
)
def test_models_that_do_not_fit(models, tmp_path, change, message):
    base, tuned, _ = models(KNOWN["lora"])
    changed(tuned, change)
    with pytest.raises(LowrankError, match=message):
        extract(base, tuned, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_networks_of_different_kinds(models, tmp_path):
    base, tuned, _ = models(KNOWN["lora"])
    (base / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (tuned / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"]}))
    assert "holds unet and " in refusal(base, tuned, tmp_path / "out")
