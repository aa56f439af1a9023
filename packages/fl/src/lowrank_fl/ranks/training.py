"""AdaLoRA's share of a client's training: the regulariser before a step, importance after it."""

import torch
from torch import Tensor, nn

from lowrank_core.adapters.config import AdaLoRA
from lowrank_core.adaptive.groups import find_groups
from lowrank_core.adaptive.importance import Importance
from lowrank_core.adaptive.orthogonality import add_orthogonality_gradient
from lowrank_fl.ranks.layers import adalora_of


class RankTraining:
    """What a training loop calls around each step of its optimizer, as core's allocator does (Zhang et al., 2023).

    Importance starts anew with every client and round, because a client keeps nothing between rounds.
    """

    @classmethod
    def of(cls, model: nn.Module) -> "RankTraining | None":
        """None where the model has no AdaLoRA."""
        config = adalora_of(model)
        return cls(model, config) if config else None

    def __init__(self, model: nn.Module, config: AdaLoRA) -> None:
        self.config = config
        self._groups = find_groups(model)
        self.begin()

    def begin(self) -> None:
        """Forget what earlier steps said."""
        parameters = {name: f.parameter for group in self._groups for name, f in group.factors.items()}
        self._importance = Importance(parameters, self.config.beta1, self.config.beta2)
        self._parameters = parameters
        self._gradients: dict[str, Tensor | None] = {}

    def before_step(self) -> None:
        """Add the gradient of the orthogonality penalty to the loss's."""
        orthonormal = [(f.parameter, f.dim) for group in self._groups for f in group.orthonormal]
        add_orthogonality_gradient(orthonormal, self.config.orthogonality)
        self._gradients = {name: parameter.grad for name, parameter in self._parameters.items()}

    def after_step(self) -> None:
        """Take the step's gradients into importance, at the parameters it leaves."""
        self._importance.update(self._parameters, self._gradients)

    def scores(self) -> Tensor:
        """The importance of every direction, sensitivity times uncertainty, layer after layer; float32 `(ranks,)`."""
        return torch.cat([group.scores(self._importance)[0] for group in self._groups])
