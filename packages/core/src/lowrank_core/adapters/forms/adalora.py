"""AdaLoRA: ΔW = B diag(E) A with values E that an allocator prunes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_core.adapters.forms.form import Factors, Init
from lowrank_core.adapters.geometry import Geometry, Shape


@dataclass(frozen=True)
class AdaLoRAForm:
    """`lora_A` (r, in·K), `lora_E` (r, 1) and `lora_B` (out, r); r(out + in·K + 1) parameters.

    Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", https://arxiv.org/abs/2303.10512
    """

    method = "adalora"

    def shapes(self, geometry: Geometry, rank: int) -> dict[str, Shape]:
        outputs, inputs = geometry.matrix_shape
        return {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_E": (rank, 1)}

    def init(self, factors: Factors, init: Init) -> None:
        """E = 0, A and B normal with deviation 0.02; `random` draws all three standard normal, as PEFT does."""
        with torch.no_grad():
            for name, factor in factors.items():
                if init == "random":
                    nn.init.normal_(factor)
                elif name == "lora_E":
                    nn.init.zeros_(factor)
                else:
                    nn.init.normal_(factor, std=0.02)

    def compose(self, factors: Factors, geometry: Geometry) -> Tensor:
        up, down = self.pair(factors, geometry)
        return (up @ down).view(geometry.weight_shape)

    def pair(self, factors: Factors, geometry: Geometry) -> tuple[Tensor, Tensor]:
        return factors["lora_B"], factors["lora_E"] * factors["lora_A"]

    def max_rank(self, geometry: Geometry, rank: int) -> int:
        return min(rank, *geometry.matrix_shape)
