"""The interface of the engines, and the one that a configuration names."""

import os
from typing import Protocol

import torch
from flwr.serverapp import Grid
from torch import nn

from lowrank_fl.config import RunConfig
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.flower.records import ArrayRecord
from lowrank_fl.training import LocalTraining


class Engine(Protocol):
    """Lives as long as a run or a sweep. Every engine gives the same bits on one machine's CPU."""

    shared: bool
    """Whether array records must lie in shared memory."""

    def set_up(self, config: RunConfig, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> Grid:
        """Make this run's clients the ones that the grid, whose nodes are clients 0, 1, ..., reaches from now on."""
        ...

    def evaluate(self, record: ArrayRecord) -> tuple[float, float]:
        """Accuracy (0 to 1) and mean loss of a model on the server's test set."""
        ...

    def close(self, *, at_once: bool = False) -> None:
        """Let go of models and processes; `at_once` does not wait for clients that are still training."""
        ...


def make_engine(config: RunConfig) -> Engine:
    """The engine that the configuration names."""
    if config.engine.kind == "local":
        from lowrank_fl.flower.engines.local import LocalEngine

        return LocalEngine(worker_count(config))
    if config.engine.kind == "ray":
        from lowrank_fl.flower.engines.ray import RayEngine

        return RayEngine(config, worker_count(config))
    raise ValueError("superlink's engine runs in the ServerApp, flower/app/server.py")


def worker_count(config: RunConfig) -> int:
    """Worker processes for `auto`: one for each core a client's threads leave, and never more than clients.

    On a GPU one process keeps the device busy; more would share it.
    """
    if config.engine.workers != "auto":
        return config.engine.workers
    if torch.device(config.device).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // config.engine.threads, config.federation.clients_per_round))
