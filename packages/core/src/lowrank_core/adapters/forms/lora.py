"""LoRA: ΔW = B A, and for convolutions, on request, the Tucker form of LyCORIS's LoCon."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_core.adapters.forms.form import Factors, Init
from lowrank_core.adapters.geometry import Geometry, Shape


@dataclass(frozen=True)
class LoRAForm:
    """`lora_A` (r, in, *kernel) and `lora_B` (out, r, *ones); r(out + in·K) parameters.

    tucker: kernels larger than a pixel go through `lora_mid` (r, r, *kernel), with `lora_A` (r, in, *ones).
    Embeddings have `lora_embedding_A` (r, rows) and `lora_embedding_B` (width, r), as in PEFT.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685
    """

    tucker: bool = False
    method = "lora"

    def shapes(self, geometry: Geometry, rank: int) -> dict[str, Shape]:
        outputs, inputs, *kernel = geometry.weight_shape
        if geometry.kind == "embedding":
            return {"lora_embedding_A": (rank, inputs), "lora_embedding_B": (outputs, rank)}
        ones = (1,) * len(kernel)
        if self.tucker and not geometry.pointwise and kernel:
            return {
                "lora_A": (rank, inputs, *ones),
                "lora_mid": (rank, rank, *kernel),
                "lora_B": (outputs, rank, *ones),
            }
        return {"lora_A": (rank, inputs, *kernel), "lora_B": (outputs, rank, *ones)}

    def init(self, factors: Factors, init: Init) -> None:
        """B = 0 and A uniform; for embeddings A = 0 and B normal, as PEFT does."""
        with torch.no_grad():
            for name, factor in factors.items():
                if name == "lora_embedding_A":
                    nn.init.zeros_(factor)
                elif name == "lora_embedding_B":
                    nn.init.normal_(factor)
                elif name == "lora_B" and init != "random":
                    nn.init.zeros_(factor)
                else:
                    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
            if init == "random" and "lora_embedding_A" in factors:
                nn.init.normal_(factors["lora_embedding_A"])

    def compose(self, factors: Factors, geometry: Geometry) -> Tensor:
        up, down = self.pair(factors, geometry)
        return (up @ down).view(geometry.weight_shape)

    def pair(self, factors: Factors, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if "lora_embedding_A" in factors:
            return factors["lora_embedding_B"], factors["lora_embedding_A"]
        up, down = factors["lora_B"].flatten(1), factors["lora_A"].flatten(1)
        if "lora_mid" in factors:
            mid = factors["lora_mid"]  # (r, r, *kernel): contract the inputs' rank with A
            down = torch.einsum("pqk,qi->pik", mid.flatten(2), down).flatten(1)
        return up, down

    def max_rank(self, geometry: Geometry, rank: int) -> int:
        return min(rank, *geometry.matrix_shape)
