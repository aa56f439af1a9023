"""What a run would cost, found out without training: parameters, traffic, arithmetic and time on this machine."""

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_core.candidates import LeftEntry
from lowrank_core.replacement import FactorizedEntry
from lowrank_fl.config import RunConfig
from lowrank_fl.flower.rounds import measure_round
from lowrank_fl.load import expand
from lowrank_fl.models.build import build_model
from lowrank_fl.run import check_device, worker_count
from lowrank_fl.state import transferred
from lowrank_fl.training import backward

_TIMED_EXAMPLES = 16
_TIMED_SECONDS = 1.0


@dataclass(frozen=True)
class DataShape:
    """What a plan must know of a data set: an example's shape, how many classes, how many training examples."""

    input_shape: tuple[int, ...]
    classes: int
    examples: int


# So that a plan needs no download; the tests hold these against the loaders.
_SHAPES = {
    "digits": DataShape((1, 8, 8), 10, 1442),
    "cifar10": DataShape((3, 32, 32), 10, 50_000),
    "cifar100": DataShape((3, 32, 32), 100, 50_000),
    "cinic10": DataShape((3, 32, 32), 10, 90_000),
    "mnist": DataShape((1, 28, 28), 10, 60_000),
    "emnist": DataShape((1, 28, 28), 62, 697_932),
}


@dataclass(frozen=True)
class RunPlan:
    """One run's cost; bytes and seconds are those of all its rounds."""

    name: str
    method: str
    swept: dict[str, Any]
    rounds: int
    clients: int
    clients_per_round: int
    params: int
    transferred_params: int
    original_params: int
    model_bytes: int
    """Transferred parameters in the bytes of their dtype."""
    uplink_bytes: int
    downlink_bytes: int
    total_bytes: int
    """What Flower would serialise, headers included."""
    paper_bytes: int
    """The paper's arithmetic: 2 x participants x model size x rounds (section 3.2)."""
    flops_per_round: int
    """Of the clients' training, forward and backward; a multiply-add counts as two."""
    seconds: float
    """An estimate from one timed step on random numbers, at this machine's present load."""
    layers: tuple[FactorizedEntry, ...]
    left: tuple[LeftEntry, ...]


@dataclass(frozen=True)
class Plan:
    runs: list[RunPlan]


def plan(config: RunConfig) -> Plan:
    """The cost of every run of `config`. Nothing is trained, and no data is read where its shape is known.

    Raises:
        LowrankError: a data set whose shape is not known cannot be read.
    """
    check_device(config.device)
    return Plan([_plan_run(single, swept) for single, swept in expand(config)])


def _plan_run(config: RunConfig, swept: dict[str, Any]) -> RunPlan:
    data, federation = _data_shape(config), config.federation
    model, report = build_model(config.model, data.input_shape, data.classes, seed=0)
    params = sum(parameter.numel() for parameter in model.parameters())
    state = transferred(model)
    downlink, uplink = measure_round(config.strategy, federation, state)
    model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    held = data.examples / federation.clients
    steps = federation.clients_per_round * federation.epochs * math.ceil(held / federation.batch_size)
    per_step, per_example, flops_per_second = _measure_step(model, config, data)
    flops = round(steps * per_step + federation.clients_per_round * federation.epochs * held * per_example)
    return RunPlan(
        name=config.name,
        method=config.model.method,
        swept=swept,
        rounds=config.rounds,
        clients=federation.clients,
        clients_per_round=federation.clients_per_round,
        params=params,
        transferred_params=sum(tensor.numel() for tensor in state.values()),
        original_params=report.original_params if report else params,
        model_bytes=model_bytes,
        uplink_bytes=uplink * config.rounds,
        downlink_bytes=downlink * config.rounds,
        total_bytes=(uplink + downlink) * config.rounds,
        paper_bytes=2 * federation.clients_per_round * model_bytes * config.rounds,
        flops_per_round=flops,
        seconds=config.rounds * flops / (flops_per_second * worker_count(config)),
        layers=report.changed if report else (),
        left=report.left if report else (),
    )


def _data_shape(config: RunConfig) -> DataShape:
    known = _SHAPES.get(config.data.name)
    if known is None:
        from lowrank_fl.data import load_examples

        examples = load_examples(config.data, config.partition, 0)
        return DataShape(examples.input_shape, len(examples.classes), len(examples.labels))
    if config.data.max_examples is not None:
        return DataShape(known.input_shape, known.classes, min(known.examples, config.data.max_examples))
    return known


def _measure_step(model: nn.Module, config: RunConfig, data: DataShape) -> tuple[int, int, float]:
    """FLOPs of a training step itself (composing weights), FLOPs of each example in it, and FLOPs a second.

    Counted on the meta device in steps of one and two examples; timed on random numbers.
    """

    def step(model: nn.Module, examples: int, device: str) -> None:
        inputs, labels = _batch(data, examples, device)
        backward(model, inputs, labels, config.federation.lr, config.model.jacobian_lambda)

    on_meta = copy.deepcopy(model).to("meta")
    counts: list[int] = []
    for examples in (1, 2):
        with FlopCounterMode(display=False) as counter:
            step(on_meta, examples, "meta")
        counts.append(counter.get_total_flops())
    per_example = counts[1] - counts[0]
    per_step = counts[0] - per_example

    model = model.to(config.device)
    timed = min(config.federation.batch_size, _TIMED_EXAMPLES)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.engine.threads)
    try:
        # The quickest of a few, and of two at least: the first also pays for setting up.
        quickest, began, steps = math.inf, time.perf_counter(), 0
        while steps < 2 or time.perf_counter() - began < _TIMED_SECONDS:
            steps += 1
            start = time.perf_counter()
            step(model, timed, config.device)
            if torch.device(config.device).type == "cuda":
                torch.cuda.synchronize()
            quickest = min(quickest, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return per_step, per_example, (per_step + timed * per_example) / quickest


def _batch(data: DataShape, size: int, device: str) -> tuple[Tensor, Tensor]:
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    if len(data.input_shape) == 1:
        return torch.zeros(size, *data.input_shape, dtype=torch.int64, device=device), labels
    return torch.randn(size, *data.input_shape, device=device), labels
