"""What an adapter must know of the layer it adapts."""

import math
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """A linear layer, a convolution or an embedding, without its numbers. Hashable and cheap to compare.

    For an embedding `out_features` is the width of a row and `in_features` the number of rows.
    """

    kind: Literal["linear", "conv", "embedding"]
    out_features: int
    in_features: int
    """Of all groups together."""
    kernel: Shape = ()
    stride: Shape = ()
    padding: Shape | str = ()
    dilation: Shape = ()
    groups: int = 1
    transposed: bool = False
    """The layer stores its weight as `(in, out)`: embeddings, and the Conv1D of transformers' GPT-2."""

    @property
    def weight_shape(self) -> Shape:
        """`(out, in / groups, *kernel)`, whichever way the layer stores it."""
        return (self.out_features, self.in_features // self.groups, *self.kernel)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(out, in / groups x kernel)`: the weight as the matrix whose rank is meant."""
        return self.out_features, self.in_features // self.groups * math.prod(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether the kernel is one pixel (or there is none), so that Tucker and flat factors are the same."""
        return math.prod(self.kernel) == 1

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight of `weight_shape` the way the layer stores it."""
        return weight.T if self.transposed else weight

    @staticmethod
    def of(module: nn.Module) -> "Geometry | None":
        """The geometry of a layer that can be adapted; None for any other module.

        Linear, Conv1d, Conv2d, Conv3d (zero padding), Embedding, and transformers' Conv1D, recognised by its name
        because transformers is not needed for it.
        """
        if isinstance(module, nn.Linear):
            return Geometry("linear", module.out_features, module.in_features)
        if isinstance(module, nn.Embedding):
            return Geometry("embedding", module.embedding_dim, module.num_embeddings, transposed=True)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode == "zeros":
            padding = module.padding
            return Geometry(
                "conv",
                module.out_channels,
                module.in_channels,
                tuple(module.kernel_size),
                tuple(module.stride),
                padding if isinstance(padding, str) else tuple(padding),
                tuple(module.dilation),
                module.groups,
            )
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            inputs, outputs = cast(Tensor, module.weight).shape
            return Geometry("linear", outputs, inputs, transposed=True)
        return None
