"""FedDyn's server: the clients' mean, moved by the sum of all their drifts so far."""

from collections.abc import Iterable, Sequence
from typing import Any

import flwr.app
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg


class FedDyn(FedAvg):
    """Dynamic regularisation (Acar et al., 2021, https://arxiv.org/abs/2111.04263, Algorithm 1), as a Flower strategy.

    h changes by -α/N · Σ(θ_i - θ) over the round's clients, and the next model is their mean - h/α. The mean counts
    every client the same, as there, however many examples it has.

    parameters: the names of the arrays that clients train; others are averaged by examples alone.
    """

    def __init__(self, *, parameters: Sequence[str], clients: int, alpha: float, **options: Any) -> None:
        super().__init__(**options)
        self.parameters, self.clients, self.alpha = list(parameters), clients, alpha
        self.h: dict[str, np.ndarray] = {}
        self._sent: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._sent = arrays
        if not self.h:
            self.h = {name: np.zeros_like(arrays[name].numpy()) for name in self.parameters}
        config["feddyn-alpha"] = self.alpha
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        trained = [reply.content.array_records["arrays"] for reply in replies if reply.has_content()]
        aggregated, metrics = super().aggregate_train(server_round, replies)
        if aggregated is None:
            return aggregated, metrics
        assert self._sent is not None
        for name in self.parameters:
            before = self._sent[name].numpy()
            mean = np.mean([record[name].numpy() for record in trained], axis=0)
            drift = len(trained) / self.clients * (mean - before)
            self.h[name] = self.h[name] - np.asarray(self.alpha, before.dtype) * drift.astype(before.dtype)
            aggregated[name] = flwr.app.Array((mean - self.h[name] / self.alpha).astype(before.dtype))
        return aggregated, metrics
