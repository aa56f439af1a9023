"""The arithmetic of a round, counted, and its time on this machine, from a step that is timed."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lowrank_fl.aggregation import FactorAggregation
from lowrank_fl.config import RunConfig
from lowrank_fl.flops import CountFlops
from lowrank_fl.flower.engines import worker_count
from lowrank_fl.plan.shapes import DataShape, trained_examples
from lowrank_fl.state import local_names, personalization_of, trained_names
from lowrank_fl.steps import backward, training_only
from lowrank_fl.timing import time_steps, torch_threads

# No step that takes much longer is timed whole: some seconds of a core.
_TIMED_FLOPS = 200_000_000_000


def work(config: RunConfig, data: DataShape, model: nn.Module, aggregation: FactorAggregation) -> tuple[int, float]:
    """FLOPs of a round's training, all clients', and seconds of a round with its evaluation."""
    held = trained_examples(config, data)
    steps = math.ceil(held / config.federation.batch_size)
    with torch_threads(config.engine.threads):
        epochs: list[tuple[int, float]] = []
        for phase in _phases(config, model, aggregation):
            with training_only(model, phase.only):
                per_step, per_example = _count_step(model, config, data)
            epochs.append((phase.clients, phase.epochs * (steps * per_step + held * per_example)))
        seconds = _round_seconds(model, config, data, epochs)
    return round(sum(clients * each for clients, each in epochs)), seconds


@dataclass(frozen=True)
class _Phase:
    """Epochs that each of so many clients trains in a round; all of the model, or the named parameters alone.

    Those of a turn of the factors are the share of it in all rounds.
    """

    clients: int
    epochs: float
    only: Collection[str] | None = None


def _phases(config: RunConfig, model: nn.Module, aggregation: FactorAggregation) -> list[_Phase]:
    federation, own = config.federation, personalization_of(config)
    sampled = federation.clients_per_round
    if own.kind == "fedrep":
        head, body = local_names(model, own), trained_names(model, own)
        phases = [_Phase(sampled, own.epochs, head), _Phase(sampled, federation.epochs, body)]
    else:
        turns = aggregation.turns
        phases = [_Phase(sampled, federation.epochs / turns, aggregation.returned(turn + 1)) for turn in range(turns)]
    if own.kind == "ditto":
        phases.append(_Phase(sampled, own.epochs))
    if own.test_epochs:
        phases.append(_Phase(federation.clients, own.test_epochs))
    return phases


def _count_step(model: nn.Module, config: RunConfig, data: DataShape) -> tuple[int, int]:
    """FLOPs of a training step itself (composing weights and correcting them), and of each example in it."""

    def count(examples: int, jacobian_lambda: float) -> int:
        inputs = torch.randint(2, (examples, *data.input_shape))
        if len(data.input_shape) > 1:
            inputs = 2.0 * inputs - 1
        labels = torch.zeros(examples, dtype=torch.int64)
        # Without oneDNN, whose LSTM is one operation to the counter. Its TF32 is left alone: setting it warns.
        without = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)  # pyright: ignore[reportArgumentType]
        with without, CountFlops() as counter:
            backward(model, inputs, labels, config.federation.lr, jacobian_lambda)
        return counter.total

    # How an adapter is computed may depend on the size of the batch.
    most = max(2, _mean_batch(config, data)) if config.adapter.method else 2
    per_example = count(most, 0) - count(most - 1, 0)
    per_step = count(most - 1, config.model.jacobian_lambda) - (most - 1) * per_example
    model.zero_grad()
    return per_step, per_example


def _round_seconds(model: nn.Module, config: RunConfig, data: DataShape, phases: Sequence[tuple[int, float]]) -> float:
    """Of the clients' training and the evaluation, from a step of as many examples as an epoch's have on average.

    phases: how many clients train, and the FLOPs of each.
    """
    workers = worker_count(config)
    per_step, per_example = _count_step(model, config, data)
    timed = max(1, min(_mean_batch(config, data), (_TIMED_FLOPS - per_step) // per_example))
    step, evaluation = time_steps(model, config, data.input_shape, timed)
    speed = (per_step + timed * per_example) / step
    training = sum(math.ceil(clients / workers) * flops / speed for clients, flops in phases)
    tested = config.partition.held_out * data.examples or data.test_examples
    return training + tested / timed * evaluation / workers


def _mean_batch(config: RunConfig, data: DataShape) -> int:
    """Examples of a step, on average."""
    held = trained_examples(config, data)
    return math.ceil(held / math.ceil(held / config.federation.batch_size))
