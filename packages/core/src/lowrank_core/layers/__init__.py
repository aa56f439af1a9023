"""Layers whose weights are compositions of factors, for training from scratch."""

from lowrank_core.layers.conv import FactorizedConv2d
from lowrank_core.layers.linear import FactorizedLinear
from lowrank_core.layers.lstm import FactorizedLSTM, WeightNormLSTM
from lowrank_core.layers.weight import FactorizedWeight

__all__ = ["FactorizedConv2d", "FactorizedLSTM", "FactorizedLinear", "FactorizedWeight", "WeightNormLSTM"]
