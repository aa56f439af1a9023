"""What an adapter's configuration refuses, and how it says so."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA, UsageError, inject, merge, remove, set_scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2.5}, "rank must be a whole number, got 2.5 for rank"),
        ({"rank": "4"}, "rank must be a whole number, got '4' for rank"),
        ({"rank": 0}, "rank must be at least 1, got 0 for rank"),
        ({"rank_pattern": {"0": -1}}, "rank must be at least 1, got -1 for 0"),
        ({"alpha": -1}, "alpha must be positive, got -1 for alpha"),
        ({"alpha": math.inf}, "alpha must be a finite number, got inf for alpha"),
        ({"alpha": "8"}, "alpha must be a finite number, got '8' for alpha"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"init_weights": "typo"}, "init_weights must be one of peft, lycoris, random, got 'typo'"),
        ({"weight_decompose": "up"}, 'weight_decompose must be "out", "in" or None, got \'up\''),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LoHa(target_modules=["0"], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "target_rank": 5}, "target_rank must be from 1 to rank, got 5 with rank 4"),
        ({"warmup": 0.6}, "warmup and settle are shares of the run that leave some of it, got 0.6 and 0.5"),
        ({"every": 0}, "every must be at least 1 step, got 0"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdaLoRA(target_modules=["0"], **options)


def test_a_scale_that_is_no_number_is_refused() -> None:
    model = inject(nn.Sequential(nn.Linear(4, 4)), LoHa(rank=2, target_modules=["0"]))
    with pytest.raises(UsageError, match="scale must be a finite number, got nan"):
        set_scale(model, math.nan)


def test_layers_that_others_have_changed_are_named_as_such() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(UsageError, match="0 carries an adapter of PEFT already; use patch_peft"):
        inject(model, LoRA(rank=2, target_modules=["0"]))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_quantized_layer_is_called_one() -> None:
    class Quantized(nn.Module):
        pass

    Quantized.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"
    with pytest.raises(UsageError, match=r"0 is a quantized layer .*; load the model unquantized"):
        inject(nn.Sequential(Quantized()), LoRA(rank=2, target_modules=["0"]))


def test_modules_trained_whole_stay_with_merged_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    inject(model, LoRA(rank=2, target_modules=["0"], modules_to_save=["2"], init_weights="random"))
    with torch.no_grad():
        model[2].current.weight.mul_(2)
    x = torch.randn(5, 4)
    adapted = model(x)
    merge(model)
    remove(model, keep_merged=True)
    assert type(model[2]) is nn.Linear
    torch.testing.assert_close(model(x), adapted)


@pytest.mark.parametrize("config", [LoRA, LoHa, LoKr])
def test_an_empty_batch_passes(config: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(54, 8))
    inject(model, config(rank=1, target_modules=["0", "2"]))
    model(torch.randn(0, 4, 5, 5)).sum().backward()


def test_all_linear_passes_by_what_attention_does_not_call() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    inject(model, LoRA(rank=2, target_modules="all-linear"))
    assert [name for name, _ in model.named_modules() if name.endswith(".base")] == ["0.linear1.base", "0.linear2.base"]
