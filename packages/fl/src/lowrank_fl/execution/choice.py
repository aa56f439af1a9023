"""`engine.execution` auto: the ways that go with a run, timed once on its model and clients."""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from lowrank_core import LowrankError
from lowrank_core.errors import shortened
from lowrank_core.parsing import parse_json, record_of
from lowrank_fl.config import Execution, RunConfig
from lowrank_fl.config.fits_execution import execution_fault
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.execution.groups import grouped
from lowrank_fl.execution.make import make_trainer
from lowrank_fl.folder import write_whole
from lowrank_fl.training import LocalTraining

FILE = "execution.json"

# Rounding alone moves an epoch's loss by far less, a way that computes something else by more.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class _Choice:
    execution: Execution


def settle(
    model: nn.Module,
    examples: Examples,
    parts: Parts,
    how: LocalTraining,
    config: RunConfig,
    folder: Path,
    note: Callable[[str], None],
) -> LocalTraining:
    """`how` with the way that this run takes under `auto`, which `note` is told.

    On a GPU it is the fastest one, and execution.json in the run's folder says what was timed; a run that is resumed
    takes what is written there. On a CPU, where the same configuration gives the same bits, it is sequential.
    """
    if torch.device(how.device).type == "cpu" or config.engine.kind != "local":
        note("engine.execution auto: clients train one after the other, because a choice by time would change bits")
        return how
    file = folder / FILE
    if file.exists():
        try:
            return replace(how, execution=record_of(_Choice, parse_json(file.read_bytes())).execution)
        except ValueError as error:
            raise LowrankError(
                f"{file} is damaged ({shortened(str(error))}); remove it, and the ways are timed again, after which "
                "the run may differ in its last bits"
            ) from None
    # Compiling takes a minute in every process, which many runs never win back.
    ways = [way for way in get_args(Execution) if way != "compiled" and execution_fault(config, way) is None]
    seconds, left_out = time_ways(ways, model, examples, parts, how)
    chosen: Execution = min(seconds, key=seconds.__getitem__) if seconds else "sequential"
    note(f"engine.execution auto: {described(chosen, seconds, left_out)}")
    record = {"execution": chosen, "device": how.device, "seconds": seconds, "left_out": left_out}
    write_whole(file, json.dumps(record, indent=2).encode())
    return replace(how, execution=chosen)


def described(chosen: Execution, seconds: dict[Execution, float], left_out: dict[Execution, str]) -> str:
    """`graphs, which takes 0.71 s for an epoch of a round's clients (sequential 1.20 s); batched left out: ...`."""
    others = [f"{way} {taken:.3g} s" for way, taken in seconds.items() if way != chosen]
    line = chosen
    if chosen in seconds:
        line += f", which takes {seconds[chosen]:.3g} s for an epoch of a round's clients"
    if others:
        line += f" ({', '.join(others)})"
    return "; ".join([line, *(f"{way} left out: {reason}" for way, reason in left_out.items())])


def time_ways(
    ways: Sequence[Execution], model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining
) -> tuple[dict[Execution, float], dict[Execution, str]]:
    """Seconds of one epoch of a round's worth of clients by each way, and why the other ways were left out.

    sequential comes first among the ways: what it reports is what the others must report.
    """
    clients = range(min(how.federation.clients_per_round, len(parts)))
    seconds: dict[Execution, float] = {}
    left_out: dict[Execution, str] = {}
    expected: list[float] = []
    for way in ways:
        try:
            trainer = make_trainer(copy.deepcopy(model), examples, parts, replace(how, execution=way))
            start = {name: tensor.clone() for name, tensor in trainer.state.items()}

            def epoch(trainer=trainer, start: dict[str, Tensor] = start) -> list[float]:
                losses: list[float] = []
                for group in grouped(clients, trainer.how.group_size):
                    trainer.expect(group)
                    for client in group:
                        trainer.load(start)
                        losses.append(trainer.train(client, 1, how.federation.lr_in(1), epochs=1).loss)
                return losses

            losses = epoch()  # kernels are chosen and graphs captured
            began = time.perf_counter()
            epoch()  # it ends with the losses on the CPU, so nothing is under way
            taken = time.perf_counter() - began
        except (LowrankError, RuntimeError) as error:
            left_out[way] = str(error).splitlines()[0]
            continue
        expected = expected or losses
        worst = max(abs(loss / right - 1) for loss, right in zip(losses, expected, strict=True))
        if worst > _TOLERANCE:
            left_out[way] = f"its losses are up to {worst:.0%} off those of {ways[0]}"
        else:
            seconds[way] = taken
    return seconds, left_out
