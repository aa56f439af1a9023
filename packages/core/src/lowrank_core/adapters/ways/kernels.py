"""Whether the Triton kernels are used: on CUDA, and only where somebody asked for them.

Off by default, because no measurement has shown yet where they are the faster ones.
"""

import torch
from torch import Tensor

from lowrank_core.adapters.forms import Factors, Form, LoHaForm
from lowrank_core.adapters.geometry import Geometry

_LARGEST_RANK = 128  # far beyond where composing at every step pays
_asked = False


def use_kernels(asked: bool = True) -> None:
    """From now on, in this process, compose LoHa's ΔW by the kernel where the dense way composes it on CUDA."""
    global _asked
    _asked = asked


def compose(form: Form, factors: Factors, scale: float, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """The scaled ΔW in `dtype`, by the kernel where one applies. Not differentiable through the kernel."""
    flat = isinstance(form, LoHaForm) and len(factors) == 4
    if _asked and flat and not torch.compiler.is_compiling():
        a1, b1, a2, b2 = (factor.contiguous() for factor in factors.values())
        if a1.is_cuda and a1.dtype != torch.float64 and a1.shape[1] <= _LARGEST_RANK:
            from lowrank_core.adapters.ways.hadamard_kernel import compose_hadamard

            return compose_hadamard(a1, b1, a2, b2, scale, dtype).view(geometry.weight_shape)
    return (scale * form.compose(factors, geometry)).to(dtype)
