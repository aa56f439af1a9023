"""LoRA's Tucker form as three convolutions: to r channels, the core's kernel, to the outputs."""

from torch import Tensor

from lowrank_core.adapters.forms import Factors
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.convolution import convolve


def tucker(x: Tensor, factors: Factors, scale: float, geometry: Geometry) -> Tensor:
    """The scaled ΔW on an ungrouped convolution's input, in the input's dtype; padding stays zero through a 1x1."""
    dimensions = len(geometry.kernel)
    ones, zeros = (1,) * dimensions, (0,) * dimensions
    down, mid, up = (factors[name].to(x.dtype) for name in ("lora_A", "lora_mid", "lora_B"))
    rank = mid.shape[0]
    narrow = Geometry("conv", rank, geometry.in_features, ones, ones, zeros, ones)
    hidden = convolve(convolve(x, down, None, narrow), mid, None, geometry)
    return convolve(hidden, scale * up, None, narrow)
