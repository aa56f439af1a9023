"""The initialisation of the unfactorized networks."""

from torch import nn


def initialise(model: nn.Module) -> None:
    """He et al.'s normal draw by fan-in for weights, zero for biases: the variance the calibrated factors compose to."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
