"""How long a client's training step and an evaluation take on this machine, tried out on random numbers."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from lowrank_fl.config import RunConfig
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.training import LocalTraining, Trainer

_SECONDS = 0.3


def time_steps(model: nn.Module, config: RunConfig, input_shape: Sequence[int], examples: int) -> tuple[float, float]:
    """Seconds of a training step and of an evaluation, on so many examples each; the model goes to the run's device."""
    # Two symbols that every text model knows, or two grey levels.
    inputs, labels = torch.randint(2, (examples, *input_shape), dtype=torch.uint8), torch.zeros(examples).long()
    level = (0.5,) * input_shape[0] if len(input_shape) > 1 else ()
    data = Examples("random", inputs, labels, inputs, labels, ("0",), level, level)
    federation = config.federation.model_copy(update={"epochs": 1, "batch_size": examples})
    how = LocalTraining(federation, config.model.jacobian_lambda, config.seed, config.device, config.engine.threads)
    trainer = Trainer(model, data, Parts([np.arange(examples)], []), how)
    # At rate 0, so that the values stay.
    return _time(lambda: trainer.train(0, 1, lr=0.0), config), _time(lambda: trainer.evaluate(0), config)


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Inside the block torch computes with so many threads, as clients do."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time(work: Callable[[], object], config: RunConfig) -> float:
    """Seconds of one call, the mean over as many as take a third of a second."""
    clock = time.perf_counter
    if torch.device(config.device).type == "cpu":
        # The process's own time, because other programs make the clock's erratic, and without the system's share,
        # which in the first call goes on memory: VGG16 takes twice its later seconds there.
        def clock() -> float:
            return os.times().user / config.engine.threads
    else:
        work()
    calls, spent, began = 0, 0.0, clock()
    while spent < _SECONDS:
        work()
        calls += 1
        spent = clock() - began
    return spent / calls
