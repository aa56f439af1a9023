"""What would be factorized, against what `factorize` does."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_core import LowrankError, factorize
from lowrank_core.costs.arithmetic import arithmetic_of_factorized
from lowrank_core.costs.factorized import count_factorized, count_original
from lowrank_core.costs.trace import trace
from lowrank_core.ranks import FixedRank, Gamma, Ratio
from lowrank_core.replacement import METHODS

RULES = {"gamma": Gamma(0.3), "ratio": Ratio(0.4), "rank": FixedRank(5)}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.Conv2d(24, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 24, 1),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(384, 48),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_layers_and_sizes_are_those_of_factorize(method, rule):
    model = net()
    value = {"gamma": 0.3, "ratio": 0.4, "rank": 5}[rule]
    done = factorize(model, method, **{rule: value}, exclude=("0",), exceptions={"3": Gamma(1.0)})
    counted = count_factorized(net(), method, RULES[rule], exclude=("0",), exceptions={"3": Gamma(1.0)})
    for ours, theirs in zip(counted.layers, done.changed, strict=True):
        assert (ours.name, ours.type, ours.shape, ours.rank, ours.max_rank, ours.original_params, ours.params) == (
            theirs.name,
            theirs.type,
            theirs.shape,
            theirs.rank,
            theirs.max_rank,
            theirs.original_params,
            theirs.params,
        )
    assert counted.left == done.left
    assert counted.params == counted.trainable_params == sum(p.numel() for p in model.parameters())
    assert counted.original_params == done.original_params


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_becomes_the_same_gamma(method):
    counted = count_factorized(net(), method, 15_000)
    assert counted.params == factorize(net(), method, budget=15_000).params <= 15_000
    assert counted.rule.startswith("gamma 0.")


def test_a_budget_below_the_smallest_size_says_what_that_is():
    with pytest.raises(LowrankError, match=r"a budget of 100 parameters is below the smallest size, [\d,]+ at gamma 0"):
        count_factorized(net(), "fedpara", 100)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [2, 9])
def test_flops_are_those_of_the_factorized_model(method, rank):
    model, x = net().to("meta"), torch.empty(1, 3, 12, 12, device="meta")
    report = count_factorized(model, method, FixedRank(rank))
    counted = arithmetic_of_factorized(model, report, trace(model, x), batch_size=8)
    real = copy.deepcopy(net())
    factorize(real, method, rank=rank)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        real.eval()(torch.zeros(1, 3, 12, 12))
    assert counted.forward == counter.get_total_flops()


def test_what_travels_has_running_means_and_only_the_shared_term_of_pfedpara():
    report = count_factorized(net(), "pfedpara", Gamma(0.2))
    buffers = 2 * 24
    factors = sum(layer.params for layer in report.layers)
    assert report.transferred_params == report.params + buffers - factors // 2
    assert count_original(net()).transferred_params == count_original(net()).params + buffers
