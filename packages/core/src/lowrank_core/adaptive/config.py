"""What a user says of adaptive ranks: how far they fall, when, and how importance is smoothed."""

from dataclasses import dataclass

from lowrank_core.adapters.config import AdaLoRA
from lowrank_core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class AdaptiveRank:
    """How the ranks of a model's layers fall from where they start to a mean of `target_rank`.

    The budget, the sum of all ranks, stays at the start for the share `warmup` of the run's optimizer steps, falls by a
    cubic, and stays at target_rank x layers for the share `settle` at the end. AdaLoRA's author advises to give
    about half of the run to the fall, and small data a long `settle`.

    every: steps between two allocations. The least important directions are zeroed then, and may revive.
    beta1, beta2: smooth importance and its uncertainty.
    orthogonality: weighs the penalty on A Aᵀ - I and Bᵀ B - I; its gradient is added before each step.
    shrink: whether directions pruned for good leave the parameters and the optimizer's state. None: wherever no group
        of processes trains, because DistributedDataParallel keeps buckets of the sizes it first saw.
    shrink_every: remove what is zeroed also on the way, each time so many steps have passed. It saves memory early, but
        what is removed cannot revive.

    Raises:
        UsageError: a value out of its range.
    """

    target_rank: int = 8
    warmup: float = 0.1
    settle: float = 0.5
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    shrink: bool | None = None
    shrink_every: int | None = None

    def __post_init__(self) -> None:
        if self.target_rank < 1:
            raise UsageError(f"target_rank must be at least 1, got {self.target_rank}")
        if not (self.warmup >= 0 and self.settle >= 0 and self.warmup + self.settle < 1):
            raise UsageError(
                f"warmup and settle are shares of the run that leave some of it, got {self.warmup} and {self.settle}"
            )
        if self.every < 1:
            raise UsageError(f"every must be at least 1 step, got {self.every}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.orthogonality >= 0:
            raise UsageError(f"orthogonality must not be negative, got {self.orthogonality}")
        if self.shrink_every is not None and (self.shrink_every < 1 or self.shrink is False):
            raise UsageError(
                f"shrink_every must be at least 1 step and goes with shrink, got {self.shrink_every} "
                f"with shrink={self.shrink}"
            )

    @staticmethod
    def of(config: "AdaptiveRank | AdaLoRA") -> "AdaptiveRank":
        """The part of an adapter's configuration that speaks of its rank."""
        if isinstance(config, AdaptiveRank):
            return config
        return AdaptiveRank(
            target_rank=config.target_rank,
            warmup=config.warmup,
            settle=config.settle,
            every=config.every,
            beta1=config.beta1,
            beta2=config.beta2,
            orthogonality=config.orthogonality,
        )
