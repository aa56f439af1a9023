"""One training step of VGG16, gradients and SGD update: original, FedPara and lowrank of the same size.

The steps are those of a client (`lowrank_fl.training`: channels last, no Jacobian correction); the original is also
timed in the contiguous layout, and ratios are against its faster one. The networks take turns, step by step.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from machine import cores, describe, machine, spread
from rich.console import Console
from rich.table import Table
from torch import nn

from lowrank_fl.config import ModelConfig
from lowrank_fl.models.build import build_model
from lowrank_fl.training import SGD, backward

LR = 0.01
WARM_UP = 2


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    about = machine()
    print(describe(about))
    models = build(arguments.gamma)
    steps = {name: make_step(model, layout, arguments.batch) for name, (model, layout) in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + arguments.steps):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    fastest = min((name for name in seconds if name.startswith("original")), key=lambda name: median(seconds[name]))
    ratios = {name: [a / b for a, b in zip(took, seconds[fastest], strict=True)] for name, took in seconds.items()}
    table = Table(caption=f"batch {arguments.batch}, {arguments.threads} threads, {arguments.steps} steps")
    for title in ("", "parameters", "a step, ms: median (min to max)", f"times the {fastest}"):
        table.add_column(title, justify="right" if title else "left")
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, (model, _) in models.items()}
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


def make_step(model: nn.Module, layout: torch.memory_format, batch: int) -> Callable[[], None]:
    """What a client does with one batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    model.to(memory_format=layout).train()
    sgd = SGD(list(model.parameters()), LR, momentum=0.0, weight_decay=0.0)

    def step() -> None:
        model.zero_grad()
        backward(model, images, labels, LR, jacobian_lambda=0.0)
        sgd.step()

    return step


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each network; default: 15")
    parser.add_argument("--batch", type=int, default=64, help="default: 64")
    parser.add_argument("--gamma", type=float, default=0.1, help="FedPara's rank rule; default: 0.1")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
