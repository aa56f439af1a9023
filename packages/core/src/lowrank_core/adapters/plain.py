"""Whether a layer may be computed from its weight and bias alone, without calling it."""

# Hooks are looked up where torch keeps them.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from torch import nn

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_plain(base: nn.Module) -> bool:
    """Whether calling the layer does what its weight and bias say and nothing besides."""
    hooks = bool(base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
    known = type(base) in _PLAIN or (
        type(base).__name__ == "Conv1D" and type(base).__module__ == "transformers.pytorch_utils"
    )
    # Libraries that offload weights give a layer a `forward` of its own.
    return known and not hooks and "forward" not in base.__dict__
