"""LoHa: ΔW = (A1 B1) ⊙ (A2 B2), FedPara's product as an adapter; conv kernels flat or in Tucker form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_core.adapters.forms.form import Factors, Init
from lowrank_core.adapters.geometry import Geometry, Shape
from lowrank_core.factorizations.term import compose_term


@dataclass(frozen=True)
class LoHaForm:
    """`hada_w1_a`, `hada_w2_a` (out, r) and `hada_w1_b`, `hada_w2_b` (r, in·K); 2r(out + in·K) parameters.

    tucker: kernels larger than a pixel as `hada_t1`, `hada_t2` (r, r, *kernel) with `*_a` (r, out) and `*_b` (r, in);
    a one-dimensional kernel is stored as (r, r, k, 1), as PEFT does.

    Hyeon-Woo et al., https://arxiv.org/abs/2108.06098; Yeh et al. (LyCORIS), https://arxiv.org/abs/2309.14859
    """

    tucker: bool = False
    method = "loha"

    def shapes(self, geometry: Geometry, rank: int) -> dict[str, Shape]:
        outputs, inputs, *kernel = geometry.weight_shape
        if self.tucker and kernel and not geometry.pointwise:
            stored = (*kernel, 1) if len(kernel) == 1 else tuple(kernel)
            a, b, t = (rank, outputs), (rank, inputs), (rank, rank, *stored)
        else:
            (outputs, inputs), t = geometry.matrix_shape, None
            a, b = (outputs, rank), (rank, inputs)
        shapes = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        return shapes if t is None else {**shapes, "hada_t1": t, "hada_t2": t}

    def init(self, factors: Factors, init: Init) -> None:
        """peft: uniform, w2_b = 0. lycoris: b standard normal, w1_a and t with deviation 0.1, w2_a = 0."""
        zero = {"peft": "hada_w2_b", "lycoris": "hada_w2_a", "random": ""}[init]
        with torch.no_grad():
            for name, factor in factors.items():
                if name == zero:
                    nn.init.zeros_(factor)
                elif init == "lycoris":
                    nn.init.normal_(factor, std=1.0 if name.endswith("_b") else 0.1)
                else:
                    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def compose(self, factors: Factors, geometry: Geometry) -> Tensor:
        first, second = self.terms(factors, geometry)
        return first * second

    def terms(self, factors: Factors, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """W1 and W2, each `geometry.weight_shape`."""
        shape = geometry.weight_shape
        if "hada_t1" not in factors:
            first = factors["hada_w1_a"] @ factors["hada_w1_b"]
            second = factors["hada_w2_a"] @ factors["hada_w2_b"]
            return first.view(shape), second.view(shape)
        rank = factors["hada_t1"].shape[0]
        first, second = (
            compose_term(
                factors[f"hada_w{side}_a"].T,
                factors[f"hada_w{side}_b"].T,
                factors[f"hada_t{side}"].reshape(rank, rank, *geometry.kernel),
                shape,
            )
            for side in (1, 2)
        )
        return first, second

    def pair(self, factors: Factors, geometry: Geometry) -> tuple[Tensor, Tensor] | None:
        """`khatri_rao` of the factors; a Tucker pair would need rank r² too, through a core."""
        if "hada_t1" in factors:
            return None
        return khatri_rao(*(factors[f"hada_w{side}_{end}"] for side in (1, 2) for end in ("a", "b")))

    def max_rank(self, geometry: Geometry, rank: int) -> int:
        return min(rank * rank, *geometry.matrix_shape)


def khatri_rao(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """The one product of rank r² that a Hadamard product of two of rank r is: `(out, r²)` and `(r², in·K)`.

    (A1 B1) ⊙ (A2 B2) = A B with A[o, (j, k)] = A1[o, j] A2[o, k] and B[(j, k), i] = B1[j, i] B2[k, i].
    """
    return (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1), (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
