"""`lowrank convert`."""

import json

import pytest
import torch

import lowrank_core
from lowrank_core import LoHa


@pytest.fixture
def folder(tmp_path):
    """A PEFT folder of a LoHa on a linear layer and a convolution, and the base model's weights beside it."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Conv2d(4, 6, 3))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    lowrank_core.inject(model, LoHa(rank=2, target_modules=["0", "1"], init_weights="random"))
    lowrank_core.save(model, tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--to", "kohya"), {"format": "kohya", "keys": 10, "rank": 2, "exact": True, "lost_energy": 0.0}),
        (("--to", "peft"), {"format": "peft", "keys": 8, "rank": 2, "exact": True, "lost_energy": 0.0}),
        (("--to", "lora", "--base"), {"format": "lora", "keys": 4, "rank": 4, "exact": True, "lost_energy": 0.0}),
    ],
)
def test_json(lowrank, folder, arguments, wanted):
    base = [str(folder / "base")] if "--base" in arguments else []
    dest = folder / ("out.safetensors" if "kohya" in arguments else "out")
    outcome = lowrank("convert", str(folder / "adapter"), str(dest), *arguments, *base, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == wanted
    assert dest.exists()


def test_truncation_says_what_it_lost(lowrank, folder):
    arguments = (str(folder / "adapter"), str(folder / "out"), "--to", "lora", "--base", str(folder / "base"))
    outcome = lowrank("convert", *arguments, "--rank", "1", "--json")
    said = json.loads(outcome.out)
    assert (said["rank"], said["exact"]) == (1, False)
    assert 0 < said["lost_energy"] < 1
    plain = lowrank("convert", *arguments, "--rank", "1", "--overwrite")
    assert plain.out == f"{folder / 'out'}: 4 tensors, rank 1, {said['lost_energy']:.3g} of the energy lost\n"


def test_merged_weights(lowrank, folder):
    arguments = (str(folder / "adapter"), str(folder / "out"), "--to", "merged", "--base", str(folder / "base"))
    said = json.loads(lowrank("convert", *arguments, "--json").out)
    assert said["format"] == "merged"
    assert said["rank"] is None
    assert said["keys"] == 4
    assert 0 < said["lost_energy"] < 1e-10
    assert (folder / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--to", "zip"), 2, "the form must be one of peft, kohya, lora, diffusers, merged, got 'zip'"),
        (("--to", "merged"), 2, "merged weights need the model's own; give its folder (--base FOLDER)"),
        (("--to", "peft", "--rank", "2"), 2, "a rank is for plain LoRAs, and peft keeps the adapter as it is"),
        (("--to", "lora", "--base", "nowhere"), 1, "no safetensors weights in nowhere"),
        (("--to", "diffusers"), 1, "diffusers needs to know which model an adapter is for"),
    ],
)
def test_errors_are_one_sentence(lowrank, folder, arguments, code, message):
    outcome = lowrank("convert", str(folder / "adapter"), str(folder / "out"), *arguments)
    assert outcome.code == code
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_all_that_is_needed_is_asked_for(lowrank, folder):
    for arguments in ((), (str(folder / "adapter"),), (str(folder / "adapter"), "out")):
        outcome = lowrank("convert", *arguments)
        assert outcome.code == 2
        assert "convert takes SOURCE, DEST and --to; give all three" in outcome.err


@pytest.fixture
def one_file(folder):
    """The adapter as a file, and links to it and to the model's weights."""
    file = folder / "adapter.safetensors"
    lowrank_core.files.convert(folder / "adapter", file, "kohya")
    (folder / "link.safetensors").symlink_to(file)
    (folder / "linked").symlink_to(folder / "base")
    (folder / "cached").mkdir()
    (folder / "cached" / "model.safetensors").symlink_to(folder / "base" / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("adapter.safetensors adapter.safetensors --to lora", "adapter.safetensors is SOURCE itself, and what is read"),
        ("adapter.safetensors link.safetensors --to kohya", "link.safetensors is SOURCE itself, and what is read"),
        ("link.safetensors adapter.safetensors --to kohya", "adapter.safetensors is SOURCE itself, and what is read"),
        ("adapter adapter --to lora", "adapter is SOURCE itself, and what is read is never written over; choose"),
        ("adapter adapter/adapter_model.safetensors --to kohya", "adapter_model.safetensors lies in SOURCE, and"),
        ("adapter . --to lora", " is a folder around SOURCE, and what is read is never written over; choose another"),
        ("adapter base --to merged --base base", "base is --base itself, and what is read is never written over"),
        ("adapter linked/new --to merged --base base", "new lies in --base, and what is read is never written over"),
        ("adapter base/model.safetensors --to kohya --base cached", "model.safetensors lies in --base, and what is"),
        ("adapter base --to merged --base cached", "base is a folder around --base, and what is read"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_what_is_read_is_never_written_over(lowrank, one_file, arguments, sentence, more):
    def held():
        return {path: path.read_bytes() for path in one_file.rglob("*") if path.is_file()}

    before = held()
    words = [word if word.startswith("--") else str(one_file / word) for word in arguments.split()]
    words[3] = arguments.split()[3]
    outcome = lowrank("convert", *words, *more)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert sentence in outcome.err
    assert held() == before


def test_beside_an_adapter_in_its_folder_there_is_room(lowrank, folder):
    out = folder / "adapter" / "comfy.safetensors"
    assert lowrank("convert", str(folder / "adapter"), str(out), "--to", "kohya").code == 0
    assert out.is_file()


def test_tiny_is_a_base(lowrank, folder):
    outcome = lowrank("convert", str(folder / "adapter"), str(folder / "out"), "--to", "merged", "--base", "tiny")
    assert outcome.code == 1
    assert "is not in the base, which holds unet, te1, te2" in outcome.err


def test_what_is_there_is_not_written_over(lowrank, folder):
    outcome = lowrank("convert", str(folder / "adapter"), str(folder / "base"), "--to", "peft")
    assert outcome.code == 1
    assert "is there already; choose another name, or overwrite it (--overwrite, overwrite=True)" in outcome.err
