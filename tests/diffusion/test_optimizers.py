"""Optimizers by name, their groups and rates, and the schedules' numbers."""

import math
import sys
from types import ModuleType

import pytest
import torch

from lowrank_core import LowrankError, UsageError
from lowrank_diffusion.config import TrainConfig
from lowrank_diffusion.optimizers import build_optimizer, build_schedule, rate_factor


def factors(*values: float) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.full((4, 3), value)) for value in values]


def train(optimizer="adamw", **values) -> TrainConfig:
    return TrainConfig(optimizer=optimizer, **values)


def test_groups_have_their_own_rates():
    unet, text = factors(0.0, 1.0), factors(2.0)
    optimizer = build_optimizer(train(lr=1e-3, text_lr=1e-5, weight_decay=0.1), iter(unet), iter(text))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(2, 1e-3), (1, 1e-5)]
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)
    assert len(build_optimizer(train(), unet).param_groups) == 1
    assert build_optimizer(train(lr=1e-3), unet, text).param_groups[1]["lr"] == 1e-3
    word = build_optimizer(train(lr=1e-3), unet, text, word=factors(0.5), word_lr=1e-2).param_groups[2]
    assert (word["lr"], word["weight_decay"]) == (1e-2, 0)


def test_magnitudes_have_their_factors_rates_and_no_decay():
    (factor, magnitude), (slow, slow_magnitude), (text, text_magnitude) = (factors(1.0, 2.0) for _ in range(3))
    optimizer = build_optimizer(
        train(lr=1e-3, text_lr=1e-4, weight_decay=0.1),
        [factor, magnitude, slow, slow_magnitude],
        [text, text_magnitude],
        {slow: 0.5, slow_magnitude: 0.5},
        magnitudes=[magnitude, slow_magnitude, text_magnitude],
    )
    found = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = [(1e-3, 0.1), (1e-3, 0), (5e-4, 0.1), (5e-4, 0), (1e-4, 0.1), (1e-4, 0)]
    assert [found[p] for p in (factor, magnitude, slow, slow_magnitude, text, text_magnitude)] == expected
    assert optimizer.param_groups[0]["params"] == [factor]


PACKAGES = {
    "prodigy": "prodigyopt",
    "adamw8bit": "bitsandbytes",
    "lion": "lion_pytorch",
    "schedulefree": "schedulefree",
}
OPTIMIZERS = [
    ("adamw", 0.05),
    ("adafactor", 0.05),
    ("prodigy", 1),
    ("adamw8bit", 0.05),
    ("lion", 0.01),
    ("schedulefree", 0.05),
]


@pytest.mark.parametrize(("name", "lr"), OPTIMIZERS)
@pytest.mark.filterwarnings("default")
def test_factors_that_start_at_zero_learn(name, lr):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    (factor,) = parameters = factors(0.0)
    optimizer = build_optimizer(train(name, lr=lr, weight_decay=0), parameters)
    if name == "schedulefree":
        optimizer.train()
    for _ in range(200):
        optimizer.zero_grad()
        (factor - 0.5).square().mean().backward()
        optimizer.step()
    assert factor.detach().mean().item() == pytest.approx(0.5, abs=0.1)


def test_adafactors_first_step_is_the_given_rate():
    (factor,) = parameters = factors(0.0)
    build = build_optimizer(train("adafactor", lr=1e-3, weight_decay=0), parameters)
    factor.grad = torch.full_like(factor, 7.0)
    build.step()
    assert torch.allclose(factor, torch.full_like(factor, -1e-3))


def test_lions_first_step_by_hand():
    pytest.importorskip("lion_pytorch")
    (factor,) = parameters = factors(2.0)
    optimizer = build_optimizer(train("lion", lr=0.1, weight_decay=0.5), parameters)
    factor.grad = torch.full_like(factor, -7.0)
    optimizer.step()
    # 2 (1 - lr decay) - lr sign(gradient)
    assert torch.allclose(factor, torch.full_like(factor, 2.0 * 0.95 + 0.1))


@pytest.mark.parametrize(("name", "module"), PACKAGES.items())
def test_a_package_that_is_missing_is_named(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.optim", raising=False)
    package = module.replace("_", "-")
    with pytest.raises(LowrankError, match=f"{name} is of the package {package}, .*pip install {package}, or choose"):
        build_optimizer(train(name, lr=1), factors(0.0))


def test_prodigy_is_silent_and_gets_the_decay(monkeypatch, capsys):
    class Prodigy(torch.optim.SGD):
        def __init__(self, groups, **options):
            print("Using decoupled weight decay")
            self.options = options
            super().__init__(groups)

    package = ModuleType("prodigyopt")
    package.Prodigy = Prodigy
    monkeypatch.setitem(sys.modules, "prodigyopt", package)
    optimizer = build_optimizer(train("prodigy", lr=1, weight_decay=0.1), factors(0.0), factors(1.0))
    assert optimizer.options == {"weight_decay": 0.1, "use_bias_correction": True, "safeguard_warmup": True}
    assert capsys.readouterr().out == ""


def test_prodigy_refuses_the_rates_of_other_optimizers():
    with pytest.raises(UsageError, match=r"multiplies it with train.lr, which is 0.0001; set train.lr: 1"):
        build_optimizer(train("prodigy"), factors(0.0))
    with pytest.raises(UsageError, match=r"train.text_lr is 0.5 and train.lr 1; set train.text_lr: 1"):
        build_optimizer(train("prodigy", lr=1, text_lr=0.5), factors(0.0), factors(0.0))
    with pytest.raises(UsageError, match=r"pivotal.lr is 0.1 and train.lr 1; set pivotal.lr: 1"):
        build_optimizer(train("prodigy", lr=1), factors(0.0), factors(0.0), word=factors(0.0), word_lr=0.1)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 1, 1), ("linear", 0.5, 0.025), ("cosine", 0.5, 0.5 * (1 + math.cos(math.pi * 39 / 40)))],
)
def test_schedules_by_hand(schedule, middle, last):
    values = train(steps=50, warmup=10, schedule=schedule)
    assert [rate_factor(values, step) for step in range(11)] == pytest.approx([(n + 1) / 11 for n in range(11)])
    assert rate_factor(values, 30) == pytest.approx(middle)
    assert rate_factor(values, 49) == pytest.approx(last)
    assert rate_factor(values, 50) == pytest.approx(float(schedule == "constant"))


def test_a_run_that_is_all_warm_up_has_a_rate():
    values = train(steps=5, warmup=5, schedule="linear")
    assert [rate_factor(values, step) for step in range(6)] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])


def test_the_schedule_sets_every_groups_rate():
    values = train(lr=1e-3, text_lr=1e-4, steps=4, schedule="linear")
    optimizer = build_optimizer(values, factors(0.0), factors(0.0))
    schedule = build_schedule(values, optimizer)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([1e-3 * factor, 1e-4 * factor]) for factor in (1, 0.75, 0.5, 0.25)]
