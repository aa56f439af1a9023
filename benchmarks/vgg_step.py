"""One training step of VGG16, gradients and SGD update: original, FedPara and lowrank of the same size.

The steps are those of a client (`lowrank_fl.steps`: channels last, no Jacobian correction), by each way of
`engine.execution` that is asked for; the original is also timed in the contiguous layout, and ratios are against its
fastest one. The networks take turns, step by step.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from machine import cores, describe, machine, spread
from rich.console import Console
from rich.table import Table
from torch import nn

from lowrank_core import LowrankError
from lowrank_fl.config import Execution, FederationConfig, ModelConfig, Precision
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.execution.make import make_trainer
from lowrank_fl.models.build import build_model
from lowrank_fl.steps import SGD
from lowrank_fl.training import LocalTraining

LR = 0.01
WARM_UP = 2
NOTHING = torch.empty(0, dtype=torch.uint8)
NO_EXAMPLES = Examples("none", NOTHING, NOTHING, NOTHING, NOTHING, ())


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    on_gpu = torch.device(arguments.device).type == "cuda"
    # So many that what waits for the GPU at their end is little beside them, as in an epoch.
    in_a_turn = 20 if on_gpu else 1
    about = machine("cuda" if on_gpu else "cpu")
    print(describe(about))
    steps: dict[str, Callable[[], None]] = {}
    parameters: dict[str, int] = {}
    for way in arguments.ways:
        for name, (model, layout) in build(arguments.gamma).items():
            row = name if way == "sequential" else f"{name}, {way}"
            try:
                steps[row] = make_step(model, layout, arguments.batch, way, arguments.device, arguments.precision)
            except LowrankError as error:
                print(f"{row} left out: {error}")
                continue
            parameters[row] = sum(parameter.numel() for parameter in model.parameters())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + arguments.steps):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(in_a_turn):
                step()
            if on_gpu:
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                seconds[name].append((time.perf_counter() - began) / in_a_turn)
    fastest = min((name for name in seconds if name.startswith("original")), key=lambda name: median(seconds[name]))
    ratios = {name: [a / b for a, b in zip(took, seconds[fastest], strict=True)] for name, took in seconds.items()}
    where = f"{arguments.threads} threads" if arguments.device == "cpu" else arguments.device
    table = Table(caption=f"batch {arguments.batch}, {where}, {arguments.precision}, {arguments.steps} steps")
    for title in ("", "parameters", "a step, ms: median (min to max)", f"times the {fastest}"):
        table.add_column(title, justify="right" if title else "left")
    for name, took in seconds.items():
        milliseconds = [1000 * second for second in took]
        table.add_row(name, f"{parameters[name]:,}", spread(milliseconds, 1), spread(ratios[name]))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if arguments.json:
        record = {
            "machine": about,
            **{key: value for key, value in vars(arguments).items() if key != "json"},
            "parameters": parameters,
            "seconds": seconds,
            "reference": fastest,
        }
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")


def build(gamma: float) -> dict[str, tuple[nn.Module, torch.memory_format]]:
    """The networks by name, with the layout of their convolutions."""
    last = torch.channels_last
    original = ModelConfig(name="vgg16", method="original")
    fedpara, _ = _vgg(ModelConfig(name="vgg16", method="fedpara", gamma=gamma))
    budget = sum(parameter.numel() for parameter in fedpara.parameters())
    return {
        "original, channels last": (_vgg(original)[0], last),
        "original, contiguous": (_vgg(original)[0], torch.contiguous_format),
        f"fedpara, gamma {gamma:g}": (fedpara, last),
        "lowrank, same size": (_vgg(ModelConfig(name="vgg16", method="lowrank", budget=budget))[0], last),
    }


def _vgg(config: ModelConfig) -> tuple[nn.Module, object]:
    return build_model(config, (3, 32, 32), 10, seed=0)


def make_step(
    model: nn.Module, layout: torch.memory_format, batch: int, way: Execution, device: str, precision: Precision
) -> Callable[[], None]:
    """What a client does with one batch.

    Raises:
        LowrankError: there is no such way on that device.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (batch,), generator=generator).to(device)
    federation = FederationConfig(batch_size=batch, precision=precision)
    how = LocalTraining(federation, 0.0, 0, device, torch.get_num_threads(), execution=way)
    trainer = make_trainer(model, NO_EXAMPLES, Parts([], []), how)
    model.to(memory_format=layout).train()
    sgd = SGD(list(model.parameters()), LR, momentum=0.0, weight_decay=0.0)

    def step() -> None:
        model.zero_grad()
        trainer.backward(images, labels, LR)
        sgd.step()

    return step


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each network; default: 15")
    parser.add_argument("--batch", type=int, default=64, help="default: 64")
    parser.add_argument("--gamma", type=float, default=0.1, help="FedPara's rank rule; default: 0.1")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="default: fp32")
    parser.add_argument("--ways", nargs="+", choices=get_args(Execution), default=["sequential"], help="sequential")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
