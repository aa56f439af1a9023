"""Ranks that adapt while a model trains: AdaLoRA's allocator, for adapters and factorized layers."""

from lowrank_core.adaptive.allocator import RankAllocator
from lowrank_core.adaptive.attach import adapt_ranks
from lowrank_core.adaptive.config import AdaptiveRank
from lowrank_core.adaptive.directions import fit_ranks
from lowrank_core.adaptive.patterns import rank_pattern

__all__ = ["AdaptiveRank", "RankAllocator", "adapt_ranks", "fit_ranks", "rank_pattern"]
