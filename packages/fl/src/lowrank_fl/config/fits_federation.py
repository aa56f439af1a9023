"""What of the keys about the federation goes with which others. Each raises ValueError where it does not."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank_fl.config.run import RunConfig

_MEANS_BY_EXAMPLES = ("fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad", "scaffold")


def enough_clients(config: "RunConfig") -> None:
    """A round needs as many clients as it asks."""
    federation = config.federation
    if federation.clients_per_round > federation.clients:
        raise ValueError(
            f"federation.clients_per_round is {federation.clients_per_round} but there are only "
            f"{federation.clients} clients (federation.clients)"
        )


def personalization_fits(config: "RunConfig") -> None:
    """What is a client's own, only the client can test."""
    kind = config.personalization.kind
    if kind == "pfedpara" and config.model.method != "pfedpara":
        raise ValueError(
            "personalization.kind pfedpara keeps the factors of W2 with each client, and model.method "
            f"{config.model.method} has none; set model.method=pfedpara"
        )
    if kind not in (None, "none") and not config.partition.held_out:
        raise ValueError(
            f"personalization.kind {kind} gives each client a model of its own, which only its own examples can "
            "test; set partition.held_out above 0"
        )
    if config.test_epochs and not config.partition.held_out:
        raise ValueError(
            f"personalization.test_epochs is {config.test_epochs}, and the server, which tests here, does not train; "
            "set partition.held_out above 0, or personalization.test_epochs=0"
        )
    if kind == "local" and config.strategy.name == "krum":
        raise ValueError(
            "strategy.name krum chooses among the models that clients send, and under personalization.kind local "
            "they send none; use strategy.name=fedavg"
        )


def aggregation_fits(config: "RunConfig") -> None:
    """The gap is of a mean of weights that are factors alone."""
    aggregation, model, strategy = config.aggregation, config.model, config.strategy.name
    kind = aggregation.kind
    if kind == "factors" and not aggregation.gap:
        return
    asked = "aggregation.gap" if kind == "factors" else f"aggregation.kind {kind}"
    if config.adapter.method is not None:
        raise ValueError(
            f"{asked} is about weights that are factors alone, and adapter.method {config.adapter.method} adds its "
            "factors to frozen weights; set aggregation.kind=factors and aggregation.gap=false"
        )
    if config.personalized not in ("none", "finetune"):
        raise ValueError(
            f"{asked} is about weights that all clients share whole, and under personalization.kind "
            f"{config.personalized} a part of them is each client's own; set personalization.kind to none or finetune"
        )
    if kind == "factors":
        if strategy not in _MEANS_BY_EXAMPLES:
            raise ValueError(
                f"aggregation.gap is that of a mean by examples, and strategy.name {strategy} takes none; use one "
                f"of {', '.join(_MEANS_BY_EXAMPLES)}"
            )
        return
    if strategy not in ("fedavg", "fedprox"):
        raise ValueError(
            f"{asked} makes the clients' mean exact, and strategy.name {strategy} takes a step of its own from "
            "it; use fedavg or fedprox"
        )
    if model.method == "original":
        raise ValueError(
            f"{asked} is about factors, and model.method original has none; set model.method to a factorized one, "
            "and sweep over no other"
        )
    if model.tanh and model.method == "fedpara":
        raise ValueError(
            f"{asked} needs weights that are linear in each factor, and those of model.tanh are in none; "
            "set model.tanh=false"
        )
    if kind == "one-factor" and model.jacobian_lambda and model.method in ("fedpara", "pfedpara"):
        raise ValueError(
            f"model.jacobian_lambda is {model.jacobian_lambda:g}, and the correction is of a step that all factors "
            "take together, which they do not under aggregation.kind one-factor; set model.jacobian_lambda=0"
        )


def plain_steps(config: "RunConfig") -> None:
    """SCAFFOLD reads gradients off the steps."""
    momentum = config.federation.momentum
    if config.strategy.name == "scaffold" and momentum:
        raise ValueError(
            f"federation.momentum is {momentum:g}, and strategy.name scaffold takes its control variates from "
            "plain SGD steps; set federation.momentum=0"
        )
