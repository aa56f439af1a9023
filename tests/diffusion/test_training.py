"""Whole runs on an untrained tiny SDXL, on small pictures, in a few steps."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from lowrank_core import LowrankError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
SMALL = [
    "data.resolution=48",
    "data.bucket_step=16",
    "data.max_images=7",
    "data.caption_dropout=0.3",
    "data.flip=0.5",
    "adapter.rank=2",
    "adapter.target=[attn1.to_q,attn2.to_v,attn2.to_out.0]",
    "train.steps=4",
    "train.batch_size=2",
    "train.lr=1e-2",
    "train.warmup=0",
    "train.schedule=constant",
    "train.device=cpu",
    "sample.prompts=[]",
    "track.validate_every=100",
]


@pytest.fixture(scope="module")
def fit(base):
    """`fit(out, "train.steps=3", observer=...)` carries out a small run."""
    from lowrank_diffusion.load import load_config
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import run

    def fit(out: Path, *overrides: str, observer=None):
        config = load_config(None, [f"base.path={base}", *SMALL, *overrides])
        return run(config, out, observer or Silent())

    torch.set_num_threads(1)
    return fit


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> dict:
    from lowrank_core.files.tensors import read_tensors

    return read_tensors(run / "unet" / "adapter_model.safetensors")[0]


def unet_output(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    added = {
        "text_embeds": torch.randn(1, 80, generator=generator),
        "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]]),
    }
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 32, 128, generator=generator)
    with torch.no_grad():
        return unet(noisy, torch.tensor([500]), encoder_hidden_states=text, added_cond_kwargs=added).sample


@pytest.fixture(scope="module")
def finished(fit, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    extra = [
        "sample.prompts=[a house,a red star]",
        "sample.steps=2",
        "sample.every=2",
        "adapter.text_encoders=true",
        "data.trigger=sks",
    ]
    return out, fit(out, *extra, "cache.text=none", "name=house", "train.steps=3", "train.checkpointing=true")


def test_the_folder_holds_what_the_documentation_says(finished):
    out, summary = finished
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    parts = ("unet", "text_encoder_one", "text_encoder_two")
    assert names == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "README.md",
        "house.safetensors",
        "house_lora.safetensors",
        "checkpoint/step-00000003.safetensors",
        *(f"samples/step-{step}.png" for step in (0, 2, 3)),
        *(f"{part}/{file}" for part in parts for file in ("adapter_config.json", "adapter_model.safetensors")),
    }
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = {"step", "loss", "lr", "images_per_second", "peak_memory_bytes", "seconds"}
    assert [row.keys() - keys for row in rows] == [set(), set(), {"validation_loss"}]
    assert json.loads((out / "summary.json").read_text())["steps"] == summary.steps == 3
    assert summary.base_validation_loss != summary.validation_loss == rows[-1]["validation_loss"]
    assert summary.trainable_params > sum(tensor.numel() for tensor in adapter(out).values())


def test_the_card_shows_grid_recipe_and_files(finished):
    card = (finished[0] / "README.md").read_text()
    for part in (
        "samples/step-3.png",
        "1. a house",
        "instance_prompt: sks",
        "house_lora.safetensors",
        "method: loha",
        "`text_encoder_two`",
    ):
        assert part in card


def test_every_file_gives_the_same_unet(finished, base):
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from peft import PeftModel

    import lowrank_core

    out = finished[0]

    def unet():
        return UNet2DConditionModel.from_pretrained(base / "unet")

    plain = unet_output(unet())
    ours = unet_output(lowrank_core.load(unet(), out / "unet").eval())
    assert not torch.allclose(ours, plain, atol=1e-4)
    kohya = unet_output(lowrank_core.load(unet(), out / "house.safetensors").eval())
    assert torch.equal(kohya, ours)
    theirs = unet_output(PeftModel.from_pretrained(unet(), out / "unet"))
    assert torch.allclose(theirs, ours, atol=1e-5)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.load_lora_weights(out, weight_name="house_lora.safetensors")
    assert torch.allclose(unet_output(pipeline.unet), ours, atol=1e-5)
    assert pipeline.get_list_adapters().keys() == {"unet", "text_encoder", "text_encoder_2"}


def test_the_single_file_says_what_it_is(finished):
    from lowrank_core.files.tensors import read_tensors

    about = read_tensors(finished[0] / "house.safetensors")[1]
    expected = {
        "modelspec.title": "house",
        "modelspec.trigger_phrase": "sks",
        "modelspec.resolution": "48x48",
        "modelspec.prediction_type": "epsilon",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "2",
        "ss_steps": "3",
        "ss_optimizer": "adamw",
    }
    assert {key: about[key] for key in expected} == expected
    assert sum(json.loads(about["ss_tag_frequency"])["quickstart"].values()) == 6


def test_cached_and_uncached_losses_agree(fit, tmp_path):
    for kind in ("none", "memory", "disk"):
        fit(tmp_path / kind, f"cache.text={kind}", f"cache.latents={kind}", f"cache.folder={tmp_path / 'cache'}")
    assert losses(tmp_path / "none") == pytest.approx(losses(tmp_path / "memory"), rel=1e-4)
    assert losses(tmp_path / "disk") == losses(tmp_path / "memory")
    fit(tmp_path / "again", "cache.text=disk", "cache.latents=disk", f"cache.folder={tmp_path / 'cache'}")
    assert losses(tmp_path / "again") == losses(tmp_path / "disk")


def test_however_a_batch_is_split_the_losses_are_the_same(fit, tmp_path):
    fit(tmp_path / "whole", "train.batch_size=4")
    fit(tmp_path / "parts", "train.batch_size=1", "train.accumulate=4")
    fit(tmp_path / "processes", "train.batch_size=1", "train.accumulate=2", "train.processes=2")
    whole = losses(tmp_path / "whole")
    assert len(set(whole)) == 4
    assert losses(tmp_path / "parts") == pytest.approx(whole, rel=1e-4)
    assert losses(tmp_path / "processes") == pytest.approx(whole, rel=1e-4)
    assert json.loads((tmp_path / "processes" / "summary.json").read_text())["steps"] == 4


class Killed(Exception):
    pass


def stopping_at(step: int, how):
    from lowrank_diffusion.results import Silent

    class Stopping(Silent):
        def step_ended(self, row) -> None:
            if row.step == step:
                how()

    return Stopping()


def kill() -> None:
    raise Killed


ADALORA = ["adapter.method=adalora", "adapter.rank=4", "adapter.target_rank=2", "train.steps=8"]


@pytest.mark.parametrize(
    ("overrides", "killed"),
    [
        (["adapter.method=lora", "train.schedule=cosine", "adapter.dropout=0.2"], 3),
        ([*ADALORA], 3),  # while ranks fall
        ([*ADALORA], 7),  # after they have
        (["train.optimizer=adafactor", "adapter.method=lokr", "train.ema=0.9"], 3),
        (["train.optimizer=schedulefree", "track.validate_every=1"], 3),
        (["data.shuffle_tags=true", "data.caption_templates=['{caption}, drawn', '{caption}']", "cache.text=none"], 3),
        (["base.quantize=nf4", "train.checkpointing=true", "train.offload=20", "adapter.target=all-linear"], 3),
        (["adapter.rank_dropout=0.3", "adapter.module_dropout=0.3", "train.lr_pattern={to_q: 0.1}"], 3),
        (["adapter.dora=true", "adapter.method=lora", "adapter.rank_dropout=0.3", "train.ema=0.9"], 3),
    ],
)
def test_a_killed_run_goes_on_with_the_same_bits(fit, tmp_path, overrides, killed):
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import resume

    often = [*overrides, "train.checkpoint_every=2"]
    whole = fit(tmp_path / "whole", *often)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", *often, observer=stopping_at(killed, kill))
    assert len(losses(tmp_path / "killed")) == killed
    summary = resume(tmp_path / "killed", Silent())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (summary.loss, summary.validation_loss) == (whole.loss, whole.validation_loss)
    mine, other = adapter(tmp_path / "killed"), adapter(tmp_path / "whole")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert resume(tmp_path / "killed", Silent()) == summary
    if "adapter.method=adalora" in overrides:
        values = [len(tensor) for name, tensor in mine.items() if name.endswith("lora_E")]
        # A layer that lost every direction is written with one of zeros.
        zeros = sum(not tensor.any() for name, tensor in mine.items() if name.endswith("lora_E"))
        assert sum(values) - zeros <= 2 * len(values) <= sum(values)


@pytest.mark.parametrize("override", ["train.ema=0.5", "train.optimizer=schedulefree"])
def test_what_is_validated_and_saved_is_the_average(fit, tmp_path, override):
    from lowrank_diffusion.checkpoint import load_checkpoint

    plain = fit(tmp_path / "plain", *([] if "ema" in override else [override]), "adapter.method=lora", "train.steps=2")
    average = fit(tmp_path / "average", override, "adapter.method=lora", "train.steps=3")
    checkpoint = load_checkpoint(tmp_path / "average", None)
    saved = adapter(tmp_path / "average")
    assert len(saved) == len(checkpoint.adapters) > 0
    trained = {tensor.numpy().tobytes() for tensor in checkpoint.adapters.values()}
    assert not trained & {tensor.numpy().tobytes() for tensor in saved.values()}
    averages = {tensor.numpy().tobytes() for tensor in checkpoint.averages.values()}
    assert averages == ({tensor.numpy().tobytes() for tensor in saved.values()} if "ema" in override else set())
    # Averaging changes no step, as far as it is beside training.
    assert losses(tmp_path / "average")[:2] == losses(tmp_path / "plain")
    assert average.validation_loss != plain.validation_loss


def test_norms_are_held_down_in_every_step(fit, tmp_path):
    fit(tmp_path / "run", "adapter.method=lora", "adapter.alpha=2", "train.scale_weight_norms=0.01", "train.steps=2")
    factors = adapter(tmp_path / "run")
    downs = [name for name in factors if "lora_A" in name]
    norms = torch.stack([(factors[name.replace("lora_A", "lora_B")] @ factors[name]).norm() for name in downs])
    assert norms.max().item() == pytest.approx(0.01, rel=1e-4)


def test_a_run_counts_what_its_masks_show(fit, tmp_path):
    from PIL import Image

    for number, name in enumerate("abc"):
        Image.new("RGB", (64, 64), (80 * number, 200, 50)).save(tmp_path / f"{name}.png")
        Image.new("L", (64, 64)).save(tmp_path / f"{name}-masklabel.png")
    pictures = [f"data.path={tmp_path}", "data.caption=a square", "train.steps=1"]
    fit(tmp_path / "whole", *pictures)
    fit(tmp_path / "half", *pictures, "data.mask=file", "data.unmasked_weight=0.5")
    assert losses(tmp_path / "half")[0] == pytest.approx(losses(tmp_path / "whole")[0] / 2, rel=1e-6)


def test_class_pictures_are_drawn_once_and_their_loss_is_added(fit, tmp_path):
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import resume

    folder = tmp_path / "class"
    prior = ["prior.caption=a star", f"prior.path={folder}", "prior.images=3", "prior.steps=1"]
    few = [*prior, "train.steps=3", "train.checkpoint_every=2"]
    fit(tmp_path / "none", "train.steps=1")
    fit(tmp_path / "once", *few)
    drawn = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(drawn) == ["class-00001.png", "class-00002.png", "class-00003.png"]
    assert len(set(drawn.values())) == 3
    (folder / "class-00002.png").unlink()
    fit(tmp_path / "thrice", *few, "prior.weight=3", "train.steps=1")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == drawn
    none, once, thrice = (losses(tmp_path / name)[0] for name in ("none", "once", "thrice"))
    assert once > 1.5 * none
    assert thrice - none == pytest.approx(3 * (once - none), rel=1e-4)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", *few, observer=stopping_at(2, kill))
    resume(tmp_path / "killed", Silent())
    assert losses(tmp_path / "killed") == losses(tmp_path / "once")
    parts = ["train.batch_size=1", "train.processes=2"]
    folder.rename(tmp_path / "put away")
    fit(tmp_path / "processes", *few, *parts)
    assert losses(tmp_path / "processes") == pytest.approx(losses(tmp_path / "once"), rel=1e-3)


def test_ctrl_c_keeps_the_finished_steps_and_what_they_came_to(fit, tmp_path):
    from lowrank_diffusion.one_run import Interrupted
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import resume

    fit(tmp_path / "whole")
    with pytest.raises(Interrupted, match="interrupted after 3 finished steps, which are kept in") as stop:
        fit(tmp_path / "run", observer=stopping_at(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert stop.value.exit_code == 130
    assert stop.value.summary.interrupted
    assert adapter(tmp_path / "run")
    assert not resume(tmp_path / "run", Silent()).interrupted
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("override", ["train.ema=0.5", "train.optimizer=schedulefree"])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_adapter(fit, tmp_path, monkeypatch, override):
    from lowrank_diffusion.noise import TrainingNoise

    plain, calls = TrainingNoise.loss, []

    def broken(self, *arguments):
        calls.append(1)
        return plain(self, *arguments) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(TrainingNoise, "loss", broken)
    sentence = r"the loss of step 4 is nan; lower train.lr \(now 0.01\); .* holds the adapter of step 2, its last"
    with pytest.raises(LowrankError, match=sentence):
        fit(tmp_path / "nan", override, "train.checkpoint_every=2")
    monkeypatch.undo()
    fit(tmp_path / "two", override, "train.steps=2")
    good, kept = adapter(tmp_path / "two"), adapter(tmp_path / "nan")
    assert all(torch.equal(good[name], kept[name]) for name in good)
    assert json.loads((tmp_path / "nan" / "summary.json").read_text())["steps"] == 2


def test_adalora_goes_back_to_the_larger_ranks_of_its_last_checkpoint(fit, tmp_path, monkeypatch):
    from lowrank_diffusion.noise import TrainingNoise

    plain, calls = TrainingNoise.loss, []

    def broken(self, *arguments):
        calls.append(1)
        return plain(self, *arguments) * (float("nan") if len(calls) > 5 else 1)

    monkeypatch.setattr(TrainingNoise, "loss", broken)
    with pytest.raises(LowrankError, match=r"the loss of step 6 is nan; .* holds the adapter of step 3, its last"):
        fit(tmp_path / "nan", *ADALORA, "train.checkpoint_every=3")
    assert adapter(tmp_path / "nan")


def test_a_loss_above_the_limit_stops_the_run(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_diffusion.trainer.WINDOW", 2)
    sentence = r"the mean loss of the 2 steps to . is .*, above train.loss_limit 0.001; lower .*was no checkpoint yet"
    with pytest.raises(LowrankError, match=sentence):
        fit(tmp_path / "run", "train.loss_limit=0.001")


def test_resume_refuses_another_configuration_and_a_folder_without_a_run(fit, tmp_path):
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import resume

    with pytest.raises(LowrankError, match=r"holds no run to resume: there is no config.yaml in it"):
        resume(tmp_path, Silent())
    with pytest.raises(Killed):
        fit(tmp_path / "run", "train.checkpoint_every=1", observer=stopping_at(2, kill))
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.01", "lr: 0.02"))
    with pytest.raises(LowrankError, match="was left by a run with another configuration"):
        resume(tmp_path / "run", Silent())
    with pytest.raises(LowrankError, match="already holds files; choose another folder with --out"):
        fit(tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.precision=fp16", r"train.precision is fp16, which CPUs do not train in; set train.precision: bf16"),
        ("train.device=cuda:7", r"device 'cuda:7' cannot be used here \(.*\); try -o train.device=cpu"),
        ("adapter.target=[to_x]", r"to_x"),
        ("adapter.init_from=nowhere", r"nowhere"),
        (
            "base.quantize=int8",
            r"needs the package bitsandbytes, which is not installed; install it with pip install '",
        ),
        ("track.tensorboard=true", r"tensorboard, which is not installed; install it with pip install tensorboard"),
        ("track.wandb=true", r"the package wandb, which is not installed; install it with pip install wandb, or leave"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(fit, tmp_path, override, sentence, monkeypatch):
    import sys

    for package in ("torch.utils.tensorboard", "bitsandbytes.functional", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LowrankError, match=sentence):
        fit(tmp_path / "run", override)
    # Nothing was trained, so the folder is free for the next try.
    assert not [path for path in (tmp_path / "run").iterdir() if path.name != ".lock"]


def test_prodigy_and_trackers_through_a_whole_run(fit, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    told = ["track.tensorboard=true", "track.wandb=true", "sample.prompts=[a house]", "sample.steps=1"]
    fit(tmp_path / "run", *told, "train.optimizer=prodigy", "train.lr=1", "train.steps=3")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in shown] == [row["step"] for row in rows] == [1, 2, 3]
    assert [value for _, value in shown] == pytest.approx([row["loss"] for row in rows])
    assert [event.step for event in events.Images("samples")] == [0, 3]
    grids = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/samples_*.png")
    assert sorted(path.name.split("_")[1] for path in grids) == ["0", "3"]


def test_going_on_from_an_adapter_starts_where_it_ended(fit, finished, tmp_path):
    source = finished[0]
    summary = fit(tmp_path / "next", f"adapter.init_from={source / 'unet'}", "train.steps=1", "train.lr=1e-9")
    before, after = adapter(source), adapter(tmp_path / "next")
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    assert summary.steps == 1
    with pytest.raises(LowrankError, match=r"holds loha, but adapter.method is lora; set adapter.method: loha"):
        fit(tmp_path / "other", f"adapter.init_from={source / 'unet'}", "adapter.method=lora")


def test_bf16_keeps_the_factors_in_fp32(fit, tmp_path):
    summary = fit(tmp_path / "run", "train.precision=bf16", "train.steps=2")
    assert all(tensor.dtype == torch.float32 for tensor in adapter(tmp_path / "run").values())
    assert summary.loss == pytest.approx(fit(tmp_path / "exact", "train.steps=2").loss, rel=0.02)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_on_a_gpu_steps_have_the_losses_of_a_cpu(fit, tmp_path, cuda, precision, tolerance):
    """What is random is drawn on the CPU for every device."""
    fit(tmp_path / "cpu", "train.steps=3")
    fit(tmp_path / "gpu", "train.steps=3", f"train.device={cuda}", f"train.precision={precision}")
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)


def test_a_group_of_processes_needs_one_folder(base, monkeypatch):
    from lowrank_core import UsageError
    from lowrank_diffusion.load import load_config
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import run

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="each would name a folder of its own; give --out"):
        run(load_config(None, [f"base.path={base}"]), None, Silent())
