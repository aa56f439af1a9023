"""What every adapter's algorithm answers about a layer, as functions of its factors.

Factors carry PEFT's names and shapes, which are also kohya's and LyCORIS's; with out, in (of one group) and K, the
kernel's pixels, a weight is the matrix (out, in·K). A form holds no tensors, so that the same one serves our own
layers, PEFT's, and files.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor

from lowrank_core.adapters.geometry import Geometry, Shape

Factors = Mapping[str, Tensor]
Init = Literal["peft", "lycoris", "random"]
"""How factors start: PEFT's way, LyCORIS's, or PEFT's without the zeros (its `init_weights=False`)."""


class Form(Protocol):
    """How ΔW is written as factors, unscaled: the adapter's scale multiplies it outside."""

    @property
    def method(self) -> str:
        """`lora`, `loha`, `lokr` or `adalora`."""
        ...

    def shapes(self, geometry: Geometry, rank: int) -> dict[str, Shape]:
        """The factors of a layer, in the order of their names in PEFT."""
        ...

    def init(self, factors: Factors, init: Init) -> None:
        """Fill the factors in place, so that ΔW = 0 (except `random`)."""
        ...

    def compose(self, factors: Factors, geometry: Geometry) -> Tensor:
        """ΔW, `geometry.weight_shape`, differentiable."""
        ...

    def pair(self, factors: Factors, geometry: Geometry) -> tuple[Tensor, Tensor] | None:
        """ΔW as one product up · down, exactly: `(out, R)` and `(R, in·K)`; None where the form has none of use."""
        ...

    def max_rank(self, geometry: Geometry, rank: int) -> int:
        """The largest rank that ΔW can reach."""
        ...
