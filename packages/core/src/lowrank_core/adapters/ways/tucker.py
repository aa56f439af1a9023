"""LoRA's Tucker form as three convolutions: to r channels, the core's kernel, to the outputs."""

from torch import Tensor

from lowrank_core.adapters.forms import Factors
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.convolution import convolve, pointwise


def tucker(x: Tensor, factors: Factors, scale: float, geometry: Geometry) -> Tensor:
    """The scaled ΔW on an ungrouped convolution's input, in the input's dtype; padding stays zero through a 1x1."""
    down, mid, up = (factors[name].to(x.dtype) for name in ("lora_A", "lora_mid", "lora_B"))
    return pointwise(convolve(pointwise(x, down), mid, None, geometry), scale * up)
