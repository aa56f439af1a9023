"""Flower's own strategies by the names a config gives them."""

from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx, Strategy

from lowrank_fl.config import FederationConfig, StrategyConfig


def make_strategy(config: StrategyConfig, federation: FederationConfig) -> Strategy:
    """The strategy that samples `clients_per_round` clients a round and weighs them by their examples.

    fedavg: McMahan et al., 2017. fedprox: Li et al., 2020. fedadam: Reddi et al., 2021.
    Clients are not asked to evaluate: the server does, on its own test set.
    """
    sampled = federation.clients_per_round
    # Flower rounds clients x fraction down, so the exact number goes in as the least to sample.
    fraction = sampled / federation.clients
    if config.name == "fedprox":
        return FedProx(fraction_train=fraction, fraction_evaluate=0.0, min_train_nodes=sampled, proximal_mu=config.mu)
    if config.name == "fedadam":
        return FedAdam(
            fraction_train=fraction,
            fraction_evaluate=0.0,
            min_train_nodes=sampled,
            eta=config.server_lr,
            eta_l=federation.lr,
            beta_1=config.beta1,
            beta_2=config.beta2,
            tau=config.tau,
        )
    return FedAvg(fraction_train=fraction, fraction_evaluate=0.0, min_train_nodes=sampled)
