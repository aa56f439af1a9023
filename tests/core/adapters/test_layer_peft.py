"""Adapted models against PEFT's: the same outputs and gradients for the same factors, in float64."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as HFConv1D

from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA, adapters_of, inject
from lowrank_core.adapters.config import AdapterConfig


class Network(nn.Module):
    """One of each layer that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 12)
        self.conv1d = nn.Conv1d(12, 12, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 6, 3, stride=2)
        self.conv3d = nn.Conv3d(6, 4, (1, 3, 1))
        self.linear = nn.Linear(5, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1d(self.embedding(ids).transpose(1, 2)))
        x = torch.tanh(self.conv2d(x.unsqueeze(1)))
        return self.linear(torch.tanh(self.conv3d(x.unsqueeze(2).transpose(2, 3).transpose(3, 4))).flatten(1)[:, :5])


def peft_and_ours(wanted: Any, ours: AdapterConfig, make: type[nn.Module] = Network) -> tuple[nn.Module, nn.Module]:
    """The same model twice, with the same random factors in PEFT's adapters and in ours, in float64."""
    base = make().double()
    model = inject(copy.deepcopy(base), ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.inject_adapter_in_model(wanted, base).double()
    factors = {f"{path}.{n}": p for path, a in adapters_of(model).items() for n, p in a.named_parameters()}
    named = dict(peft_parameters(theirs))
    assert set(named) == set(factors)
    for key, parameter in named.items():
        value = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
        parameter.data.copy_(value)
        factors[key].data.copy_(value.view(factors[key].shape))
    return theirs, model


def peft_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (path.replace(".default.weight", "").replace(".default", "").replace("lora_magnitude_vector", "magnitude"), p)
        for path, p in model.named_parameters()
        if ".default" in path and "ranknum" not in path
    ]


def assert_same(
    theirs: nn.Module, ours: nn.Module, x: Tensor, *, gradients: bool = True, tolerance: float = 1e-10
) -> None:
    expected, out = theirs(x), ours(x)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    if not gradients:
        return
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    factors = {f"{path}.{n}": p for path, a in adapters_of(ours).items() for n, p in a.named_parameters()}
    for key, parameter in peft_parameters(theirs):
        assert parameter.grad is not None
        assert factors[key].grad is not None, key
        torch.testing.assert_close(
            factors[key].grad.flatten(), parameter.grad.flatten(), rtol=tolerance, atol=tolerance
        )


ALL = ["embedding", "conv1d", "conv2d", "conv3d", "linear"]
PATTERNS: dict[str, Any] = {"rank_pattern": {"conv2d": 3}, "alpha_pattern": {"linear": 7}}
IDS = torch.randint(0, 9, (2, 7))


@pytest.mark.parametrize("stabilized", [False, True])
def test_lora_is_that_of_peft(stabilized: bool) -> None:
    fields = {"target_modules": ALL, "r": 2, "lora_alpha": 5, **PATTERNS, "use_rslora": stabilized}
    theirs, ours = peft_and_ours(
        peft.LoraConfig(**fields), LoRA(target_modules=ALL, rank=2, alpha=5, rank_stabilized=stabilized, **PATTERNS)
    )
    assert_same(theirs, ours, IDS)


@pytest.mark.parametrize("tucker", [False, True])
def test_loha_is_that_of_peft_but_for_its_tucker_gradients(tucker: bool) -> None:
    fields: dict[str, Any] = {"target_modules": ["conv1d", "conv2d", "linear"], "alpha": 5, **PATTERNS}
    theirs, ours = peft_and_ours(
        peft.LoHaConfig(r=2, use_effective_conv2d=tucker, **fields), LoHa(rank=2, tucker=tucker, **fields)
    )
    # Ours are held to autograd above. PEFT's scale is a float32 number whatever the factors are.
    assert_same(theirs, ours, IDS, gradients=not tucker, tolerance=1e-6)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_lokr_is_that_of_peft(tucker: bool, both: bool) -> None:
    layers = ["conv2d", "linear"] if tucker else ["conv1d", "conv2d", "linear"]  # PEFT fails on a Conv1d's Tucker form
    fields: dict[str, Any] = {"target_modules": layers, "alpha": 5, "decompose_both": both}
    theirs, ours = peft_and_ours(
        peft.LoKrConfig(r=1, use_effective_conv2d=tucker, decompose_factor=4, **fields),
        LoKr(rank=1, tucker=tucker, factor=4, **fields),
    )
    assert_same(theirs, ours, IDS)


def test_adalora_is_that_of_peft() -> None:
    fields: dict[str, Any] = {"target_modules": ["conv2d", "linear"]}
    theirs, ours = peft_and_ours(
        peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=10, **fields),
        AdaLoRA(rank=3, target_rank=2, alpha=5, **fields),
    )
    assert_same(theirs, ours, IDS)


def test_transformers_conv1d_is_that_of_peft() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = HFConv1D(8, 6), HFConv1D(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    theirs, ours = peft_and_ours(
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"], fan_in_fan_out=True),
        LoRA(rank=2, alpha=3, target_modules="all-linear"),
        Two,
    )
    assert_same(theirs, ours, torch.randn(3, 6).double())
