"""Small models with ranks to adapt, shared by the tests of adaptive ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Triplets(nn.Module):
    """A frozen linear layer plus B diag(E) A, with AdaLoRA's names."""

    def __init__(self, inputs: int, outputs: int, rank: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, inputs, dtype=dtype) * 0.2)
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, dtype=dtype))
        self.lora_B = nn.Parameter(torch.randn(outputs, rank, dtype=dtype) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_E * self.lora_A), self.lora_B)


class Products(nn.Module):
    """A frozen linear layer plus (A1 B1) ⊙ (A2 B2), with LoHa's names."""

    def __init__(self, inputs: int, outputs: int, rank: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
        for side in (1, 2):
            self.register_parameter(f"hada_w{side}_a", nn.Parameter(torch.randn(outputs, rank, dtype=dtype)))
            self.register_parameter(f"hada_w{side}_b", nn.Parameter(torch.randn(rank, inputs, dtype=dtype)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b))


def small_model(rank: int = 4, layer: type[nn.Module] = Triplets, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two adapted layers, the first of which has more to learn from `batch`; drawn alike for every device."""
    with torch.device("cpu"):
        model = nn.Sequential(layer(6, 8, rank, dtype), nn.Tanh(), layer(8, 3, rank, dtype))
    return model.to(torch.get_default_device())


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The data of one step, the same in every run and on every device."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2] + x[:, 3], x[:, 4]], 1)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(step, dtype)
    return F.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, dtype: torch.dtype = torch.float32) -> None:
    """A plain loop, which knows nothing of ranks."""
    for step in steps:
        loss = loss_of(model, step, dtype)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
