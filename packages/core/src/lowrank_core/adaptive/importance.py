"""How much the loss hangs on each number: smoothed sensitivity and its uncertainty."""

# The fused operations over lists that torch.optim is written in, which torch does not declare as its own.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from collections.abc import Mapping

import torch
from torch import Tensor


class Importance:
    """The statistics of AdaLoRA (Zhang et al., 2023, Eq. 8 to 11) for parameters by name, at least in float32.

        I = |p · ∇p|     Ī ← β1·Ī + (1 - β1)·I     Ū ← β2·Ū + (1 - β2)·|I - Ī|     s = Ī · Ū

    with the new Ī in the third. Two numbers are kept for each of a parameter's.
    """

    def __init__(self, parameters: Mapping[str, Tensor], beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity = {name: _zeros(p) for name, p in parameters.items()}
        self.uncertainty = {name: _zeros(p) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> bool:
        """Take in one optimizer step; False, and nothing changed, where a gradient is infinite or not a number.

        Parameters without a gradient, such as those of an expert that no token reached, keep their statistics.
        """
        names = [name for name, gradient in gradients.items() if gradient is not None and gradient.numel()]
        if not names:
            return True
        values = [parameters[name].to(self.sensitivity[name].dtype) for name in names]
        slopes = [_given(gradients[name]).to(self.sensitivity[name].dtype) for name in names]
        now = torch._foreach_abs(torch._foreach_mul(values, slopes))
        peaks = torch.stack([peak.to(now[0].device) for peak in torch._foreach_norm(now, float("inf"))])
        if not bool(peaks.isfinite().all()):
            return False
        sensitivity = [self.sensitivity[name] for name in names]
        uncertainty = [self.uncertainty[name] for name in names]
        torch._foreach_lerp_(sensitivity, now, 1 - self.beta1)
        torch._foreach_lerp_(uncertainty, torch._foreach_abs(torch._foreach_sub(now, sensitivity)), 1 - self.beta2)
        return True

    def score(self, name: str, dim: int) -> Tensor:
        """The mean of s over everything that belongs to one direction: a number for each index along `dim`."""
        score = self.sensitivity[name] * self.uncertainty[name]
        return (
            score.movedim(dim, 0).reshape(score.shape[dim], -1).mean(1)
            if score.numel()
            else score.new_zeros(score.shape[dim])
        )

    def keep(self, name: str, dim: int, index: Tensor) -> None:
        """Forget all but the directions `index`."""
        for statistics in (self.sensitivity, self.uncertainty):
            statistics[name] = statistics[name].index_select(dim, index)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"sensitivity": dict(self.sensitivity), "uncertainty": dict(self.uncertainty)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, old in list(self.sensitivity.items()):
            self.sensitivity[name] = state["sensitivity"][name].to(old, copy=True)
            self.uncertainty[name] = state["uncertainty"][name].to(old, copy=True)


def _zeros(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)


def _given(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient
