"""Flower's adaptive strategies, for models that also send what no gradient trains: a batch norm's statistics."""

from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords


class _MeanStatistics(flower.FedAvg):
    """The rule of the class beside it for the parameters, and the clients' mean, by examples, for every other array.

    A step with momentum overshoots, which a parameter can take and a variance cannot: it may become negative.

    parameters: the names of the arrays that clients train.
    """

    def __init__(self, *, parameters: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.parameters = frozenset(parameters)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        aggregated, metrics = super().aggregate_train(server_round, replies)
        others = [name for name in aggregated or () if name not in self.parameters]
        if aggregated is None or not others:
            return aggregated, metrics
        contents = [reply.content for reply in replies if reply.has_content()]
        mean = aggregate_arrayrecords([_only(others, content) for content in contents], self.weighted_by_key)
        for name in others:
            aggregated[name] = mean[name]
        return aggregated, metrics


def _only(names: Sequence[str], content: RecordDict) -> RecordDict:
    arrays = content.array_records["arrays"]
    return RecordDict({**content.metric_records, "arrays": ArrayRecord({name: arrays[name] for name in names})})


class FedAdagrad(_MeanStatistics, flower.FedAdagrad):
    """Reddi et al., 2021, https://arxiv.org/abs/2003.00295, Algorithm 2."""


class FedAdam(_MeanStatistics, flower.FedAdam):
    """Reddi et al., 2021, https://arxiv.org/abs/2003.00295, Algorithm 2."""


class FedAvgM(_MeanStatistics, flower.FedAvgM):
    """Hsu et al., 2019, https://arxiv.org/abs/1909.06335."""


class FedYogi(_MeanStatistics, flower.FedYogi):
    """Reddi et al., 2021, https://arxiv.org/abs/2003.00295, Algorithm 2."""
