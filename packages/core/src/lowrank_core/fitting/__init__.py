"""Factors for a weight that is given whole: what extraction of an adapter from two checkpoints needs."""

from lowrank_core.fitting.hadamard import HadamardFit, fit_hadamard

__all__ = ["HadamardFit", "fit_hadamard"]
