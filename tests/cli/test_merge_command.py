"""`lowrank diffusion merge` and `lowrank diffusion extract`, whole commands on the tiny SDXL."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_core.files import convert, read, write
from lowrank_core.files.base import base_layers
from lowrank_core.files.bundle import ModuleAdapter
from lowrank_core.files.factored import as_file
from lowrank_core.files.tensors import read_tensors
from lowrank_diffusion.base_files import base_folder

NAMES = {
    "unet": [
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv_shortcut",
    ],
    "te1": ["encoder.layers.0.mlp.fc1"],
}


def known(method, layers, seed):
    """A random adapter of rank 2 on a few layers of the tiny UNet and its first text encoder."""
    generator = torch.Generator().manual_seed(seed)
    files = []
    for component, names in NAMES.items():
        modules = {}
        for name in names:
            outputs, inputs, *kernel = layers[component][name].weight_shape
            shapes = {"lora_A": (2, inputs, *kernel), "lora_B": (outputs, 2, *(1 for _ in kernel))}
            if method == "loha":
                flat = layers[component][name].matrix_shape[1]
                shapes = {f"hada_w{side}_{end}": ((outputs, 2), (2, flat))[end == "b"] for side in "12" for end in "ab"}
            factors = {key: 0.5 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
            modules[name] = ModuleAdapter(factors, 2, 1)
        files.append(as_file(method, component, modules))
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LoRA and a LoHa for the tiny SDXL, `base`, that in fp32, and `tuned`, that with the LoHa in its weights.

    `run` has the LoRA's PEFT folders; `bare` and `unet` are files of a UNet in its authors' layout.
    """
    folder = tmp_path_factory.mktemp("merge")
    tiny = base_folder("tiny", None, print)
    layers = base_layers(tiny)
    for number, method in enumerate(("lora", "loha")):
        write(known(method, layers, number), folder / f"{method}.safetensors", "kohya", layers)
    shutil.copytree(tiny, folder / "base")
    for name in ("unet", "text_encoder", "text_encoder_2"):
        for path in (folder / "base" / name).glob("*.safetensors"):
            tensors = {key: tensor.float() for key, tensor in load_file(path).items()}
            path.unlink()
            save_file(tensors, path, {"format": "pt"})
    convert(folder / "loha.safetensors", folder / "tuned", "merged", base=folder / "base")
    convert(folder / "lora.safetensors", folder / "run", "peft")
    first = {"input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
    save_file(first, folder / "bare.safetensors")
    save_file({f"model.diffusion_model.{name}": each for name, each in first.items()}, folder / "unet.safetensors")
    return folder


def changes(path, layers):
    """ΔW by layer, in float64."""
    found = {}
    for file in read(path, layers, whole=True):
        for name, module in file.modules.items():
            factors = {key: factor.double() for key, factor in module.factors.items()}
            found[name] = file.scaling(name) * file.config.form.compose(factors, layers[file.component][name])
    return found


@pytest.mark.slow
def test_a_merged_file_is_the_weighted_sum(lowrank, folder, tmp_path):
    adapters = [str(folder / f"{method}.safetensors") for method in ("lora", "loha")]
    out = tmp_path / "sum.safetensors"
    arguments = ("--weights", "0.7,-0.3", "--base", "tiny", "--out", str(out), "--device", "cpu")
    outcome = lowrank("diffusion", "merge", *adapters, *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"{out}: lora of 2 adapters in 4 layers, rank 6, exact\n"
    layers = base_layers(folder / "base")
    one, two, both = (changes(path, layers) for path in (*adapters, out))
    assert set(both) == {name for names in NAMES.values() for name in names}
    for name, change in both.items():
        torch.testing.assert_close(change, 0.7 * one[name] - 0.3 * two[name], atol=1e-5, rtol=1e-4)


def test_a_rank_is_reported_worst_layers_first(lowrank, folder, tmp_path):
    adapters = [str(folder / f"{method}.safetensors") for method in ("lora", "loha")]
    arguments = ("--base", "tiny", "--rank", "3", "--form", "peft", "--out", str(tmp_path / "sum"), "--device", "cpu")
    said = json.loads(lowrank("diffusion", "merge", *adapters, *arguments, "--json").out)
    assert set(said) == {"out", "method", "rank", "weights", "kept_energy", "layers"}
    assert (said["method"], said["rank"], said["weights"]) == ("lora", 3, [1.0, 1.0])
    kept = [layer["kept_energy"] for layer in said["layers"]]
    assert kept == sorted(kept)
    assert kept[0] < said["kept_energy"] < kept[-1] < 1
    assert {path.name for path in (tmp_path / "sum").iterdir()} == {"unet", "text_encoder_one"}
    plain = lowrank("diffusion", "merge", *adapters, *arguments, "--overwrite").out.splitlines()
    assert plain[0].split() == ["layer", "of", "shape", "rank", "energy", "kept"]
    assert plain[2].split()[0] == said["layers"][0]["name"]
    assert plain[2].endswith(f"{kept[0]:.2%}")
    assert plain[-1].endswith(f"rank 3, {said['kept_energy']:.2%} of the energy kept")


@pytest.mark.slow
def test_a_known_loha_is_extracted_again(lowrank, folder, tmp_path):
    out = tmp_path / "out.safetensors"
    arguments = ("--method", "loha", "--rank", "2", "--out", str(out), "--device", "cpu")
    outcome = lowrank("diffusion", "extract", str(folder / "base"), str(folder / "tuned"), *arguments, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    said = json.loads(outcome.out)
    assert set(said) == {"out", "method", "kept_energy", "layers", "unchanged", "left_out"}
    assert (said["method"], said["left_out"]) == ("loha", [])
    assert {layer["name"] for layer in said["layers"]} == {name for names in NAMES.values() for name in names}
    assert {layer["component"] for layer in said["layers"]} == {"unet", "te1"}
    assert said["kept_energy"] > 1 - 1e-6
    assert said["unchanged"] == 297
    layers = base_layers(folder / "base")
    wanted, found = changes(folder / "loha.safetensors", layers), changes(out, layers)
    for name, change in wanted.items():
        assert float((found[name] - change).norm()) < 1e-3 * float(change.norm())


@pytest.fixture(scope="module")
def files(folder):
    """`base` and `tuned` in one file each, as their authors name their tensors."""
    from ldm_checkpoint import save_ldm

    from lowrank_diffusion.base import load_base

    return {
        name: save_ldm(load_base(str(folder / name), None, None, torch.float32, print), folder / f"{name}.safetensors")
        for name in ("base", "tuned")
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_whole_models_in_files_give_the_adapter_of_their_folders_to_the_bit(lowrank, folder, files, tmp_path):
    # transformers 4 saved the first text encoder with a level more.
    older = [shutil.copytree(folder / name, tmp_path / name) for name in ("base", "tuned")]
    for model in older:
        path = model / "text_encoder" / "model.safetensors"
        save_file({f"text_model.{name}": tensor for name, tensor in load_file(path).items()}, path)

    def extracted(base, tuned):
        """Tensors, and what is said of them; safetensors itself writes its metadata in any order."""
        out = tmp_path / "out.safetensors"
        arguments = ("--rank", "2", "--out", str(out), "--device", "cpu", "--overwrite", "--quiet")
        outcome = lowrank("diffusion", "extract", str(base), str(tuned), *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        return read_tensors(out)

    expected, said = extracted(folder / "base", folder / "tuned")
    assert {name.split("_")[1] for name in expected} == {"unet", "te1"}
    for base, tuned, as_said in (
        (files["base"], files["tuned"], True),
        (folder / "base", files["tuned"], True),
        (files["base"], folder / "tuned", True),
        (files["base"], older[1], True),
        # The names are the base's.
        (older[0], files["tuned"], False),
    ):
        found, about = extracted(base, tuned)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert (about == said) == as_said


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        ("model.diffusion_model.label_emb.0.0.weight", "lacks a tensor of SDXL, label_emb.0.0.weight; give the file"),
        (
            "conditioner.embedders.1.model.text_projection",
            "of SDXL, conditioner.embedders.1.model.text_projection; give",
        ),
        ("model.diffusion_model.input_blocks.3.0.op.weight", "lacks layers that "),
        ("conditioner.", "lacks SDXL's text_encoder, text_encoder_2; give the file of a whole SDXL"),
    ],
)
def test_a_file_that_lacks_something_is_one_sentence(lowrank, folder, files, tmp_path, without, sentence):
    broken = tmp_path / "broken.safetensors"
    save_file({name: t for name, t in load_file(files["tuned"]).items() if not name.startswith(without)}, broken)
    out = tmp_path / "out.safetensors"
    outcome = lowrank("diffusion", "extract", str(folder / "base"), str(broken), "--out", str(out), "--device", "cpu")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert sentence in outcome.err
    assert not out.exists()


def test_extraction_as_a_table(lowrank, folder, tmp_path):
    models = (str(folder / "base"), str(folder / "tuned"))
    arguments = ("--rank", "1", "--out", str(tmp_path / "out"), "--device", "cpu")
    lines = lowrank("diffusion", "extract", *models, *arguments).out.splitlines()
    assert lines[0].split() == ["layer", "of", "shape", "rank", "energy", "kept"]
    assert len(lines) == 2 + 4 + 1
    assert lines[-1].startswith(f"{tmp_path / 'out'}: lora of 4 layers, ")
    assert "of the energy kept; " in lines[-1]
    assert (tmp_path / "out" / "unet" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("merge --out OUT", 2, "merge takes adapters and a place for their sum; give both"),
        ("merge LORA LOHA", 2, "merge takes adapters and a place for their sum; give both"),
        ("merge LORA gone.safetensors --base tiny --out OUT", 1, "there is no file gone.safetensors; check the path"),
        ("merge LORA LOHA --weights 1 --out OUT", 2, "--weights has 1 numbers for 2 adapters; give one for each"),
        ("merge LORA --weights much --out OUT", 2, "--weights are numbers with commas between, such as 0.7,0.3"),
        ("merge LORA --base tiny --rank 999 --out OUT", 2, "--rank 999 is more than any layer has, at most 64"),
        ("merge LORA --base tiny --out LOHA", 1, "is there already; choose another name, or overwrite it"),
        ("merge LORA LOHA --base tiny --out LOHA --overwrite", 2, "loha.safetensors is adapter 2 itself, and what is"),
        (
            "merge LORA --base BASE --out BASE/unet --overwrite",
            2,
            "base/unet lies in --base, and what is read is never",
        ),
        ("merge LORA --base nowhere --out OUT", 1, "there are no safetensors weights in nowhere"),
        ("merge LORA --form zip --out OUT", 2, "--form is one of kohya, peft, diffusers, got 'zip'"),
        ("extract BASE TUNED", 2, "extract takes two models and a place for the adapter; give all three"),
        ("extract BASE gone --out OUT", 1, "there is no file or folder gone; give the folder of a model"),
        ("extract BASE TUNED --rank 999 --out OUT", 2, "--rank 999 is more than any layer has, at most"),
        ("extract BASE TUNED --rank 0 --out OUT", 2, "--rank must be at least 1, got 0"),
        ("extract BASE BASE --out OUT", 1, "so there is nothing to extract"),
        ("extract tiny tiny --out OUT", 1, "every layer of tiny is that of tiny, so there is nothing to extract"),
        ("extract BASE TUNED --out TUNED --overwrite", 2, "tuned is TUNED itself, and what is read is never written"),
        ("extract BASE TUNED --out TUNED/unet --overwrite", 2, "tuned/unet lies in TUNED, and what is read is never"),
        ("extract tiny TUNED --out TUNED/new --overwrite", 2, "tuned/new lies in TUNED, and what is read is never"),
        ("extract tiny LORA --out OUT", 1, "lora.safetensors is an adapter, no model; give a whole model"),
        ("extract tiny RUN --out OUT", 1, "run is the folder of an adapter or of a run, no model; give a whole model"),
        ("extract tiny RUN/unet --out OUT", 1, "unet is the folder of an adapter or of a run, no model; give a whole"),
        ("extract tiny TUNED/unet/diffusion_pytorch_model.safetensors --out OUT", 1, "; give two models of the same k"),
        ("extract BARE tiny --out OUT", 1, "network that is in a file of its own as its folder, as diffusers saves it"),
        ("extract tiny UNET --out OUT", 1, "unet.safetensors holds a UNet alone; give its folder as diffusers saves"),
        ("extract BASE TUNED --method lokr --out OUT", 2, "--method is one of lora, loha, got 'lokr'"),
        ("extract BASE TUNED --out LOHA", 1, "is there already; choose another name, or overwrite it"),
    ],
)
def test_errors_are_one_sentence(lowrank, folder, tmp_path, arguments, code, message):
    places = {
        "LORA": folder / "lora.safetensors",
        "LOHA": folder / "loha.safetensors",
        "BASE": folder / "base",
        "TUNED": folder / "tuned",
        "RUN": folder / "run",
        "BARE": folder / "bare.safetensors",
        "UNET": folder / "unet.safetensors",
        "OUT": tmp_path / "out.safetensors",
    }
    # A place may be below one of these: TUNED/unet.
    words = (word.partition("/") for word in arguments.split())
    said = [str(places.get(first, first)) + slash + rest for first, slash, rest in words]
    outcome = lowrank("diffusion", *said, "--device", "cpu")
    assert outcome.code == code
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()
