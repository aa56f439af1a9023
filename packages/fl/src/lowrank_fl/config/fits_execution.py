"""Which ways of training clients go with which other keys."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank_fl.config.run import RunConfig


def execution_fault(config: "RunConfig", way: str) -> str | None:
    """Why `engine.execution` cannot be that for this run; None where it can."""
    if way == "graphs" and not config.device.startswith("cuda"):
        return (
            f"engine.execution graphs replays CUDA graphs, and device is {config.device}; set device=cuda, or "
            "engine.execution=sequential"
        )
    if way == "graphs" and config.adapter.method == "adalora":
        return (
            "engine.execution graphs replays steps over parameters that stay where they are, and adapter.method "
            "adalora makes them smaller; set engine.execution=sequential"
        )
    if way == "compiled" and config.adapter.method == "adalora":
        return (
            "engine.execution compiled compiles a step for layers of fixed sizes, and adapter.method adalora makes "
            "them smaller; set engine.execution=sequential"
        )
    if way == "compiled" and config.model.jacobian_lambda > 0 and config.model.method in ("fedpara", "pfedpara"):
        return (
            f"engine.execution compiled leaves no composed weight to correct, and model.jacobian_lambda is "
            f"{config.model.jacobian_lambda:g}; set it to 0, or engine.execution=sequential"
        )
    if way != "batched":
        return None
    reasons = {
        f"model.name {config.model.name} has layers that are not linear": config.model.name != "mlp",
        f"strategy.name {config.strategy.name} corrects each client's steps by numbers of its own": (
            config.strategy.name in ("scaffold", "feddyn")
        ),
        f"personalization.kind {config.personalized} has each client start from numbers of its own": (
            config.personalized not in ("none", "finetune")
        ),
        f"model.jacobian_lambda is {config.model.jacobian_lambda:g}, a correction of one model's composed weights": (
            config.model.jacobian_lambda > 0 and config.model.method in ("fedpara", "pfedpara")
        ),
        f"update.kind {config.update.kind} has each client hold weights of its own": config.update.kind != "none",
        "adapter.method adalora gives layers other ranks in the course of a run": config.adapter.method == "adalora",
    }
    for reason, holds in reasons.items():
        if holds:
            return (
                "engine.execution batched takes a network of linear layers that all clients of a round start from and "
                f"train alike, and {reason}; set engine.execution=sequential"
            )
    return None
