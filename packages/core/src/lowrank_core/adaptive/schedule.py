"""The budget of ranks at every step of a run."""

from dataclasses import dataclass

from lowrank_core.adaptive.config import AdaptiveRank
from lowrank_core.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """AdaLoRA's cubic schedule (Zhang et al., 2023, Eq. 12), in optimizer steps counted from 1.

    b(t) = b0                                                  t <= begin
    b(t) = bT + (b0 - bT)·(1 - (t - begin) / (end - begin))³   begin < t < end, rounded down
    b(t) = bT                                                  t >= end
    """

    initial: int
    target: int
    begin: int
    end: int
    every: int

    @staticmethod
    def of(config: AdaptiveRank, total_steps: int, initial: int, layers: int) -> "Schedule":
        """The schedule of a run of `total_steps` over `layers` layers whose ranks add up to `initial`.

        Raises:
            UsageError: `total_steps` is no number of steps; the run leaves no step for the fall or none for an
                allocation within it; or the target is above the start.
        """
        if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 2:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"total_steps must be a whole number of optimizer steps, at least 2, got {total_steps!r}; "
                "give the length of the whole run"
            )
        begin = round(config.warmup * total_steps)
        end = total_steps - round(config.settle * total_steps)
        target = config.target_rank * layers
        if target > initial:
            raise UsageError(
                f"target_rank {config.target_rank} over {layers} layers is a budget of {target}, "
                f"but their ranks start at {initial} altogether; lower target_rank or start higher"
            )
        if end <= begin:
            raise UsageError(
                f"{total_steps} steps leave none between a warmup of {begin} and the {total_steps - end} to settle; "
                "train longer or lower warmup and settle"
            )
        if end < 2:
            raise UsageError(
                f"of {total_steps} steps, {total_steps - end} to settle leave only the first, and importance is known "
                "after it; train longer or lower settle"
            )
        if config.every > end - begin:
            raise UsageError(
                f"every {config.every} steps never comes within the {end - begin} in which ranks fall; lower every"
            )
        return Schedule(initial, target, begin, end, config.every)

    def budget(self, step: int) -> int:
        """The sum of ranks after this step."""
        if step <= self.begin:
            return self.initial
        if step >= self.end:
            return self.target
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return int(self.target + (self.initial - self.target) * left**3)

    def allocates(self, step: int) -> bool:
        """Whether ranks are allocated anew after this step; the last time is at `end`."""
        if self.target == self.initial:
            return False
        return step == self.end or (self.begin < step < self.end and step % self.every == 0)
