"""SDXL's outlines, and adapters on models with its topology, against the libraries' own."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_core.adapters.config import AdaLoRA, LoHa, LoKr, LoRA
from lowrank_core.adapters.inject import inject
from lowrank_core.costs.adapters import count_adapter
from lowrank_core.costs.targets import named_targets
from lowrank_core.costs.trace import trace
from lowrank_diffusion.outline import outline_of, outlined
from lowrank_diffusion.sdxl import COMPONENTS, UNET

PARAMETERS = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}

TINY = UNET | {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 24,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "norm_num_groups": 8,
}


def trained(model: nn.Module) -> int:
    # PEFT's AdaLoRA keeps its ranks as parameters, trainable by mistake on the meta device; they are not the adapter's.
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and "ranknum" not in name)


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_outline_has_the_parameters_of_the_real_network(component):
    model, _ = outlined(component)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[component]


@pytest.mark.slow
def test_attention_of_the_unet_is_what_trainers_adapt():
    names = named_targets(outlined("unet")[0], "attention")
    assert len(names) == 560
    assert {name.partition("attn")[2][2:] for name in names} == {"to_q", "to_k", "to_v", "to_out.0"}


@pytest.mark.slow
@pytest.mark.parametrize("component", COMPONENTS)
def test_an_outline_is_that_of_the_network_its_library_builds(component):
    from lowrank_diffusion.blank import blank_sdxl

    network = blank_sdxl(component)
    cost = trace(network.model, *network.arguments, **network.named)
    model, recorded = outlined(component)
    assert outline_of(model, recorded) == outline_of(network.model, cost)
    assert recorded == cost


@pytest.mark.slow
def test_flops_of_a_unet_are_those_torch_counts():
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from lowrank_diffusion.blank import unet_inputs

    with torch.device("meta"):
        model = UNet2DConditionModel(**TINY).eval()
        arguments, named = unet_inputs(TINY)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments, **named)
    assert trace(model, *arguments, **named).flops == counter.get_total_flops()


ADAPTERS = {
    "lora": LoRA(rank=4, target_modules=()),
    "dora": LoRA(rank=4, target_modules=(), weight_decompose="out"),
    "loha": LoHa(rank=4, target_modules=(), tucker=True),
    "lokr": LoKr(rank=4, target_modules=()),
    "adalora": AdaLoRA(rank=6, target_rank=4, target_modules=()),
}


def build(name: str) -> nn.Module:
    if name == "tiny SDXL":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return UNet2DConditionModel(**TINY)
    from lowrank_fl.models.resnet import resnet18

    return resnet18(3, 10, small=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("name", ["tiny SDXL", "resnet18"])
@pytest.mark.parametrize("target", ["all-linear", "all"])
def test_counts_are_those_of_injected_models_ours_and_pefts(name, method, target):
    import dataclasses

    import peft

    with torch.device("meta"):
        ours, theirs = build(name), build(name)
    names = named_targets(ours, target)
    config = dataclasses.replace(ADAPTERS[method], target_modules=names)
    counted = count_adapter(ours, config).trainable_params
    inject(ours, config)
    assert counted == trained(ours)
    common = {"target_modules": names, "r": config.rank}
    like = {
        "lora": lambda: peft.LoraConfig(**common),
        "dora": lambda: peft.LoraConfig(**common, use_dora=True),
        "loha": lambda: peft.LoHaConfig(**common, use_effective_conv2d=True),
        "lokr": lambda: peft.LoKrConfig(**common),
        "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=names),
    }[method]()
    # DoRA takes the norms of the weights, and so needs some.
    theirs = theirs if method != "dora" else theirs.to_empty(device="cpu")
    peft.inject_adapter_in_model(like, theirs, low_cpu_mem_usage=method != "dora")
    assert counted == trained(theirs)


@pytest.mark.slow
def test_peft_on_the_outlined_unet_agrees():
    import peft

    model = outlined("unet")[0]
    names = named_targets(model, "attention")
    counted = count_adapter(model, LoHa(rank=8, target_modules=names)).trainable_params
    peft.inject_adapter_in_model(peft.LoHaConfig(r=8, target_modules=names), model, low_cpu_mem_usage=True)
    assert counted == trained(model) == 23_224_320
