"""What of the keys about the model goes with which others. Each raises ValueError where it does not."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank_fl.config.run import RunConfig


def adapter_fits(config: "RunConfig") -> None:
    """An adapter goes onto layers that are not factors."""
    adapter, kind = config.adapter.method, config.personalized
    if adapter is None:
        return
    if config.model.method != "original":
        raise ValueError(
            f"adapter.method {adapter} goes onto the layers of the original network, and model.method "
            f"{config.model.method} writes them as factors; set model.method=original, and sweep over no other"
        )
    if kind in ("fedper", "fedrep") and not config.adapter.head:
        raise ValueError(
            f"personalization.kind {kind} keeps the last layer with each client, and with adapter.head false it is "
            "frozen but for an adapter; set adapter.head=true"
        )


def ranks_fit(config: "RunConfig") -> None:
    """AdaLoRA shrinks arrays from round to round."""
    if config.adapter.method != "adalora":
        return
    if config.strategy.name not in ("fedavg", "fedprox"):
        raise ValueError(
            f"strategy.name {config.strategy.name} does not go with adapter.method adalora, under which arrays "
            "shrink from round to round and clients' importances are averaged by examples; use fedavg or fedprox"
        )
    for way in ("up", "down"):
        if getattr(config.codec, way) == "topk":
            raise ValueError(
                f"codec.{way} topk remembers numbers by their places in the model, and under adapter.method "
                "adalora these change as ranks fall; use none, fp16 or int8"
            )
    if config.personalized in ("ditto", "local"):
        raise ValueError(
            f"personalization.kind {config.personalized} gives each client an adapter of its own, whose ranks the "
            "server cannot allocate; use another kind, or an adapter.method other than adalora"
        )


def update_fits(config: "RunConfig") -> None:
    """The change of layers begins anew in every round."""
    kind, aggregation = config.update.kind, config.aggregation
    if kind == "none":
        return
    if config.model.method != "original":
        raise ValueError(
            f"update.kind {kind} is of the original network's layers, and model.method {config.model.method} writes "
            "them as factors; set model.method=original, and sweep over no other"
        )
    if config.adapter.method is not None:
        raise ValueError(
            f"update.kind {kind} changes the layers that adapter.method {config.adapter.method} freezes; set "
            "adapter.method=null or update.kind=none"
        )
    if config.strategy.name not in ("fedavg", "fedprox"):
        raise ValueError(
            f"update.kind {kind} begins its factors anew, and strategy.name {config.strategy.name} does more with "
            "them than a mean; use fedavg or fedprox"
        )
    if config.personalized not in ("none", "finetune"):
        raise ValueError(
            f"update.kind {kind} is of layers that all clients share, and under personalization.kind "
            f"{config.personalized} they do not; set personalization.kind to none or finetune"
        )
    if aggregation.kind != "factors" or aggregation.gap:
        asked = "aggregation.gap" if aggregation.kind == "factors" else f"aggregation.kind {aggregation.kind}"
        raise ValueError(
            f"{asked} is about weights that are factors, and under update.kind {kind} their changes are; set "
            "aggregation.kind=factors and aggregation.gap=false"
        )
    if (config.codec.up, config.codec.down) != ("none", "none"):
        raise ValueError(
            f"codec.up {config.codec.up} and codec.down {config.codec.down} write changes of what was sent, and under "
            f"update.kind {kind} factors begin anew instead; set both to none"
        )
