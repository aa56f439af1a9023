"""Adapters in every form of file, damaged: read, put onto a model, converted and merged."""

import json
import shutil

import pytest
import torch
from guard import answers_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzed, json_files, safetensors_files
from safetensors.torch import load_file, save, save_file

import lowrank_core
from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA
from lowrank_core.files import combine, convert, extract, read

FORMS = ["peft", "kohya", "lora", "diffusers", "merged"]
CONFIGS = {
    "lora": LoRA(rank=2, target_modules=["to_q", "conv"], modules_to_save=["head"]),
    "dora": LoRA(rank=2, target_modules=["to_q", "conv"], weight_decompose="out"),
    "loha": LoHa(rank=2, target_modules=["to_q", "conv"]),
    "lokr": LoKr(rank=2, target_modules=["to_q", "conv"], decompose_both=True),
    "adalora": AdaLoRA(rank=3, target_rank=2, target_modules=["to_q", "conv"]),
}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3)
        self.to_q = torch.nn.Linear(4, 6)
        self.head = torch.nn.Linear(6, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the base's weights, and one of each form of adapter."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("fuzz")
    save_file(Net().state_dict(), home / "base.safetensors")
    for method, config in CONFIGS.items():
        model = lowrank_core.inject(Net(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        lowrank_core.save(model, home / method)
        if method != "lora":  # a head trained whole has no place in the other forms
            lowrank_core.save(model, home / f"{method}.safetensors", "kohya")
        else:
            lowrank_core.inject(bare := Net(), LoRA(rank=2, target_modules=["to_q", "conv"]))
            lowrank_core.save(bare, home / "lora.safetensors", "kohya")
            lowrank_core.files.write(
                [lowrank_core.files.adapter_file_of(bare)], home / "diffusers.safetensors", "kohya"
            )
    names = {"unet.to_q": (6, 4), "unet.head": (2, 6)}
    factors = {}
    for name, (outputs, inputs) in names.items():
        factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"] = (
            torch.randn(2, inputs),
            torch.randn(outputs, 2),
        )
    fields = {
        f"{n}.{k}": v
        for n in ("unet",)
        for k, v in {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "head"]}.items()
    }
    save_file(factors, home / "diffusers.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
    return home


def use(path, place, to, out):
    """Everything that a user may do with it."""
    read(path)
    lowrank_core.load(Net(), path)
    out.mkdir()
    dest = out / ("x.safetensors" if to in ("kohya", "diffusers") else "x")
    convert(path, dest, to, base=place / "base.safetensors")


def check(damage, path, place, to, tmp_path_factory):
    home = tmp_path_factory.mktemp("case")
    copied = home / "adapter" / path.name
    copied.parent.mkdir()
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copied)
    damage(copied)
    out = home / "out"
    try:
        for part in (lambda: read(copied), lambda: lowrank_core.load(Net(), copied)):
            answers_or_refuses(part, out)
        out.mkdir()
        dest = out / ("x.safetensors" if to in ("kohya", "diffusers") else "x")
        answers_or_refuses(lambda: convert(copied, dest, to, base=place / "base.safetensors"), out)
        assert sorted(p.name for p in home.iterdir()) == ["adapter", "out"]
    finally:
        shutil.rmtree(home)


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_weights_of_peft_folders(place, method, tmp_path_factory):
    weights = (place / method / "adapter_model.safetensors").read_bytes()

    @fuzzed
    @given(content=safetensors_files(weights), to=st.sampled_from(FORMS))
    def run(content, to):
        check(
            lambda path: (path / "adapter_model.safetensors").write_bytes(content),
            place / method, place, to, tmp_path_factory,
        )  # fmt: skip

    run()


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_configurations_of_peft_folders(place, method, tmp_path_factory):
    fields = json.loads((place / method / "adapter_config.json").read_text())

    @fuzzed
    @given(content=json_files(fields), to=st.sampled_from(FORMS))
    def run(content, to):
        check(
            lambda path: (path / "adapter_config.json").write_bytes(content),
            place / method, place, to, tmp_path_factory,
        )  # fmt: skip

    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr", "diffusers"])
def test_single_files(place, name, tmp_path_factory):
    path = place / f"{name}.safetensors"

    @fuzzed
    @given(content=safetensors_files(path.read_bytes()), to=st.sampled_from(FORMS))
    def run(content, to):
        check(lambda copied: copied.write_bytes(content), path, place, to, tmp_path_factory)

    run()


def test_the_base_of_a_merge(place, tmp_path):
    """Damaged weights below a whole adapter."""
    base = tmp_path / "base.safetensors"

    @fuzzed
    @given(content=safetensors_files((place / "base.safetensors").read_bytes()))
    def run(content):
        base.write_bytes(content)
        answers_or_refuses(
            lambda: convert(place / "loha", tmp_path / "merged", "merged", base=base, overwrite=True), tmp_path
        )

    run()


@pytest.mark.slow
def test_the_second_of_adapters_that_are_merged(place, tmp_path):
    other = tmp_path / "other.safetensors"

    @fuzzed
    @given(content=safetensors_files((place / "lora.safetensors").read_bytes()), rank=st.sampled_from([None, 1]))
    def run(content, rank):
        other.write_bytes(content)
        both = [place / "lora.safetensors", other]
        answers_or_refuses(
            lambda: combine(both, [1.0, 0.5], tmp_path / "sum", rank=rank, form="peft", overwrite=True), tmp_path
        )

    run()


def test_the_model_that_an_adapter_is_made_of(place, tmp_path):
    tuned = tmp_path / "tuned.safetensors"
    content = save({name: tensor + 1 for name, tensor in load_file(place / "base.safetensors").items()})

    @fuzzed
    @given(content=safetensors_files(content))
    def run(content):
        tuned.write_bytes(content)
        answers_or_refuses(
            lambda: extract(place / "base.safetensors", tuned, tmp_path / "x", rank=2, form="peft", overwrite=True),
            tmp_path,
        )

    run()
