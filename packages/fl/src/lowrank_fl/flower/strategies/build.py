"""The strategy that a configuration names."""

from collections.abc import Callable, Sequence
from typing import Any

from flwr.serverapp.strategy import FedAvg, FedMedian, FedProx, FedTrimmedAvg, Krum, Strategy

from lowrank_fl.config import FederationConfig, StrategyConfig
from lowrank_fl.flower.strategies.feddyn import FedDyn
from lowrank_fl.flower.strategies.scaffold import Scaffold
from lowrank_fl.flower.strategies.statistics import FedAdagrad, FedAdam, FedAvgM, FedYogi


def make_strategy(config: StrategyConfig, federation: FederationConfig, parameters: Sequence[str]) -> Strategy:
    """The strategy of that name: `clients_per_round` sampled clients train, and all test where they are asked to.

    fedavg: McMahan et al., 2017. fedavgm: Hsu et al., 2019. fedprox: Li et al., 2020. fedadam, fedyogi, fedadagrad:
    Reddi et al., 2021. scaffold: Karimireddy et al., 2020. feddyn: Acar et al., 2021. fedmedian, fedtrimmedavg: Yin et
    al., 2018. krum: Blanchard et al., 2017.

    parameters: the names of the arrays that clients train; no rule but an average touches the others.
    """
    sampled, clients = federation.clients_per_round, federation.clients
    # Flower rounds clients x fraction down, so the exact number goes in as the least to sample.
    sampling = {
        "fraction_train": sampled / clients,
        "min_evaluate_nodes": clients,
        "min_train_nodes": sampled,
        # Flower waits for a second client otherwise, and in a federation of one none will come.
        "min_available_nodes": sampled,
    }
    trained = {"parameters": parameters}
    ours = {**trained, "clients": clients}
    adaptive = {**trained, "eta": config.server_lr or 0.01, "eta_l": federation.lr, "tau": config.tau}
    moments = {"beta_1": config.beta1, "beta_2": config.beta2}
    rules: dict[str, tuple[Callable[..., Strategy], dict[str, Any]]] = {
        "fedavg": (FedAvg, {}),
        "fedavgm": (
            FedAvgM,
            {
                **trained,
                "server_learning_rate": config.server_lr or 1.0,
                "server_momentum": config.server_momentum,
            },
        ),
        "fedprox": (FedProx, {"proximal_mu": config.mu}),
        "fedadam": (FedAdam, adaptive | moments),
        "fedyogi": (FedYogi, adaptive | moments),
        "fedadagrad": (FedAdagrad, adaptive),
        "scaffold": (Scaffold, {**ours, "server_lr": config.server_lr or 1.0}),
        "feddyn": (FedDyn, {**ours, "alpha": config.alpha}),
        "fedmedian": (FedMedian, {}),
        "fedtrimmedavg": (FedTrimmedAvg, {"beta": config.trim}),
        "krum": (Krum, {"num_malicious_nodes": config.malicious}),
    }
    strategy, own = rules[config.name]
    return strategy(**sampling, **own)
