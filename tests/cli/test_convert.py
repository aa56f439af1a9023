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


def test_what_is_there_is_not_written_over(lowrank, folder):
    outcome = lowrank("convert", str(folder / "adapter"), str(folder / "base"), "--to", "peft")
    assert outcome.code == 1
    assert "is there already; choose another name, or overwrite it (--overwrite, overwrite=True)" in outcome.err
