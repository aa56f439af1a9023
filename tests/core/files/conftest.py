"""A small network with every kind of layer that adapters go to, and adapters with random factors on it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_core
from lowrank_core.adapters.config import AdapterConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(12, 16)
        self.to_out = nn.ModuleList([nn.Linear(16, 12), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](torch.tanh(self.to_q(x)))


class Net(nn.Module):
    """Names with underscores, a nested list, kernels of one and of nine pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.mid_blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.pointwise(torch.tanh(self.conv_in(x)))).mean((2, 3))
        for block in self.mid_blocks:
            x = x + block(x)
        return self.head(x)


TARGETS = ["conv_in", "pointwise", "to_q", "to_out.0", "head"]


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 4, 5, 5)


@pytest.fixture
def adapted(net: Net) -> Callable[..., nn.Module]:
    """`adapted(config)`: a copy of the network under an adapter whose factors are all random."""

    def adapted(config: AdapterConfig) -> nn.Module:
        model = lowrank_core.inject(copy.deepcopy(net), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    # Magnitudes of weight decomposition stay near where they start.
                    parameter.add_(0.3 * torch.randn_like(parameter)).abs_() if parameter.dim() and min(
                        parameter.shape
                    ) == 1 else parameter.normal_(std=0.4)
        return model

    return adapted
