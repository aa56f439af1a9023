"""What is offered as an adapter and is none: an error each, and a model that stays as it was."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

import lowrank_core
from lowrank_core import LoRA
from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files import convert, read, write
from lowrank_core.files.tensors import write_bytes


@pytest.fixture
def folder(adapted, tmp_path):
    """A PEFT folder that is whole."""
    lowrank_core.save(adapted(LoRA(rank=2, target_modules=["to_q", "conv_in"])), tmp_path / "adapter")
    return tmp_path / "adapter"


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


BROKEN = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "there is no file .*adapter_model"),
    "no json": (
        lambda f: (f / "adapter_config.json").unlink(),
        "no file .*adapter_config.json; a PEFT folder",
    ),
    "torn json": (lambda f: cut(f / "adapter_config.json", 30), "adapter_config.json is not JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no JSON object"),
    "empty": (lambda f: cut(f / "adapter_model.safetensors", 0), "is empty"),
    "no header": (lambda f: cut(f / "adapter_model.safetensors", 5), "is not a safetensors file"),
    "cut in the header": (lambda f: cut(f / "adapter_model.safetensors", 100), "is cut off: 100 bytes"),
    "cut in the data": (lambda f: cut(f / "adapter_model.safetensors", -9), "not a whole safetensors file"),
    "noise": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "is not a safetensors file"),
    "a pickle": (lambda f: torch.save({}, f / "adapter_model.safetensors"), "a zip archive, as torch.save writes"),
    "an old pickle": (
        lambda f: torch.save({}, f / "adapter_model.safetensors", _use_new_zipfile_serialization=False),
        "is a pickle: opening a pickle can run code",
    ),
    "a bin file": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "a .bin file"),
    "foreign keys": (
        lambda f: save_file({"base_model.model.head.weight": torch.ones(2)}, f / "adapter_model.safetensors"),
        "keys that belong to no lora module: base_model.model.head.weight",
    ),
    "no factors": (lambda f: save_file({}, f / "adapter_model.safetensors"), "holds no lora factors"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_peft_folder(folder, net, kind):
    damage, message = BROKEN[kind]
    damage(folder)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(LowrankError, match=message):
        lowrank_core.load(net, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_path_that_holds_no_adapter(tmp_path, folder):
    with pytest.raises(LowrankError, match=r"there is no file .*nowhere"):
        read(tmp_path / "nowhere")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(LowrankError, match=r"holds no adapter_config.json; give a PEFT folder"):
        read(tmp_path / "hollow")
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "hollow" / "model.safetensors")
    with pytest.raises(LowrankError, match=r"name one of its files: model.safetensors"):
        read(tmp_path / "hollow")
    with pytest.raises(LowrankError, match=r"no LoRA, LoHa, LoKr or AdaLoRA .* its keys are conv.weight"):
        read(tmp_path / "hollow" / "model.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(LowrankError, match=r"none.safetensors holds no tensors"):
        read(tmp_path / "none.safetensors")
    (folder / "adapter_model.safetensors").rename(tmp_path / "alone.safetensors")
    with pytest.raises(LowrankError, match=r"the weights of a PEFT folder; put its adapter_config.json beside it"):
        read(tmp_path / "alone.safetensors")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_either_file_of_a_peft_folder_stands_for_it(folder, file):
    assert list(read(folder / file)[0].modules) == list(read(folder)[0].modules)


def test_an_adapter_for_layers_of_other_shapes(folder, net):
    net.conv_in = torch.nn.Conv2d(4, 8, 5)
    with pytest.raises(LowrankError, match=r"conv_in has lora_A of shape \(2, 4, 3, 3\), expected \(2, 4, 5, 5\)"):
        lowrank_core.load(net, folder)
    assert not lowrank_core.configs_of(net)


def test_factors_for_layers_that_the_configuration_does_not_name(folder, net):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["to_q"]}))
    with pytest.raises(LowrankError, match="has factors for conv_in, which its target_modules do not name"):
        lowrank_core.load(net, folder)


def test_targets_without_factors_are_left_without_an_adapter(folder, net):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["to_q", "conv_in", "head"]}))
    lowrank_core.load(net, folder)
    assert set(lowrank_core.adapters_of(net)) == {"conv_in", "mid_blocks.0.to_q", "mid_blocks.1.to_q"}


def test_a_name_that_is_the_ending_of_another_is_told_apart(tmp_path):
    inner = torch.nn.Module()
    inner.proj = torch.nn.Linear(4, 4)
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4), "inner": inner})
    lowrank_core.inject(model, LoRA(rank=2, target_modules="proj", alpha_pattern={}))
    lowrank_core.save(model, tmp_path / "k.safetensors", "kohya")
    (file,) = read(tmp_path / "k.safetensors")
    assert list(file.modules) == ["proj"]
    from safetensors.torch import load_file

    save_file(load_file(tmp_path / "k.safetensors"), tmp_path / "bare.safetensors")
    fresh = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4), "inner": copy.deepcopy(inner)})
    lowrank_core.load(fresh, tmp_path / "bare.safetensors")
    assert list(lowrank_core.adapters_of(fresh)) == ["proj"]


def test_nothing_is_written_over(folder, adapted):
    model = adapted(LoRA(rank=3, target_modules=["to_q"]))
    with pytest.raises(LowrankError, match="adapter is there already; choose another name"):
        lowrank_core.save(model, folder)
    lowrank_core.save(model, folder, overwrite=True)
    assert read(folder)[0].config.rank == 3
    with pytest.raises(UsageError, match="format must be peft, kohya, lora or diffusers, got 'zip'"):
        lowrank_core.save(model, folder, "zip")
    with pytest.raises(UsageError, match=r"no adapter .other."):
        lowrank_core.save(model, folder, name="other", overwrite=True)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LowrankError, match=r"cannot write .*file: No space left on device; free some space"):
        write_bytes(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    with pytest.raises(LowrankError, match=r"cannot write to .*; choose another place"):
        write_bytes(path / "below", b"new")


def test_modules_trained_whole_that_do_not_fit(net, adapted, tmp_path):
    model = adapted(LoRA(rank=2, target_modules=["to_q"], modules_to_save=["head"]))
    lowrank_core.save(model, tmp_path / "adapter")
    net.head = torch.nn.Linear(12, 7)
    with pytest.raises(LowrankError, match=r"the trained copy of head does not fit the model: [^\n]*$"):
        lowrank_core.load(net, tmp_path / "adapter")
    assert not lowrank_core.configs_of(net)


def test_a_lokr_split_as_no_factor_splits_it_goes_everywhere_but_to_peft(tmp_path):
    shapes = {"a": ((2, 2), (8, 8)), "b": ((8, 2), (2, 8))}  # outputs split 2 x 8 in one layer, 8 x 2 in the other
    tensors = {
        f"lycoris_{name}.lokr_w{side}": torch.randn(shape)
        for name, pair in shapes.items()
        for side, shape in zip((1, 2), pair, strict=True)
    }
    save_file(tensors, tmp_path / "k.safetensors")
    model = torch.nn.ModuleDict({name: torch.nn.Linear(16, 16, bias=False) for name in shapes})
    weight = model["b"].weight.detach().clone()
    lowrank_core.load(model, tmp_path / "k.safetensors")
    change = torch.kron(tensors["lycoris_b.lokr_w1"], tensors["lycoris_b.lokr_w2"])
    torch.testing.assert_close(model["b"](torch.eye(16)).T, weight + change)
    message = (
        r"a has lokr_w1 of .* in a PEFT folder, because no decompose_factor .*; write a kohya file, or .* plain LoRA"
    )
    with pytest.raises(LowrankError, match=message.replace("a has", ". has")):
        lowrank_core.save(model, tmp_path / "peft")
    with pytest.raises(LowrankError, match="no decompose_factor splits all layers so"):
        convert(tmp_path / "k.safetensors", tmp_path / "peft", "peft", base=based(model, tmp_path))
    assert not (tmp_path / "peft").exists()
    lowrank_core.save(model, tmp_path / "again.safetensors", "kohya")
    files = read(tmp_path / "again.safetensors", {"": ["a", "b"]})
    write(files, tmp_path / "lora", "lora")
    assert read(tmp_path / "lora")[0].config.rank == 16
    with pytest.raises(LowrankError, match=r"shape \(2, 2\), expected .* for this layer|for a weight of 16 x 16"):
        lowrank_core.load(torch.nn.ModuleDict({n: torch.nn.Linear(16, 8) for n in shapes}), tmp_path / "k.safetensors")


def based(model, folder):
    tensors = {f"{name}.weight": torch.ones(16, 16) for name in lowrank_core.adapters_of(model)}
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_a_file_for_several_models_needs_a_model_that_is_known(tmp_path):
    keys = ["lora_unet_conv_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    save_file(
        {f"{k}.lora_{w}.weight": torch.ones(2, 2) for k in keys for w in ("up", "down")}, tmp_path / "k.safetensors"
    )
    with pytest.raises(LowrankError, match=r"k.safetensors holds nothing for this model"):
        lowrank_core.load(torch.nn.ModuleDict({"conv_in": torch.nn.Linear(2, 2)}), tmp_path / "k.safetensors")


def test_magnitudes_and_factors_belong_together(adapted, tmp_path):
    from safetensors.torch import load_file

    config = LoRA(rank=2, target_modules=["to_q"], weight_decompose="out")
    lowrank_core.save(adapted(config), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    whole, name = load_file(path), "base_model.model.mid_blocks.0.to_q."
    save_file({key: t for key, t in whole.items() if key != f"{name}lora_magnitude_vector"}, path)
    with pytest.raises(LowrankError, match=r"no lora_magnitude_vector for mid_blocks\.0\.to_q, which DoRA needs"):
        read(tmp_path / "adapter")
    factors = (f"{name}lora_A.weight", f"{name}lora_B.weight")
    save_file({key: tensor for key, tensor in whole.items() if key not in factors}, path)
    with pytest.raises(LowrankError, match=r"magnitudes without factors: mid_blocks\.0\.to_q"):
        read(tmp_path / "adapter")


def test_folders_for_several_models_need_a_model_that_is_known(net, adapted, tmp_path):
    for name in ("unet", "text_encoder_one"):
        lowrank_core.save(adapted(LoRA(rank=2, target_modules=["to_q"])), tmp_path / name)
    with pytest.raises(LowrankError, match="holds adapters for unet, te1, and this model is none that is known"):
        lowrank_core.load(net, tmp_path)


def test_a_merge_into_a_place_that_cannot_be_written_to(adapted, tmp_path):
    taken = tmp_path / "taken"
    taken.touch()
    base = tmp_path / "model.safetensors"
    save_file({"head.weight": torch.ones(6, 12)}, base)
    lowrank_core.save(adapted(LoRA(rank=2, target_modules=["head"])), tmp_path / "adapter")
    with pytest.raises(LowrankError, match=r"cannot write to .*: .*; choose another place"):
        convert(tmp_path / "adapter", taken / "out", "merged", base=base)
