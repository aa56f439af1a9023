"""The trainer that carries out a way of training."""

from torch import nn

from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.training import LocalTraining, Trainer


def make_trainer(model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> Trainer:
    """The trainer that `how.execution` names.

    Raises:
        LowrankError: the model cannot be trained in this way.
    """
    if how.execution == "batched":
        from lowrank_fl.execution.batched import BatchedTrainer

        return BatchedTrainer(model, examples, parts, how)
    if how.execution == "graphs":
        from lowrank_fl.execution.graphs import GraphTrainer

        return GraphTrainer(model, examples, parts, how)
    if how.execution == "compiled":
        from lowrank_fl.execution.compiled import CompiledTrainer

        return CompiledTrainer(model, examples, parts, how)
    return Trainer(model, examples, parts, how)
