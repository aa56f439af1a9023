"""What a run would cost, from shapes."""

import pytest

from lowrank_diffusion.load import load_config
from lowrank_diffusion.plan import plan


def planned(name="sdxl-loha", *overrides):
    notes = []
    found = plan(load_config(name, overrides), notes.append)
    assert notes == ["stabilityai/stable-diffusion-xl-base-1.0 is not looked at: its networks are taken for SDXL's own"]
    return found


@pytest.mark.slow
def test_sdxl_with_loha_of_rank_8_by_hand():
    found = planned()
    # facts of SDXL: 560 attention projections, 2,567,463,684 parameters in the UNet.
    assert (found.layers, found.trainable_params, found.original_params) == (560, 23_224_320, 2_567_463_684)
    assert (found.pictures_per_step, found.pictures, found.steps) == (2, 8000, 4000)
    assert found.base_bytes == 2 * 2_567_463_684
    assert found.adapter_bytes == 23_224_320 * (4 + 4 + 8)
    assert found.peak_memory_bytes == found.base_bytes + found.adapter_bytes + found.activation_bytes


@pytest.mark.slow
def test_magnitudes_count_and_what_they_miss_is_said():
    lora, dora = planned("sdxl-lora"), planned("sdxl-lora", "adapter.dora=true")
    # 10 transformer blocks 640 wide and 60 that are 1280 wide, of two attentions with four layers each.
    magnitudes = 8 * (10 * 640 + 60 * 1280)
    assert dora.trainable_params - lora.trainable_params == magnitudes == 665_600
    assert dora.adapter_bytes - lora.adapter_bytes == magnitudes * (4 + 4 + 8)
    # What the backward pass needs of a weight's change is composed again.
    assert (dora.base_bytes, dora.activation_bytes) == (lora.base_bytes, lora.activation_bytes)
    assert (lora.method, dora.method) == ("lora", "lora+dora")
    notes = []
    plan(load_config("sdxl-loha", ["adapter.dora=true"]), notes.append)
    assert notes[0].startswith("PEFT has no DoRA for loha, so this run writes no PEFT folders")


@pytest.mark.slow
def test_what_costs_memory():
    base = planned()
    assert planned("sdxl-loha", "train.precision=fp32").base_bytes == 2 * base.base_bytes
    assert planned("sdxl-loha", "train.batch_size=4").activation_bytes == 2 * base.activation_bytes
    assert planned("sdxl-loha", "train.checkpointing=false").activation_bytes > 5 * base.activation_bytes
    every_second = planned("sdxl-loha", "train.checkpointing=2").activation_bytes
    assert 2 * base.activation_bytes < every_second < 5 * base.activation_bytes
    assert planned("sdxl-loha", "data.resolution=512").activation_bytes == pytest.approx(base.activation_bytes / 4)
    assert planned("sdxl-loha", "cache.text=none").base_bytes > base.base_bytes + 1_600_000_000
    assert planned("sdxl-loha", "cache.latents=none").base_bytes == base.base_bytes + 2 * 83_653_863
    # 743 linear layers of 2,232,647,680 weights, of 2 bytes in bf16; a scale of 4 bytes for each of 1,455,040 outputs.
    others = base.base_bytes - 2 * 2_232_647_680
    assert planned("sdxl-loha", "base.quantize=int8").base_bytes == others + 2_232_647_680 + 4 * 1_455_040
    assert planned("sdxl-loha", "base.quantize=nf4").base_bytes == others + 2_232_647_680 // 2 + 4 * 2_232_647_680 // 64
    # A block of a 2560 -> 1280 convolution, its 3x3 to 1280, a shortcut, the time's layer and two norms is the largest.
    largest = (
        2560 * 1280 * 9 + 1280 + 1280 * 1280 * 9 + 1280 + 2560 * 1280 + 1280 + 1280 * 1280 + 1280 + 2 * (2560 + 1280)
    )
    one, two = (planned("sdxl-loha", f"train.offload={number}").base_bytes for number in (1, 2))
    assert (one, two) == (base.base_bytes, base.base_bytes - 2 * largest)
    assert planned("sdxl-loha", "train.offload=true").base_bytes < 300_000_000
    trained = planned("sdxl-loha", "cache.text=none", "adapter.text_encoders=true")
    assert trained.trainable_params > base.trainable_params
    word = planned("sdxl-loha", "cache.text=none", "pivotal.token=<cat>", "pivotal.vectors=3")
    assert word.trainable_params == base.trainable_params + 3 * (768 + 1280)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_activations_are_about_what_autograd_keeps(tmp_path):
    import torch

    import lowrank_core
    from lowrank_diffusion.adapting import adapter_config
    from lowrank_diffusion.tiny.pretrain import untrained

    pipeline = untrained()
    pipeline.save_pretrained(tmp_path)
    config = load_config(None, [f"base.path={tmp_path}", "train.batch_size=2"])
    found = plan(config, pytest.fail)
    unet = lowrank_core.inject(pipeline.unet, adapter_config(config.adapter, config.adapter.target))
    own, kept = {p.data_ptr() for p in unet.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    added = {"text_embeds": torch.randn(2, 80), "time_ids": torch.ones(2, 6)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(
            torch.randn(2, 4, 16, 16), torch.tensor([5, 6]), torch.randn(2, 32, 128), added_cond_kwargs=added
        ).sample
    measured = sum(storage.nbytes() for storage in kept.values())
    assert output.requires_grad
    assert measured / 2 < found.activation_bytes < measured * 2
