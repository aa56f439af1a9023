"""How the change of one weight is written as factors: their shapes, and what they compose to. Torch alone.

Reference: Li et al., 2025, https://arxiv.org/abs/2505.23176, and where it leaves something open, the authors' code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]


class Product(Protocol):
    """A weight's change as a product that is linear in either of its two sides."""

    @property
    def rank(self) -> int:
        """Columns of a low-rank product's sides; blocks of a Kronecker one."""
        ...

    @property
    def largest_rank(self) -> int:
        """That the product can reach, as a matrix."""
        ...

    @property
    def sides(self) -> dict[str, tuple[int, ...]]:
        """The shapes of `u` and `v`."""
        ...

    def compose(self, u: Tensor, v: Tensor) -> Tensor:
        """The change, in the weight's shape."""
        ...


@dataclass(frozen=True)
class LowRankProduct:
    """`u vᵀ`, its rank the smallest with which u and v hold the ratio of the weight's numbers.

    A kernel `(out, in, height, width)` is read in its order as the matrix `(out·height, in·width)`, which is nearer to
    a square than `(out, in·height·width)`.
    """

    shape: tuple[int, ...]
    ratio: float

    @property
    def matrix(self) -> tuple[int, int]:
        rows, columns, *kernel = self.shape
        height, width = kernel or (1, 1)
        return rows * height, columns * width

    @property
    def rank(self) -> int:
        return max(1, math.ceil(self.ratio * math.prod(self.shape) / sum(self.matrix)))

    @property
    def largest_rank(self) -> int:
        return min(self.rank, *self.matrix)

    @property
    def sides(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.matrix
        return {"u": (rows, self.rank), "v": (columns, self.rank)}

    def compose(self, u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T).reshape(self.shape)


@dataclass(frozen=True)
class KroneckerProduct:
    """Blocks `u_b ⊗ v_b` of z x z matrices, one after the other over the weight's numbers in their order.

    Of N numbers there are k = ⌈ratio² N / 4⌉ blocks of z⁴, z the smallest that covers them all; what the last block has
    beyond them is cut off. The 2kz² numbers of u and v are then about ratio · N, and every block can have full rank z².
    """

    shape: tuple[int, ...]
    ratio: float

    @property
    def rank(self) -> int:
        return math.ceil(self.ratio**2 * math.prod(self.shape) / 4)

    @property
    def largest_rank(self) -> int:
        return min(self.shape[0], math.prod(self.shape[1:]))

    @property
    def side(self) -> int:
        """Z."""
        side = 1
        while self.rank * side**4 < math.prod(self.shape):
            side += 1
        return side

    @property
    def sides(self) -> dict[str, tuple[int, ...]]:
        size = (self.rank, self.side, self.side)
        return {"u": size, "v": size}

    def compose(self, u: Tensor, v: Tensor) -> Tensor:
        blocks = u[:, :, None, :, None] * v[:, None, :, None, :]
        return blocks.flatten()[: math.prod(self.shape)].view(self.shape)


PRODUCTS: dict[str, type[LowRankProduct] | type[KroneckerProduct]] = {
    "low-rank": LowRankProduct,
    "kronecker": KroneckerProduct,
}


@dataclass(frozen=True)
class UpdateForm:
    """The change of one weight in the factors u and v, which are trained.

    aware: `product(u, fixed_v) + product(fixed_u, v)`, where the fixed sides are random and everybody draws them from
        the seed, so that the change is linear in what is trained, and the mean of factors composes to the mean of
        changes. Otherwise `product(u, v)`.
    scale: what is random is uniform between -scale and scale. Nothing else is: under `aware` u and v start at zero,
        otherwise v alone, so that the change starts at zero either way.
    """

    product: Product
    aware: bool
    scale: float

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what is trained."""
        return self.product.sides

    @property
    def fixed(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what everybody draws for themselves."""
        return {f"fixed_{side}": shape for side, shape in self.product.sides.items()} if self.aware else {}

    @property
    def size(self) -> int:
        """Numbers that are trained, and travel."""
        return sum(math.prod(shape) for shape in self.trained.values())

    def draw(self, seed: int) -> dict[str, Tensor]:
        """All factors as a period of theirs begins, float32."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {name: torch.zeros(shape) for name, shape in (self.trained | self.fixed).items()}
        for name in self.fixed or ("u",):
            drawn[name].uniform_(-self.scale, self.scale, generator=generator)
        return drawn

    def compose(self, factors: Factors) -> Tensor:
        """The change, in the weight's shape and the factors' dtype."""
        u, v = factors["u"], factors["v"]
        if not self.aware:
            return self.product.compose(u, v)
        return self.product.compose(u, factors["fixed_v"]) + self.product.compose(factors["fixed_u"], v)
