"""What an adapter would hold and compute, against PEFT's adapters and our own."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_core import LowrankError
from lowrank_core.adapters.config import AdaLoRA, LoHa, LoKr, LoRA
from lowrank_core.adapters.inject import inject
from lowrank_core.costs.adapters import count_adapter, largest_fitting
from lowrank_core.costs.arithmetic import arithmetic_of_adapter
from lowrank_core.costs.trace import trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 24, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(24, 32, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(32, 20, 1)
        self.wide = nn.Linear(20 * 36, 96)
        self.head = nn.Linear(96, 10)

    def forward(self, x):
        return self.head(self.wide(self.pointwise(self.grouped(self.conv(x))).flatten(1)))


ALL = ["conv", "grouped", "pointwise", "wide", "head"]
DENSE = ["conv", "pointwise", "wide", "head"]
CONFIGS = {
    "lora": LoRA(rank=4, target_modules=ALL[:1] + ALL[2:]),
    "lora by rank pattern": LoRA(rank=4, target_modules=DENSE, rank_pattern={"wide": 9}),
    "dora": LoRA(rank=4, target_modules=["wide", "conv", "head"], weight_decompose="out"),
    "loha": LoHa(rank=3, target_modules=ALL),
    "loha tucker": LoHa(rank=3, target_modules=ALL, tucker=True),
    "lokr": LoKr(rank=2, target_modules=ALL),
    "lokr whole": LoKr(rank=64, target_modules=ALL),
    "lokr both sides": LoKr(rank=1, target_modules=ALL, decompose_both=True, factor=4),
    "lokr tucker": LoKr(rank=2, target_modules=ALL, tucker=True),
    "adalora": AdaLoRA(rank=6, target_rank=4, target_modules=["wide", "head"]),
    "adalora on a convolution": AdaLoRA(rank=6, target_rank=4, target_modules=["conv", "pointwise"]),
}


def in_peft(config):
    import peft

    common = {"target_modules": list(config.target_modules), "rank_pattern": dict(config.rank_pattern)}
    if config.method == "lora":
        return peft.LoraConfig(r=config.rank, use_dora=config.weight_decompose is not None, **common)
    if config.method == "loha":
        return peft.LoHaConfig(r=config.rank, use_effective_conv2d=config.tucker, **common)
    if config.method == "lokr":
        return peft.LoKrConfig(
            r=config.rank,
            use_effective_conv2d=config.tucker,
            decompose_both=config.decompose_both,
            decompose_factor=config.factor,
            **common,
        )
    common.pop("rank_pattern")
    return peft.AdaLoraConfig(init_r=config.rank, target_r=config.target_rank, total_step=100, **common)


def trained_by_peft(model, config):
    import peft

    peft.inject_adapter_in_model(in_peft(config), model, low_cpu_mem_usage=True)
    # AdaLoRA's count of ranks is a frozen parameter.
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_pefts(name):
    counted = count_adapter(Net(), CONFIGS[name])
    assert counted.trainable_params == trained_by_peft(Net(), CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_an_injected_model(name):
    model = Net()
    counted = count_adapter(model, CONFIGS[name])
    inject(model, CONFIGS[name])
    assert counted.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "dora"])
@pytest.mark.parametrize("rank", [2, 20])
def test_flops_of_a_forward_are_those_of_an_injected_model(name, rank):
    from dataclasses import replace

    rank = min(rank, 6) if name.startswith("adalora") else rank
    config = replace(CONFIGS[name], rank=max(rank, getattr(CONFIGS[name], "target_rank", 1)))
    model = Net().to("meta")
    counted = arithmetic_of_adapter(model, config, trace(model, torch.empty(1, 4, 12, 12, device="meta")), 1)
    real = Net().double()
    inject(real, config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        real.eval()(torch.zeros(1, 4, 12, 12, dtype=torch.float64))
    # The processor's balance may choose another way than the one assumed for a device that is not known.
    assert counted.forward == pytest.approx(counter.get_total_flops(), rel=0.25)
    assert counted.original == 2 * 36 * (24 * 36 + 32 * 12 * 9 + 20 * 32) + 2 * 96 * (720 + 10)


def test_the_final_budget_of_adalora_is_its_target_rank_in_every_layer():
    report = count_adapter(Net(), AdaLoRA(rank=6, target_rank=4, target_modules=["wide", "head"]))
    assert report.final_params == count_adapter(Net(), LoRA(rank=4, target_modules=["wide", "head"])).params - (
        report.original_params - 8
    )
    assert report.rule == "rank 6 to 4"


@pytest.mark.parametrize(
    ("config", "budget"),
    [(LoRA(target_modules=ALL), 2500), (LoHa(target_modules=ALL), 2500), (LoKr(target_modules=ALL), 700)],
)
def test_the_largest_fitting_rank_fits_and_the_next_does_not(config, budget):
    from dataclasses import replace

    found = largest_fitting(Net(), config, budget)
    assert count_adapter(Net(), found).trainable_params <= budget
    assert count_adapter(Net(), replace(found, rank=found.rank + 1)).trainable_params > budget


def test_of_ranks_that_hold_the_same_the_smallest_is_found():
    found = largest_fitting(Net(), LoKr(target_modules=["head"]), 10**6)
    same = count_adapter(Net(), LoKr(target_modules=["head"], rank=96)).trainable_params
    assert count_adapter(Net(), found).trainable_params == same
    assert found.rank < 96


def test_adalora_keeps_its_share_of_the_rank():
    found = largest_fitting(Net(), AdaLoRA(rank=12, target_rank=8, target_modules=["wide"]), 10_000)
    assert (found.rank, found.target_rank) == (12, 8)


def test_a_budget_below_rank_1_says_what_rank_1_holds():
    with pytest.raises(LowrankError, match=r"a budget of 10 parameters is below lora's smallest, 106 at rank 1"):
        largest_fitting(Net(), LoRA(target_modules=["head"]), 10)
