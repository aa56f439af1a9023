"""Regional compilation: which blocks, and that they compute the same."""

import pytest
import torch
from torch import Tensor, nn

from lowrank_core import LoHa, inject
from lowrank_core import compile as compile_blocks

pytestmark = pytest.mark.usefixtures("on_device")


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


@pytest.mark.filterwarnings("default")
def test_on_a_gpu_compiled_blocks_with_adapters_have_the_same_gradients(cuda: torch.device) -> None:
    """By torch's own compiler, which on a CPU would need one of C++."""
    config = LoHa(rank=4, target_modules=["up", "down"], init_weights="random")
    model, x = inject(Deep(), config).to(cuda), torch.randn(4, 8, device=cuda)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = torch.autograd.grad(model(x).square().sum(), factors)
    torch.compiler.reset()
    compile_blocks(model, fullgraph=True)
    compiled = torch.autograd.grad(model(x).square().sum(), factors)
    for got, want in zip(compiled, plain, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()
