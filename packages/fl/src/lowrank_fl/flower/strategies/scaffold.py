"""SCAFFOLD's server: it averages models, and keeps the mean of the clients' control variates."""

from collections.abc import Iterable, Sequence
from typing import Any

import flwr.app
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg


class Scaffold(FedAvg):
    """SCAFFOLD, option II (Karimireddy et al., 2020, https://arxiv.org/abs/1910.06378), as a Flower strategy.

    Each message carries the server's control variate c as the array record `control`; each reply carries the change of
    the client's own one under that name. The models are averaged by examples, as FedAvg does; with S of N clients
    in a round, c changes by the sum of their changes / N.

    parameters: the names of the arrays that clients train; others (statistics of norms) have no control variate.
    server_lr: how far the model moves towards the clients' mean.
    """

    def __init__(self, *, parameters: Sequence[str], clients: int, server_lr: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.parameters, self.clients, self.server_lr = list(parameters), clients, server_lr
        self.control: dict[str, np.ndarray] = {}
        self._sent: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._sent = arrays
        if not self.control:
            self.control = {name: np.zeros_like(arrays[name].numpy()) for name in self.parameters}
        control = ArrayRecord({name: flwr.app.Array(value) for name, value in self.control.items()})
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.content = RecordDict({**message.content, "control": control})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            if reply.has_content():
                changes = reply.content.array_records["control"]
                for name, change in changes.items():
                    self.control[name] = self.control[name] + change.numpy() / self.clients
                del reply.content["control"]
        aggregated, metrics = super().aggregate_train(server_round, replies)
        if aggregated is not None and self.server_lr != 1.0:
            assert self._sent is not None
            for name in self.parameters:
                before = self._sent[name].numpy()
                aggregated[name] = flwr.app.Array(before + self.server_lr * (aggregated[name].numpy() - before))
        return aggregated, metrics
