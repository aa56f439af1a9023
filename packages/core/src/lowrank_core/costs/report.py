"""What was counted: an entry for each layer that a method changes, and the model's totals."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_core.candidates import LeftEntry


@dataclass(frozen=True)
class LayerCost:
    """A layer that a method changes. `params` is what the method trains in it, biases aside."""

    name: str
    type: str
    shape: tuple[int, ...]
    rank: int
    max_rank: int
    """The largest rank its weight, or its change, can reach."""
    original_params: int
    params: int
    local_params: int = 0
    """Of `params`, those that never leave the client."""
    final_params: int | None = None
    """AdaLoRA: of `params`, what the final budget leaves this layer if every layer gets the same."""


@dataclass(frozen=True)
class CostReport:
    """A method's cost on a model."""

    method: str
    rule: str
    """The rank rule in words: `rank 8`, `gamma 0.1`."""
    layers: tuple[LayerCost, ...]
    left: tuple[LeftEntry, ...]
    original_params: int
    params: int
    """Held by the model that trains."""
    trainable_params: int
    transferred_params: int
    """What travels: floating-point buffers with a whole model, no factors that stay with the client."""
    final_params: int | None = None
    """AdaLoRA: `trainable_params` under the final budget, if it falls equally to every layer."""

    @property
    def ratio(self) -> float:
        """Trained parameters for each of the original's."""
        return self.trainable_params / self.original_params


def total(layers: Sequence[LayerCost]) -> int:
    return sum(layer.params for layer in layers)
