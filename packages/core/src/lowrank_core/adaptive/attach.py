"""One call that makes ranks adapt."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lowrank_core.adapters.config import AdaLoRA
from lowrank_core.adaptive.allocator import RankAllocator, in_process_group
from lowrank_core.adaptive.config import AdaptiveRank
from lowrank_core.adaptive.groups import Group, find_groups
from lowrank_core.errors import LowrankError, UsageError


def adapt_ranks(
    optimizer: Optimizer, model: nn.Module, total_steps: int, config: AdaptiveRank | AdaLoRA | None = None
) -> RankAllocator:
    """Let the ranks of a model's AdaLoRA adapters, `svd` layers or LoHa adapters fall while `optimizer` steps.

        model = inject(model, AdaLoRA(rank=12, target_rank=4, target_modules="all-linear"))
        optimizer = torch.optim.AdamW(trainable, lr=1e-3)
        adapt_ranks(optimizer, model, total_steps=1000)

    The training loop stays as it is, and so does transformers' Trainer: hand it this optimizer, or call this in its
    `create_optimizer`. Adapters may be ours or PEFT's; for PEFT's, do not call `update_and_allocate` as well.

    Args:
        optimizer: the one that trains the adapters; one that accelerate wraps is unwrapped.
        model: the model, bare, compiled or wrapped for data parallelism.
        total_steps: the optimizer steps of the whole run, which `config`'s shares refer to.
        config: by default that of the model's own AdaLoRA adapters.

    Raises:
        UsageError: a schedule that the run has no steps for, or no config where the model has none.
        LowrankError: no rank to adapt, an optimizer that does not train the adapters, or one that has an allocator
            already.
    """
    inner = unwrapped(optimizer)
    groups = find_groups(model)
    if config is None:
        config = _own_config(model, groups)
    config = AdaptiveRank.of(config)
    trained = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    for group in groups:
        for side in group.sides:
            for leaf, factor in side.factors.items():
                if id(factor.parameter) not in trained:
                    raise LowrankError(
                        f"the optimizer does not train {group.name}.{leaf}; adapt ranks with the one that does"
                    )
    for hook in inner._optimizer_step_post_hooks.values():
        if isinstance(getattr(hook, "__self__", None), RankAllocator):
            raise LowrankError("this optimizer has a rank allocator already; detach that one first")
    if config.shrink and in_process_group():
        raise LowrankError(
            "shrink=True cannot be kept while a group of processes trains, because DistributedDataParallel holds "
            "buckets of the first sizes; leave shrink out, and call shrink() on the allocator after training"
        )
    return RankAllocator(model, groups, inner, total_steps, config)


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer whose hooks run, inside those that accelerate and others put around it.

    Raises:
        UsageError: there is none.
    """
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_post_hooks"):
        if "optimizer" not in getattr(inner, "__dict__", {}):
            raise UsageError(f"ranks adapt in the hooks of a torch.optim.Optimizer, got a {type(optimizer).__name__}")
        inner = inner.optimizer
    return inner


def _own_config(model: nn.Module, groups: list[Group]) -> AdaptiveRank | AdaLoRA:
    """What the adapters were made with, ours or PEFT's."""
    ours, theirs = groups[0].name.rpartition(".")[2], groups[0].sides[0].value.leaf
    for module in model.modules():
        record = vars(module).get("lowrank_adapters")
        config = record.configs.get(ours) if record is not None else None
        if isinstance(config, AdaLoRA):
            return config
        peft = (vars(module).get("peft_config") or {}).get(theirs)
        if hasattr(peft, "orth_reg_weight"):
            return _from_peft(peft)
    raise UsageError(
        f"{groups[0].name} does not say how its rank should fall; give adapt_ranks a config, "
        "AdaptiveRank(target_rank=...)"
    )


def _from_peft(peft: Any) -> AdaptiveRank:
    return AdaptiveRank(
        target_rank=peft.target_r,
        warmup=peft.tinit / peft.total_step,
        settle=peft.tfinal / peft.total_step,
        every=peft.deltaT,
        beta1=peft.beta1,
        beta2=peft.beta2,
        # With a task type, PEFT's own forward adds the penalty to the loss; without one it forgets it.
        orthogonality=0.0 if peft.task_type else peft.orth_reg_weight,
    )
