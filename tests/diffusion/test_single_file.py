"""A whole SDXL in one file as base: what it says of itself, what is refused, and that it is the folder's model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowrank_core import LowrankError
from lowrank_core.files.tensors import read_tensors
from lowrank_diffusion.base import load_base
from lowrank_diffusion.base_files import base_folder, config_folder, identity_of
from lowrank_diffusion.config import BaseConfig
from lowrank_diffusion.families import SD1
from lowrank_diffusion.families import SDXL as FAMILY
from lowrank_diffusion.load import load_config
from lowrank_diffusion.single_file import Learned, read_single_file, single_file

SDXL, PREFIXES = FAMILY.repository, FAMILY.prefixes
TINY = base_folder("tiny", None, print)
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
V_ZERO = Learned("v_prediction", True, ("its tensor v_pred", "its tensor ztsnr"))


def written(path: Path, names=(), metadata=None, *, without=()) -> Path:
    """A file with a tensor of each of SDXL's networks, and one under each of these names."""
    tensors = {f"{start}weight": torch.ones(1) for part, start in PREFIXES.items() if part not in without}
    tensors |= {name: torch.ones(1, 9 if name == FIRST else 4) for name in names}
    tensors |= {name: torch.empty(0) for name in ("v_pred", "ztsnr") if name in names}
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("names", "metadata", "learned"),
    [
        ([], None, Learned()),
        (["v_pred"], None, Learned("v_prediction", False, ("its tensor v_pred",))),
        (["v_pred", "ztsnr"], None, V_ZERO),
        # ComfyUI looks for ztsnr only where it finds v_pred.
        (["ztsnr"], None, Learned()),
        # What a merge carries over from another model does not count against the marks.
        (["v_pred", "ztsnr"], {"modelspec.prediction_type": "epsilon"}, V_ZERO),
        ([], {"modelspec.prediction_type": "epsilon"}, Learned("epsilon", False, ("modelspec.prediction_type",))),
        ([], {"modelspec.prediction_type": "v"}, Learned("v_prediction", False, ("modelspec.prediction_type",))),
        (
            [],
            {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
            Learned("v_prediction", True, ("ss_v_parameterization", "ss_zero_terminal_snr")),
        ),
        ([], {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "True"}, Learned()),
    ],
)
def test_what_a_file_says_that_it_predicts(tmp_path, names, metadata, learned):
    assert read_single_file(written(tmp_path / "m.safetensors", names, metadata)).learned == learned


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
            "is an adapter, and --base takes the model below",
        ),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "is an adapter"),
        ("lycoris_mid_block_attentions_0_proj_in.hada_w1_a", "is an adapter"),
        (
            "cond_stage_model.model.ln_final.weight",
            "is a Stable Diffusion 2, and adapters are trained for SDXL and Stable Diffusion 1; give one as",
        ),
        ("conditioner.embedders.0.model.ln_final.weight", "is SDXL's refiner"),
        ("edm_vpred.sigma_max", "is an SDXL that was trained with EDM's noise"),
        (FIRST, "is a model for inpainting"),
    ],
)
def test_other_models_are_named(tmp_path, name, sentence):
    with pytest.raises(LowrankError, match=sentence):
        read_single_file(written(tmp_path / "m.safetensors", [name]), option="--base")


def test_what_a_file_lacks_is_named(tmp_path):
    file = written(tmp_path / "m.safetensors", without=["text_encoder", "text_encoder_2"])
    with pytest.raises(LowrankError, match=r"lacks SDXL's text_encoder, text_encoder_2; give the file of a whole SDXL"):
        read_single_file(file)
    file = written(tmp_path / "m.safetensors", without=["vae"])
    with pytest.raises(LowrankError, match=r"holds no VAE; give one as base.vae \(--vae\)"):
        read_single_file(file)
    assert read_single_file(file, has_vae=False).learned == Learned()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LowrankError, match=r"there is no file .*no.safetensors; check the path"):
        read_single_file(single_file(str(tmp_path / "no.safetensors")))
    (tmp_path / "m.ckpt").write_bytes(b"PK\x03\x04" + bytes(20))
    with pytest.raises(LowrankError, match=r"opening a pickle can run code, so it is never opened here; convert it"):
        read_single_file(single_file(str(tmp_path / "m.ckpt")))
    file = written(tmp_path / "m.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(LowrankError, match=r"is not a whole safetensors file \(.*\); copy or download it again"):
        read_single_file(file)


def test_which_paths_mean_a_file(tmp_path):
    assert single_file("owner/model.safetensors") == Path("owner/model.safetensors")
    assert single_file("owner/model") is single_file("tiny") is single_file(str(tmp_path)) is None
    (tmp_path / "v1.bin").mkdir()
    assert single_file(str(tmp_path / "v1.bin")) is None


def test_configurations_come_from_the_hub_without_weights(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*asked, **how):
        assert (asked, how) == ((SDXL,), {"revision": None, "allow_patterns": ["*.json", "*.txt"]})
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    notes = []
    with pytest.raises(
        LowrankError, match=rf"those of {SDXL} cannot be fetched .*\(no network\); give the diffusers fold"
    ):
        config_folder(None, FAMILY, None, notes.append)
    assert notes == [
        f"fetching the configurations and tokenizers of {SDXL}, a few MB, unless they are in the hub's cache"
    ]
    without_weights = shutil.copytree(TINY, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    assert config_folder(str(without_weights), FAMILY, None, pytest.fail) == without_weights
    with pytest.raises(
        LowrankError, match="is of SDXL, and the file is of Stable Diffusion 1; give such a one as base"
    ):
        config_folder("tiny", SD1, None, pytest.fail)
    shutil.rmtree(without_weights / "tokenizer_2")
    with pytest.raises(LowrankError, match="lacks tokenizer_2"):
        config_folder(str(without_weights), FAMILY, None, pytest.fail)


def test_a_file_is_told_apart_from_others(tmp_path):
    config = shutil.copytree(TINY, tmp_path / "config")
    base = BaseConfig(path=str(written(tmp_path / "m.safetensors")), config=str(config))
    text, vae = identity_of(base, ["text_encoder", "tokenizer"]), identity_of(base, ["vae"])
    (config / "tokenizer" / "tokenizer.json").write_text("{}")
    assert identity_of(base, ["text_encoder", "tokenizer"]) != text
    assert identity_of(base, ["vae"]) == vae
    own = base.model_copy(update={"vae": str(written(tmp_path / "vae.safetensors"))})
    assert identity_of(own, ["vae"]) != vae
    written(tmp_path / "m.safetensors", ["more"])
    assert identity_of(base, ["vae"]) != vae


@pytest.mark.slow
def test_a_plan_reads_the_header_alone(tmp_path):
    from lowrank_diffusion.plan import plan

    notes = []
    file = written(tmp_path / "m.safetensors")
    found = plan(load_config(None, [f"base.path={file}", "cache.latents=none"]), notes.append)
    assert notes == [f"{SDXL} is not looked at: its networks are taken for SDXL's own"]
    assert (found.layers, found.base_bytes) == (743, 4 * 2_567_463_684 + 4)
    with pytest.raises(LowrankError, match="holds no VAE"):
        plan(load_config(None, [f"base.path={written(file, without=['vae'])}"]), notes.append)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny SDXL as one that predicts v over a rescaled schedule, as `folder` and as `file.safetensors`.

    `plain` has its configurations, with the tiny one's own scheduler, and `vae.safetensors` its VAE.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from ldm_checkpoint import save_ldm

    home = tmp_path_factory.mktemp("models")
    folder = shutil.copytree(TINY, home / "folder")
    torch.manual_seed(0)
    # SDXL's VAE has attention in the middle, the tiny one's has not.
    AutoencoderKL(**AutoencoderKL.load_config(TINY / "vae") | {"mid_block_add_attention": True}).save_pretrained(
        folder / "vae"
    )
    index = folder / "scheduler" / "scheduler_config.json"
    shutil.copytree(folder, home / "plain", ignore=shutil.ignore_patterns("*.safetensors"))
    v_zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    index.write_text(json.dumps(json.loads(index.read_text()) | v_zero))
    pipeline = load_base(str(folder), None, None, torch.float32, print)
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_ldm(pipeline, home / "file.safetensors", **marks)
    start = PREFIXES["vae"]
    tensors = read_tensors(home / "file.safetensors")[0]
    vae = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    save_file(vae, home / "vae.safetensors")
    return home


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_networks_are_the_folders_to_the_bit(models, capfd):
    notes = []
    folder = load_base(str(models / "folder"), None, None, torch.float32, notes.append)
    said = "v over a schedule that ends in pure noise"
    assert notes == [f"{models / 'folder'} predicts {said}, as its scheduler's configuration says"]
    path, config = str(models / "file.safetensors"), str(models / "plain")
    capfd.readouterr()
    file = load_base(path, None, None, torch.float32, notes.append, config=config)
    assert capfd.readouterr() == ("", "")
    assert notes[1:] == [f"{path} predicts {said}, as its tensor v_pred and its tensor ztsnr say"]
    other_vae = load_base(path, str(models / "vae.safetensors"), None, torch.float32, print, config=config)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = getattr(folder, name).state_dict()
        for pipeline in (file, other_vae):
            network = getattr(pipeline, name)
            assert network.state_dict().keys() == expected.keys()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in network.state_dict().items())
            assert not network.training
            assert not any(parameter.requires_grad for parameter in network.parameters())
    assert file.scheduler.config == folder.scheduler.config
    assert file.config.force_zeros_for_empty_prompt == folder.config.force_zeros_for_empty_prompt
    half = load_base(path, None, None, torch.float16, print, config=config)
    assert {half.unet.dtype, half.text_encoder.dtype, half.text_encoder_2.dtype} == {torch.float16}
    assert half.vae.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_training_and_drawing_are_the_folders_to_the_bit(models, tmp_path):
    from PIL import Image

    from lowrank_diffusion.infer.request import Request
    from lowrank_diffusion.infer.run import infer
    from lowrank_diffusion.infer.studio import Told
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import run

    small = ["data.resolution=48", "data.bucket_step=16", "data.max_images=3", "adapter.rank=2", "train.steps=2"]
    small += ["train.lr=1e-2", "train.device=cpu", "track.validate_every=100", "sample.prompts=[]", "name=v"]
    bases = {
        "folder": [f"base.path={models / 'folder'}"],
        "file": [f"base.path={models / 'file.safetensors'}", f"base.config={models / 'plain'}"],
    }
    for name, base in bases.items():
        run(load_config(None, [*small, *base]), tmp_path / name, Silent())
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in bases]
    losses, others = ([json.loads(line)["loss"] for line in each] for each in lines)
    assert losses == others
    assert len(losses) == 2
    factors = [read_tensors(tmp_path / name / "unet" / "adapter_model.safetensors")[0] for name in bases]
    assert all(torch.equal(tensor, factors[1][key]) for key, tensor in factors[0].items())
    metadata = read_tensors(tmp_path / "file" / "v.safetensors")[1]
    assert [metadata[key] for key in ("modelspec.prediction_type", "ss_zero_terminal_snr")] == ["v", "True"]
    assert (
        "It predicts v (`prediction_type: v_prediction`), over a schedule with zero"
        in (tmp_path / "file" / "README.md").read_text()
    )
    drawn = {}
    for name in bases:
        request = Request([tmp_path / name], ["a house"], steps=2, device="cpu", out=tmp_path / f"{name}-drawn")
        drawn[name] = np.asarray(Image.open(infer(request, Told()).images[0]))
    assert drawn["folder"].std() > 1
    assert (drawn["file"] == drawn["folder"]).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_file_that_does_not_fit_its_configuration_is_one_sentence(models, tmp_path):
    tensors, metadata = read_tensors(models / "file.safetensors")
    first = f"{PREFIXES['unet']}input_blocks.0.0.weight"
    for broken in ({first: tensors[first][:16]}, {}):
        file = tmp_path / "m.safetensors"
        save_file({name: t for name, t in tensors.items() if name != first} | broken, file, metadata)
        with pytest.raises(
            LowrankError, match=r"cannot be loaded \(.*\); give the file of a whole SDXL, and as base.con"
        ):
            load_base(str(file), None, None, torch.float32, print, config=str(models / "plain"))
    with pytest.raises(LowrankError, match=r"base.vae .* cannot be loaded \(.*\); give the folder, file or hub id"):
        load_base("tiny", str(written(tmp_path / "vae.safetensors")), None, torch.float32, print)
