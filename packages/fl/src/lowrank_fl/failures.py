"""Simulated clients that drop out or are slow, and what a round then takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_fl.config import FailuresConfig, FederationConfig
from lowrank_fl.seeds import derive_seed


@dataclass(frozen=True)
class Simulated:
    """What befell the clients of one round."""

    missing: dict[int, str]
    """The clients that do not answer, and why."""
    seconds: float
    """That the server waits."""
    waited: float
    """How many of them it would not have waited had nobody been slow."""


def simulate(
    config: FailuresConfig,
    federation: FederationConfig,
    examples: Sequence[int],
    seed: int,
    number: int,
    clients: Sequence[int],
) -> Simulated | None:
    """What befalls these clients in round `number`; None where nothing is simulated.

    Each client's fate follows from seed, round and client. It trains for epochs x its examples / `speed` seconds, a
    slow one `slowdown` times as long. The server knows at once who dropped out, unless there is a deadline: then it
    waits until that for everyone who has not answered. How long messages travel is not in it.

    examples: how many each client of the run trains on.
    """
    if not config.on:
        return None
    missing: dict[int, str] = {}
    taken: list[float] = []
    plain: list[float] = []
    for client in clients:
        generator = np.random.default_rng(derive_seed(seed, "failures", number, client))
        drops, slow = generator.random(2) < (config.dropout, config.stragglers)
        if drops:
            missing[client] = "simulated: it dropped out"
            continue
        usual = federation.epochs * examples[client] / config.speed
        seconds = usual * config.slowdown if slow else usual
        taken.append(seconds)
        plain.append(usual)
        if config.deadline is not None and seconds > config.deadline:
            missing[client] = f"simulated: it takes {seconds:g} s, and the deadline is {config.deadline:g} s"
    dropped_out = len(taken) < len(clients)
    whole, without = (_round(config.deadline, seconds, dropped_out) for seconds in (taken, plain))
    return Simulated(missing, whole, whole - without)


def _round(deadline: float | None, seconds: Sequence[float], dropped_out: bool) -> float:
    """How long the server waits for clients that take so long."""
    slowest = max(seconds, default=0.0)
    if deadline is None:
        return slowest
    return deadline if dropped_out else min(deadline, slowest)
