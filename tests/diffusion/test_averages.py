"""Averages of factors, by hand, and that using one leaves training as it was."""

from copy import deepcopy

import pytest
import torch

from lowrank_core import UsageError
from lowrank_diffusion.averages import Averages
from lowrank_diffusion.config import TrainConfig
from lowrank_diffusion.load import load_config
from lowrank_diffusion.optimizers import build_optimizer

pytestmark = pytest.mark.filterwarnings("default")


def made(**values):
    """A factor of three numbers, its optimizer, and averages."""
    factor = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    train = TrainConfig(lr=0.1, weight_decay=0, **values)
    optimizer = build_optimizer(train, [factor])
    return factor, optimizer, Averages(train, optimizer, {"unet.a": factor})


def step(factor, optimizer, averages):
    factor.grad = (factor.detach() - 0.3) * torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    averages.step()


def within(averages, factor) -> torch.Tensor:
    with averages.used():
        return factor.detach().clone()


def test_the_running_average_by_hand():
    factor, optimizer, averages = made(ema=0.2)
    expected = None
    for number in range(6):
        step(factor, optimizer, averages)
        # The first step is taken whole; then 2/11, which is below 0.2, and 0.2 from 3/12 on.
        decay = (0, 2 / 11, 0.2, 0.2, 0.2, 0.2)[number]
        value = factor.detach().double()
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert torch.allclose(within(averages, factor).double(), expected, rtol=1e-6)
    assert list(averages.state()) == ["unet.a"]


def test_schedule_free_uses_the_mean_of_its_fast_points():
    pytest.importorskip("schedulefree")
    factor, optimizer, averages = made(optimizer="schedulefree")
    points = []
    for _ in range(5):
        step(factor, optimizer, averages)
        points.append(optimizer.state[factor]["z"].double().clone())
        assert torch.allclose(within(averages, factor).double(), torch.stack(points).mean(0), atol=1e-6)
    assert averages.state() == {}


@pytest.mark.parametrize("values", [{"ema": 0.9}, {"optimizer": "schedulefree"}, {}])
def test_using_the_average_changes_no_bit_of_what_follows(values):
    if "optimizer" in values:
        pytest.importorskip("schedulefree")
    courses = []
    for uses in (0, 3):
        course = made(**values)
        for _ in range(20):
            for _ in range(uses):
                within(course[2], course[0])
            step(*course)
        courses.append((course[0].detach(), within(course[2], course[0])))
    assert torch.equal(courses[0][0], courses[1][0])
    assert torch.equal(courses[0][1], courses[1][1])
    assert torch.equal(*courses[0]) == (not values)


def test_the_factors_come_back_after_an_error():
    factor, optimizer, averages = made(ema=0.5)
    for _ in range(2):
        step(factor, optimizer, averages)
    before = factor.detach().clone()
    with pytest.raises(KeyError), averages.used():
        raise KeyError(str(factor.tolist()))
    assert torch.equal(factor, before)


def test_an_average_goes_on_where_it_stopped():
    course, other = made(ema=0.5), made(ema=0.5)
    for _ in range(3):
        step(*course)
    other[0].data.copy_(course[0].data)
    other[1].load_state_dict(deepcopy(course[1].state_dict()))
    other[2].load_state({name: tensor.clone() for name, tensor in course[2].state().items()}, 3)
    for each in (course, other):
        step(*each)
    assert torch.equal(within(course[2], course[0]), within(other[2], other[0]))


FREE = "train.optimizer=schedulefree"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([FREE, "train.schedule=cosine"], "takes the place of a schedule; set train.schedule: constant"),
        ([FREE, "train.schedule=constant", "train.ema=0.9"], "averages the factors already; leave train.ema out"),
        (
            ["train.ema=0.9", "adapter.method=adalora"],
            "adalora changes the factors' shapes, which their average cannot",
        ),
        ([FREE, "train.schedule=constant", "adapter.method=adalora"], "take another optimizer than schedulefree"),
        (["train.ema=1"], "train.ema"),
    ],
)
def test_what_does_not_go_together(overrides, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_config(None, overrides)
