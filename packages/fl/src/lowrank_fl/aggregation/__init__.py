"""What becomes of composed weights when their factors are averaged: the gap, and two ways to close it. Torch alone."""

from lowrank_fl.aggregation.combine import FactorAggregation, Found
from lowrank_fl.aggregation.one_factor import trained_in_turn

__all__ = ["FactorAggregation", "Found", "trained_in_turn"]
