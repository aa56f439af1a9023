"""The server's side: importances come in, directions go."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_core.adapters.config import AdaLoRA
from lowrank_core.adaptive import AdaptiveRank
from lowrank_core.adaptive.allocation import allocate
from lowrank_core.adaptive.groups import find_groups
from lowrank_core.adaptive.schedule import Schedule
from lowrank_core.errors import UsageError
from lowrank_fl.ranks.layers import Arrays, adalora_of, keep, ranked_layers


class RankAllocation:
    """Which directions of all layers stay, round by round.

    The budget follows AdaLoRA's cubic (Zhang et al., 2023, Eq. 12) in rounds. A direction's score is smoothed over
    rounds, S̄ ← β1·S̄ + (1 - β1)·Σ p_i S_i, with client i's share p_i of the round's examples and the importance S_i
    that it found in its local steps. After a round of the fall the directions beyond the budget are dropped
    for good.
    """

    @classmethod
    def of(cls, model: nn.Module, rounds: int) -> "RankAllocation | None":
        """For a model whose adapters have their first ranks, and a run of so many rounds; None without AdaLoRA.

        Raises:
            UsageError: the rounds leave none for the fall.
        """
        config = adalora_of(model)
        return cls(model, config, rounds) if config else None

    def __init__(self, model: nn.Module, config: AdaLoRA, rounds: int) -> None:
        groups = find_groups(model)
        self.layers = ranked_layers(groups)
        self.smoothing = config.beta1
        initial = sum(group.sides[0].rank for group in groups)
        try:
            self.schedule = Schedule.of(AdaptiveRank.of(config), rounds, initial, len(groups))
        except UsageError as error:
            # Core counts an optimizer's steps.
            said = str(error).replace("total_steps", "rounds").replace("optimizer steps", "them")
            raise UsageError(f"adapter.method adalora: {said.replace('steps', 'rounds')}") from None
        self._scores = np.zeros(initial, np.float32)

    def ranks(self, arrays: Arrays) -> dict[str, int]:
        """The directions that each layer has in these arrays."""
        return {layer.name: layer.rank(arrays) for layer in self.layers}

    def budget_in(self, number: int) -> int:
        """How many directions travel in that round, the first being round 1."""
        return self.schedule.budget(number - 1)

    def evenly(self, budget: int) -> list[np.ndarray]:
        """Masks of first ranks that share a budget out evenly, as nobody knows before training how it will fall."""
        least, more = divmod(budget, len(self.layers))
        first = self.schedule.initial // len(self.layers)
        return [np.arange(first) < least + (number < more) for number in range(len(self.layers))]

    def take(self, importances: Sequence[tuple[int, np.ndarray]]) -> None:
        """A round's importances, `(directions,)` each, by their clients' examples; where none came, nothing changes."""
        if not importances:
            return
        examples = sum(count for count, _ in importances)
        mean = sum((count / examples * scores.astype(np.float64) for count, scores in importances), np.float64(0))
        self._scores = (self.smoothing * self._scores + (1 - self.smoothing) * mean).astype(np.float32)

    def drop(self, number: int, arrays: Arrays) -> dict[str, np.ndarray]:
        """The arrays that round `number` left, without the directions that its budget has no room for."""
        if not self.schedule.allocates(number):
            return dict(arrays)
        held = [layer.rank(arrays) for layer in self.layers]
        scores: list[Tensor] = list(torch.from_numpy(self._scores).split(held))
        masks = [mask.numpy() for (mask,) in allocate([[one] for one in scores], self.schedule.budget(number))]
        self._scores = self._scores[np.concatenate(masks)]
        return keep(arrays, self.layers, masks)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint: the smoothed `scores`, layer after layer."""
        return {"scores": self._scores}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        self._scores = state["scores"]
