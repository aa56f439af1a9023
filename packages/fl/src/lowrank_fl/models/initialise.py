"""The initialisation of the unfactorized networks."""

from torch import nn


def initialise(model: nn.Module) -> None:
    """He et al.'s normal draw by fan-in, zero biases: the variance that calibrated factors compose to."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
