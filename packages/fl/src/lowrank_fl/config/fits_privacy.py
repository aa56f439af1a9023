"""What would make ε untrue."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank_fl.config.run import RunConfig


def privacy_holds(config: "RunConfig") -> None:
    """Refuse what would make ε untrue; raises ValueError."""
    privacy, federation, codec = config.privacy, config.federation, config.codec
    if not privacy.on:
        return
    if config.strategy.name not in ("fedavg", "fedprox"):
        raise ValueError(
            "privacy adds the noise that hides one client in a mean, and strategy.name "
            f"{config.strategy.name} sends something else or keeps more; use fedavg or fedprox"
        )
    if config.personalized not in ("none", "finetune", "ditto"):
        raise ValueError(
            f"privacy counts on clients that start each round from what they are sent, and personalization.kind "
            f"{config.personalized} gives them a part that they keep; set it to none, finetune or ditto"
        )
    if config.aggregation.kind != "factors" or config.aggregation.gap:
        asked = "gap" if config.aggregation.kind == "factors" else f"kind {config.aggregation.kind}"
        raise ValueError(
            f"aggregation.{asked} reads the clients' weights before privacy has clipped them and added noise; "
            "set aggregation.kind=factors and aggregation.gap=false"
        )
    if config.adapter.method == "adalora":
        raise ValueError(
            "under adapter.method adalora clients send importances too, which privacy neither clips nor adds noise to; "
            "use lora, loha or lokr"
        )
    if config.update.kind != "none":
        raise ValueError(
            f"privacy clips the change from what a client is sent, and under update.kind {config.update.kind} its "
            "factors begin anew; set update.kind=none"
        )
    if "topk" in (codec.up, codec.down):
        raise ValueError(
            "privacy counts on clients that keep nothing between rounds, and under codec topk they keep what was not "
            "sent; use none, fp16 or int8"
        )
    if privacy.side == "client" and codec.up != "none":
        raise ValueError(
            f"codec.up {codec.up} rounds what privacy.side client has clipped, which can make it longer than the norm; "
            "set codec.up=none or privacy.side=server"
        )
    if federation.tolerated_failures:
        raise ValueError(
            f"federation.tolerated_failures is {federation.tolerated_failures:g}, and whose training fails may tell "
            "what its examples are, which ε does not count; set it to 0 with privacy"
        )
    if config.failures.deadline is not None:
        raise ValueError(
            "failures.deadline leaves out clients by how many examples they have, which ε does not count; set it to "
            "null with privacy"
        )
    if privacy.delta >= 1 / federation.clients:
        raise ValueError(
            f"privacy.delta is {privacy.delta:g}, at which one of {federation.clients} clients could be given away "
            "whole; set it well below 1 / federation.clients"
        )
    most = federation.clients_per_round / 10
    if privacy.clipping == "adaptive" and (privacy.noise_multiplier or 0) >= most:
        raise ValueError(
            f"privacy.noise_multiplier is {privacy.noise_multiplier:g}, and adaptive clipping, which shares it with "
            f"the count of clipped clients, needs less than federation.clients_per_round / 10 = {most:g}; lower it, "
            "or set privacy.clipping=fixed"
        )
