"""`ray`: Flower's own simulation, clients as Ray actors of one CPU each, with the hand-written loop's training.

run_simulation is deprecated in favour of `flwr run`, which drives the same backend through a background server.
"""

import functools

import torch
from cells import Clock, Federation, competitor_arguments, read, report, train_client
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

resident = functools.cache(Federation.network)
"""One network for each actor, not one for each message."""


class TimedFedAvg(FedAvg):
    """FedAvg that marks the end of every round."""

    clock: Clock

    def aggregate_train(self, *args, **kwargs):  # noqa: ANN002, ANN003, ANN201
        result = super().aggregate_train(*args, **kwargs)
        self.clock.mark()
        return result
