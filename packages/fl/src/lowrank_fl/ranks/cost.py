"""What a run of AdaLoRA will send, whose arrays shrink by a schedule that is known beforehand."""

import torch
from torch import Tensor, nn

from lowrank_fl.config import RunConfig
from lowrank_fl.ranks.allocation import RankAllocation
from lowrank_fl.ranks.layers import keep
from lowrank_fl.state import personalization_of, transferred


class RankCost:
    """The models that travel, round by round.

    How a budget falls on the layers is found out in training; here it is shared out evenly.
    """

    @classmethod
    def of(cls, config: RunConfig, model: nn.Module) -> "RankCost | None":
        """For a model as the run begins with it; None without AdaLoRA."""
        allocation = RankAllocation.of(model, config.rounds)
        return cls(config, model, allocation) if allocation else None

    def __init__(self, config: RunConfig, model: nn.Module, allocation: RankAllocation) -> None:
        self._allocation = allocation
        shared = transferred(model, personalization_of(config))
        self._first = {name: tensor.numpy() for name, tensor in shared.items()}
        self.budgets = [allocation.budget_in(number) for number in range(1, config.rounds + 2)]
        """The directions that travel in each round, and last those of the model that is left."""
        self.mean_budget = round(sum(self.budgets[:-1]) / config.rounds)
        """Of the rounds."""

    def state(self, budget: int) -> dict[str, Tensor]:
        """What travels of a model with so many directions."""
        kept = keep(self._first, self._allocation.layers, self._allocation.evenly(budget))
        return {name: torch.from_numpy(array) for name, array in kept.items()}
