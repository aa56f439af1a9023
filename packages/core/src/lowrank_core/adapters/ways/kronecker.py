"""(W1 ⊗ W2) x without the product: one side after the other, the cheaper order first."""

from torch import Tensor

from lowrank_core.adapters.forms import Factors, LoKrForm
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.convolution import convolve


def kronecker(x: Tensor, form: LoKrForm, factors: Factors, scale: float, geometry: Geometry) -> Tensor:
    """The scaled ΔW on a linear layer's or an ungrouped convolution's input, in the input's dtype.

    With x as c blocks of d: y[a, b] = Σ_c W1[a, c] Σ_d W2[b, d] x[c, d]. Cost per position, in multiply-adds:
    c·b·(d·K + a), or for kernels of one pixel with the sides swapped a·d·(c + b).
    """
    first, second = (side.to(x.dtype) for side in form.sides(factors, geometry))
    first = scale * first
    a, c = first.shape
    b, d = second.shape[:2]
    if geometry.kind == "conv":
        blocks = convolve(x.reshape(-1, d, *x.shape[2:]), second, None, geometry)
        positions = blocks.shape[2:]
        mixed = first @ blocks.reshape(x.shape[0], c, -1)
        return mixed.view(x.shape[0], a * b, *positions)
    blocks = x.reshape(*x.shape[:-1], c, d)
    if c * b * (d + a) <= a * d * (c + b):
        return (first @ (blocks @ second.T)).flatten(-2)
    return ((first @ blocks) @ second.T).flatten(-2)
