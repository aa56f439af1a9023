"""Flower's wrappers for differential privacy, with equal weights, and with noise that follows from the run's seed."""

from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.supercore.differential_privacy import KEY_NORM_BIT

from lowrank_core import LowrankError
from lowrank_fl.config import PrivacyConfig
from lowrank_fl.seeds import derive_seed


class _Seeded(Strategy):
    """Each round's mean counts every client the same, and its noise is drawn from (seed, round).

    Flower draws noise for `num_sampled_clients`, with which it divides the sum's. Where fewer replies are averaged one
    of them moves the mean further, so here it is the number of replies.
    """

    seed: int
    num_sampled_clients: int

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            reply.content.metric_records["metrics"]["num-examples"] = 1
        self.num_sampled_clients = len(replies)
        try:
            with _numpy_seeded(derive_seed(self.seed, "noise", server_round)):
                return super().aggregate_train(server_round, replies)
        except ZeroDivisionError:
            raise LowrankError(
                f"a client's change in round {server_round} is zero, and Flower's clipping divides by its length; "
                "raise federation.lr"
            ) from None


class _Adaptive(_Seeded):
    """Clipping whose norm follows a quantile of the changes' norms (Andrew et al., 2021,
    https://arxiv.org/abs/1905.03871): C ← C·exp(-η(b - γ)), b the share of changes no longer than C.

    Flower 1.41 puts the share that is longer there, and so halves a norm that is too small already.
    """

    def _geometric_update(self, clipped_fraction: float) -> None:
        held: Any = super()
        held._geometric_update(1 - clipped_fraction)


class ServerFixed(_Seeded, flower.DifferentialPrivacyServerSideFixedClipping): ...


class ClientFixed(_Seeded, flower.DifferentialPrivacyClientSideFixedClipping): ...


class ServerAdaptive(_Adaptive, flower.DifferentialPrivacyServerSideAdaptiveClipping): ...


class ClientAdaptive(_Adaptive, flower.DifferentialPrivacyClientSideAdaptiveClipping): ...


def make_private(
    strategy: Strategy, privacy: PrivacyConfig, clients_per_round: int, seed: int, untrained: Collection[str] = ()
) -> Strategy:
    """The strategy in the wrapper that `privacy` asks for; itself where it asks for none.

    untrained: the names of arrays that travel and that no gradient trains.

    Raises:
        LowrankError: there are such arrays, which noise could make no variances any more.
    """
    if not privacy.on:
        return strategy
    if untrained:
        raise LowrankError(
            f"the model has statistics of a norm ({sorted(untrained)[0]}), a variance among them that privacy's noise "
            "could make negative; use a model without batch norm"
        )
    multiplier = privacy.noise_multiplier or 0.0
    if privacy.clipping == "fixed":
        kind = ServerFixed if privacy.side == "server" else ClientFixed
        private = kind(strategy, multiplier, privacy.clipping_norm, clients_per_round)
    else:
        kind = ServerAdaptive if privacy.side == "server" else ClientAdaptive
        start, rate = privacy.clipping_norm, privacy.norm_lr
        private = kind(strategy, multiplier, clients_per_round, start, privacy.quantile, rate)
    private.seed = seed
    return private


def clipping_mods(privacy: PrivacyConfig) -> list[Mod]:
    """What the ClientApp's training is wrapped in: Flower's mod, where clients clip."""
    if not privacy.on or privacy.side == "server":
        return []
    return [fixedclipping_mod if privacy.clipping == "fixed" else adaptiveclipping_mod]


def reported(privacy: PrivacyConfig) -> tuple[str, ...]:
    """The metrics of a trained reply besides `num-examples`."""
    counted = privacy.on and privacy.side == "client" and privacy.clipping == "adaptive"
    return ("loss", KEY_NORM_BIT) if counted else ("loss",)


@contextmanager
def _numpy_seeded(seed: int) -> Generator[None]:
    """NumPy's global generator, which Flower's wrappers draw from, seeded inside the block and as before after it."""
    before = np.random.get_state()
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    try:
        yield
    finally:
        np.random.set_state(before)
