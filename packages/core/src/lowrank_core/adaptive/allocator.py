"""The allocator: AdaLoRA's loop as hooks of an optimizer, so that no training loop can forget it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_core.adaptive.allocation import allocate
from lowrank_core.adaptive.config import AdaptiveRank
from lowrank_core.adaptive.directions import Directions
from lowrank_core.adaptive.groups import Group
from lowrank_core.adaptive.importance import Importance
from lowrank_core.adaptive.orthogonality import add_orthogonality_gradient
from lowrank_core.adaptive.patterns import note_ranks
from lowrank_core.adaptive.schedule import Schedule
from lowrank_core.errors import LowrankError

STATE_KEY = "rank_allocator"
"""Where the allocator's state lies in the optimizer's."""


class RankAllocator:
    """Prunes the directions that matter least until a budget is met, while an optimizer steps; see `adapt_ranks`.

    Before a step it adds the gradient of the orthogonality penalty (so after any clipping). After the step it takes the
    gradients into the statistics of importance and, where the schedule says so, zeroes the values of all
    directions but the budget's best. At the end of the fall it removes the others from parameters and optimizer.

    It counts the steps that the optimizer takes: one for an accumulated batch, none where a gradient scaler skips one.
    Gradients that are infinite or not numbers leave the statistics as they are.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], optimizer: Optimizer, total_steps: int, config: AdaptiveRank
    ) -> None:
        self.model, self.optimizer, self.config, self.total_steps = model, optimizer, config, total_steps
        self.step = 0
        self._directions = Directions(groups, optimizer)
        self.schedule = self._plan()
        self._importance: Importance | None = self._fresh_importance()
        self._unscaled: dict[str, Tensor | None] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
            *self._directions.follow_loaded_ranks(),
        ]

    @property
    def finished(self) -> bool:
        """Whether ranks have come to their target and stay as they are."""
        return self.step >= self.schedule.end

    def ranks(self) -> dict[str, int]:
        """The directions that each layer keeps now."""
        return {name: sum(kept) for name, kept in self.rank_pattern().items()}

    def rank_pattern(self) -> dict[str, list[bool]]:
        """For each layer, which of the directions it started with it keeps; for a LoHa, of its first term."""
        return {group.name: group.sides[0].kept() for group in self._directions.groups}

    def shrink(self) -> int:
        """Remove what the last allocation switched off; returns how many numbers the parameters lost.

        Before the end of the fall, what is removed cannot revive. Under DistributedDataParallel, call it on every
        process alike and wrap the model anew.

        Raises:
            LowrankError: the optimizer keeps a state that cannot be cut; nothing is changed.
        """
        lost = self._directions.remove(self._importance)
        note_ranks(self.model, self._directions.groups)
        return lost

    def detach(self) -> None:
        """Take the hooks off; ranks stay as they are."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, so that `torch.load(weights_only=True)` reads it.

        It is part of the optimizer's `state_dict` and need not be saved by itself.
        """
        importance = None if self._importance is None else self._importance.state_dict()
        counted = {"step": self.step, "total_steps": self.total_steps, "importance": importance}
        return {**counted, **self._directions.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was saved; directions that were removed by then are removed here too.

        Raises:
            LowrankError: the state belongs to other layers or another length of run, or the model holds
                directions that the state does not know.
        """
        if state["total_steps"] != self.total_steps:
            raise LowrankError(
                f"this rank allocation was saved in a run of {state['total_steps']} steps, but this run has "
                f"{self.total_steps}; resume with the same number"
            )
        self._directions.load_state_dict(state)
        self.step = state["step"]
        self.schedule = self._plan()
        self._importance = None
        if state["importance"] is not None:
            self._importance = self._fresh_importance()
            self._importance.load_state_dict(state["importance"])
        if self.finished or not all(all(side.present) for _, side in self._directions.sides):
            note_ranks(self.model, self._directions.groups)

    def _plan(self) -> Schedule:
        directions = self._directions
        return Schedule.of(self.config, self.total_steps, directions.initial, len(directions.groups))

    def _fresh_importance(self) -> Importance:
        return Importance(self._directions.parameters, self.config.beta1, self.config.beta2)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._directions.check_sizes()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._complete_gradients()
            return None

        def complete_closure() -> Any:
            loss = closure()
            self._complete_gradients()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": complete_closure}
        return (*args[:1], complete_closure, *args[2:]), kwargs

    def _complete_gradients(self) -> None:
        directions = self._directions
        directions.forget_empty_gradients()
        # A fused optimizer takes the gradient scaler's numbers itself and divides by them within its step.
        scale: Tensor | None = getattr(self.optimizer, "grad_scale", None)
        if self.config.orthogonality:
            add_orthogonality_gradient(directions.orthonormal, self.config.orthogonality, scale)
        self._unscaled = None
        if scale is not None:
            gradients = directions.gradients.items()
            self._unscaled = {name: None if g is None else g / scale.to(g.device) for name, g in gradients}

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        overflow: Tensor | None = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        directions = self._directions
        self.step += 1
        if self.step == 1 and self.config.shrink is not False:
            directions.check_optimizer()  # better now than at the end of the fall
        if self._importance is not None:
            if not self.finished:  # the last allocation ranks by what the steps before it said, as the authors' does
                self._importance.update(directions.parameters, self._unscaled or directions.gradients)
            if self.schedule.allocates(self.step):
                budget, least = self.schedule.budget(self.step), directions.groups[0].least_rank
                scores = [group.scores(self._importance) for group in directions.groups]
                directions.mark(allocate(scores, budget, least))
                directions.switch_off()
            self._settle()
        else:
            directions.switch_off()  # where nothing was removed, values get gradients still

    def _settle(self) -> None:
        """Remove what is pruned for good, or on the way if asked."""
        if self.finished:
            self._importance = None
        elif self.config.shrink_every is None or self.step % self.config.shrink_every:
            return
        if self.config.shrink or (self.config.shrink is None and not in_process_group()):
            self._directions.remove(self._importance)
        if self.finished or self.config.shrink_every:
            note_ranks(self.model, self._directions.groups)

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict[STATE_KEY] = self.state_dict()

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if STATE_KEY not in state_dict:
            raise LowrankError(
                "this optimizer's state was saved without a rank allocator; to start a new allocation, load it before "
                "adapt_ranks is called"
            )
        self.load_state_dict(state_dict.pop(STATE_KEY))


def in_process_group() -> bool:
    """Whether several processes train one model, as data parallelism does."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
