"""Regional compilation: which blocks, and that they compute the same."""

import pytest
import torch
from torch import Tensor, nn

from lowrank_core import compile as compile_blocks


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(8) for _ in range(3)])
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.slow
def test_the_repeated_blocks_are_compiled_and_one_graph_serves_them_all() -> None:
    model, x = Deep(), torch.randn(4, 8)
    expected, keys = model(x), list(model.state_dict())
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    assert compile_blocks(model, backend=backend, fullgraph=True) == ["blocks.0", "blocks.1", "blocks.2"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert len(graphs) == 1
    assert list(model.state_dict()) == keys


def test_diffusers_names_its_own_blocks() -> None:
    model = Deep()
    model._repeated_blocks = ["Sequential"]
    assert compile_blocks(model, backend="eager") == ["head"]


def test_a_model_without_repetition_is_compiled_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert compile_blocks(model, backend="eager") == [""]
    assert model(torch.randn(2, 4)).shape == (2, 4)
