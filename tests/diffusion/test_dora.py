"""Magnitudes beside directions (DoRA): whole runs of few steps on an untrained tiny SDXL."""

import json
from types import SimpleNamespace

import pytest
import torch

from lowrank_core.adapters.control import adapters_of, disable
from lowrank_core.errors import LowrankError
from lowrank_diffusion.load import load_config
from lowrank_diffusion.results import Silent

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
RUN = [
    "name=small",
    "data.resolution=48",
    "data.bucket_step=16",
    "data.max_images=3",
    "adapter.method=lora",
    "adapter.dora=true",
    "adapter.rank=2",
    "adapter.target=[attn1.to_q,attn2.to_k,ff.net.0.proj,resnets.0.conv1]",
    "train.lr=0.01",
    "train.weight_decay=0.5",
    "train.warmup=0",
    "train.device=cpu",
    "sample.prompts=[]",
    "track.validate_every=100",
]


def unet_of(base):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(base / "unet")


@torch.no_grad()
def answer(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noisy, text, pooled = (torch.randn(s, generator=generator) for s in ((1, 4, 8, 8), (1, 32, 128), (1, 80)))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    return unet.eval()(noisy, 500, encoder_hidden_states=text, added_cond_kwargs=added).sample


@pytest.fixture(scope="module")
def one_step(base, tmp_path_factory):
    """The folder of a run of one step."""
    from lowrank_diffusion.run import run

    out = tmp_path_factory.mktemp("dora") / "run"
    run(load_config(None, [f"base.path={base}", *RUN, "train.steps=1"]), out, Silent())
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_step_the_unet_is_the_bases_to_the_bit(base, dtype):
    from lowrank_diffusion.adapting import put_adapters

    unet = unet_of(base).to(dtype)
    put_adapters(SimpleNamespace(unet=unet), load_config(None, RUN), print)
    generator = torch.Generator().manual_seed(3)
    noisy, text = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 4, 8, 8), (2, 32, 128)))
    added = {"text_embeds": torch.ones(2, 80, dtype=dtype), "time_ids": torch.ones(2, 6)}

    def predicted() -> torch.Tensor:
        return unet(noisy, torch.tensor([5, 600]), encoder_hidden_states=text, added_cond_kwargs=added).sample

    found = predicted()
    with disable(unet):
        assert torch.equal(predicted(), found)
    assert found.requires_grad


def test_a_step_moves_every_magnitude_by_the_rate_and_decays_none(one_step, base):
    import lowrank_core

    layers = adapters_of(lowrank_core.load(unet_of(base), one_step / "unet"))
    plain = dict(unet_of(base).named_modules())
    moved = []
    for name, adapter in layers.items():
        start = plain[name].weight.flatten(1).norm(dim=1)
        moved.append((adapter.magnitude.detach().flatten() - start).abs())
    # AdamW's first step is the rate times the gradient's sign; decay would add up to 0.01 * 0.5 * m of any size.
    moved = torch.cat(moved)
    assert moved.max().item() == pytest.approx(0.01, rel=1e-3)
    assert moved.median().item() == pytest.approx(0.01, rel=1e-3)
    assert (moved > 0).all()


def test_peft_gives_from_the_folder_what_we_give(one_step, base):
    from peft import PeftModel

    import lowrank_core

    fields = json.loads((one_step / "unet" / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["use_dora"]) == ("LORA", True)
    ours = answer(lowrank_core.load(unet_of(base), one_step / "unet"))
    assert (ours - answer(unet_of(base))).abs().max() > 1e-3
    theirs = answer(PeftModel.from_pretrained(unet_of(base), one_step / "unet"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_card_and_summary_call_it_dora(one_step):
    assert json.loads((one_step / "summary.json").read_text())["method"] == "lora+dora"
    card = (one_step / "README.md").read_text()
    assert "LoRA with DoRA of rank 2" in card
    assert "- dora\n" in card
    assert "`unet`: PEFT folders." in card
    assert "the equal LoRA with DoRA, for diffusers" in card


class Stops(Exception):
    pass


class Listens(Silent):
    """Ends the run before its first step."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def run_started(self, start) -> None:
        raise Stops(start.method)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("lora", None),
        (
            "loha",
            "its adapter will be in small.safetensors, for lowrank infer, ComfyUI and LyCORIS, and the equal LoRA",
        ),
        (
            "lokr",
            "its adapter will be in small.safetensors, for lowrank infer, ComfyUI and LyCORIS; for PEFT folders set",
        ),
    ],
)
def test_files_that_there_will_not_be_are_named_before_the_first_step(base, tmp_path, method, sentence):
    from lowrank_diffusion.run import run

    heard = Listens()
    with pytest.raises(Stops, match=rf"{method}\+dora"):
        run(load_config(None, [f"base.path={base}", *RUN, f"adapter.method={method}"]), tmp_path / "run", heard)
    said = [note for note in heard.notes if "no DoRA" in note]
    assert len(said) == (0 if sentence is None else 1)
    for note in said:
        assert note.startswith(f"PEFT has no DoRA for {method}, so this run writes no PEFT folders: ")
        assert sentence in note
        assert note.endswith("the equal LoRA with DoRA by lowrank convert small.safetensors FOLDER --to lora")


def test_what_cannot_be_gone_on_from_is_said_alone(base, tmp_path):
    from lowrank_diffusion.run import run

    heard = Listens()
    with pytest.raises(LowrankError, match="there is no file or folder nowhere"):
        run(
            load_config(None, [f"base.path={base}", *RUN, "adapter.method=loha", "adapter.init_from=nowhere"]),
            tmp_path / "run",
            heard,
        )
    assert not [note for note in heard.notes if "no DoRA" in note]
