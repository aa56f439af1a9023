"""How a client's gradients are corrected for its drift from the others: FedProx, SCAFFOLD, FedDyn.

Every rule adds `offset + proximal · (w - w_received)` to the gradient of each step, and so does Ditto to that of a
client's own model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Drift:
    """One client's correction for one round; no entry in `offsets` is no offset for that parameter."""

    offsets: Named = field(default_factory=dict[str, Tensor])
    proximal: float = 0.0
    received: Named | None = None
    """What the proximal term draws to; the model that training starts from if not given."""


def scaffold_drift(control: Named, own: Named) -> Drift:
    """SCAFFOLD's c - c_i (Karimireddy et al., 2020, https://arxiv.org/abs/1910.06378, Algorithm 1, line 10).

    own: the client's control variate c_i; a parameter without one counts as zero.
    """
    return Drift({name: value - own[name] if name in own else value for name, value in control.items()})


@torch.no_grad()
def scaffold_control(control: Named, own: Named, received: Named, trained: Named, steps: int, lr: float) -> Named:
    """The client's next control variate, option II: c_i - c + (x - y_i) / (K · lr), of plain SGD steps."""
    return {
        name: own.get(name, 0.0) - value + (received[name] - trained[name]) / (steps * lr)
        for name, value in control.items()
    }


def feddyn_drift(own: Named, alpha: float) -> Drift:
    """FedDyn's -∇L_i(θ_i) + α(θ - θ_received) (Acar et al., 2021, https://arxiv.org/abs/2111.04263, Algorithm 1)."""
    return Drift({name: -value for name, value in own.items()}, alpha)


@torch.no_grad()
def feddyn_gradient(own: Named, received: Named, trained: Named, alpha: float) -> Named:
    """The client's next ∇L_i(θ_i): the last one - α(θ_i - θ_received); zero before its first round."""
    return {name: own.get(name, 0.0) - alpha * (trained[name] - received[name]) for name in received}
