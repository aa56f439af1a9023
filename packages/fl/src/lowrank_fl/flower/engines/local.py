"""The engine of one machine: clients in this process, or in worker processes side by side."""

from flwr.serverapp import Grid
from torch import nn

from lowrank_fl.config import RunConfig
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.records import ArrayRecord
from lowrank_fl.flower.workers import make_executor
from lowrank_fl.training import LocalTraining


class LocalEngine:
    """Messages by function call or through worker processes; nothing is waited for that cannot come."""

    def __init__(self, workers: int) -> None:
        self._executor = make_executor(workers)
        self.shared = self._executor.shared

    def set_up(self, config: RunConfig, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> Grid:
        self._executor.set_up(model, examples, parts, how)
        return LocalGrid(config.federation.clients, self._executor.execute, shared=self.shared)

    def evaluate(self, record: ArrayRecord) -> tuple[float, float]:
        return self._executor.evaluate(record)

    def close(self, *, at_once: bool = False) -> None:
        self._executor.close(at_once=at_once)
