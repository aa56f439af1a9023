"""LoKr: ΔW = W1 ⊗ W2, either side optionally a product of factors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_core.adapters.forms.form import Factors, Init
from lowrank_core.adapters.geometry import Geometry, Shape


@dataclass(frozen=True)
class LoKrForm:
    """With out = a·b and in = c·d: W1 is (a, c), W2 is (b, d, *kernel).

    `lokr_w1`, or `lokr_w1_a` (a, r) and `lokr_w1_b` (r, c) with decompose_both where r < max(a, c) / 2;
    `lokr_w2`, or `lokr_w2_a` (b, r) and `lokr_w2_b` (r, d·K) where r < max(b, d) / 2;
    tucker: `lokr_t2` (r, r, *kernel) with `lokr_w2_a` (r, b) and `lokr_w2_b` (r, d).

    factor: the largest a and c, -1 for the most nearly square split.

    Yeh et al. (LyCORIS), https://arxiv.org/abs/2309.14859, section 3.4
    """

    factor: int = -1
    decompose_both: bool = False
    tucker: bool = False
    method = "lokr"

    def shapes(self, geometry: Geometry, rank: int) -> dict[str, Shape]:
        outputs, inputs, *kernel = geometry.weight_shape
        a, b = split(outputs, self.factor)
        c, d = split(inputs, self.factor)
        if self.decompose_both and rank < max(a, c) / 2:
            shapes: dict[str, Shape] = {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)}
        else:
            shapes = {"lokr_w1": (a, c)}
        if rank >= max(b, d) / 2:
            shapes["lokr_w2"] = (b, d, *kernel)
        elif self.tucker and kernel and not geometry.pointwise:
            stored = (*kernel, 1) if len(kernel) == 1 else tuple(kernel)
            shapes |= {"lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d), "lokr_t2": (rank, rank, *stored)}
        else:
            shapes |= {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}
        return shapes

    def init(self, factors: Factors, init: Init) -> None:
        """peft: W1 (or its a) = 0, the rest uniform; lycoris: W2 (or its b) = 0."""
        zero = {"peft": ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), "random": ()}[init]
        with torch.no_grad():
            for name, factor in factors.items():
                if name in zero:
                    nn.init.zeros_(factor)
                else:
                    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def sides(self, factors: Factors, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """W1 (a, c) and W2 (b, d, *kernel)."""
        first = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
        if "lokr_w2" in factors:
            return first, factors["lokr_w2"]
        a, b = factors["lokr_w2_a"], factors["lokr_w2_b"]
        if "lokr_t2" in factors:
            core = factors["lokr_t2"].flatten(2)  # (r, r, K): the outputs' rank first
            second = torch.einsum("pqk,po,qi->oik", core, a, b)
        else:
            second = a @ b
        outputs, inputs, *kernel = geometry.weight_shape
        return first, second.reshape(outputs // first.shape[0], inputs // first.shape[1], *kernel)

    def compose(self, factors: Factors, geometry: Geometry) -> Tensor:
        first, second = self.sides(factors, geometry)
        product = first[:, None, :, None, None] * second.flatten(2)[None, :, None] if second.dim() > 2 else None
        if product is None:
            return torch.kron(first, second)
        a, c = first.shape
        b, d = second.shape[:2]
        return product.reshape(a * b, c * d, *second.shape[2:])

    def pair(self, factors: Factors, geometry: Geometry) -> tuple[Tensor, Tensor] | None:
        """None: its exact rank is rank(W1)·rank(W2), of use for files alone (see `lowrank_core.adapters.as_lora`)."""
        return None

    def max_rank(self, geometry: Geometry, rank: int) -> int:
        outputs, inputs, *kernel = geometry.weight_shape
        a, b = split(outputs, self.factor)
        c, d = split(inputs, self.factor)
        first = min(a, c, rank) if self.decompose_both and rank < max(a, c) / 2 else min(a, c)
        second = min(b, d * math.prod(kernel))
        if rank < max(b, d) / 2:
            second = min(second, rank)
        return min(first * second, *geometry.matrix_shape)


def split(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`dimension` = m·n: m = `factor` where it divides, else the largest divisor m ≤ n that is no larger than `factor`;
    -1 sets no limit. PEFT's rule; LyCORIS would also swap m and n where the factor is the larger.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor < 0 else max(factor, 1)
    m = max(m for m in range(1, math.isqrt(dimension) + 1) if dimension % m == 0 and m <= limit)
    return m, dimension // m
