"""A small model with every difficulty for adapters, and a configuration of each method for it."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA
from lowrank_core.adapters.config import AdapterConfig


class Model(nn.Module):
    """An output tied to the input embedding, a layer used twice, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.again = self.block[0]
        self.head = nn.Linear(8, 3)
        self.lm_head = nn.Linear(8, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = self.again(self.block(x))
        return torch.cat([self.head(x), self.lm_head(x)], -1)


IDS = torch.tensor([[1, 5, 0], [7, 7, 8]])
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoRA(target_modules=["embed", "conv", "0", "2"], init_weights="random", alpha=4),
    "loha": LoHa(target_modules=["conv", "0", "2"], init_weights="random", modules_to_save=["head"]),
    "lokr": LoKr(target_modules="all-linear", rank=2, init_weights="random", weight_decompose="in"),
    "adalora": AdaLoRA(target_modules=r"conv|block\.\d", exclude_modules=["1"], rank=3, target_rank=2),
}


def random_lora(*targets: str, **fields: Any) -> LoRA:
    return LoRA(target_modules=list(targets), init_weights="random", **fields)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """The objects of a model, and what an injection might change of them."""
    return (
        list(model.named_modules(remove_duplicate=False)),
        [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters(remove_duplicate=False)],
        sorted(model.__dict__),
    )
