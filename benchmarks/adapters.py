"""Forward and backward of an adapted layer: ours against PEFT's and LyCORIS's, at the shapes of SDXL and a 3B LLM.

The base layer is frozen and its input needs a gradient, as in the middle of a model. All competitors of a case hold the
same factors and take turns; their outputs and input gradients are compared before anything is timed.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from adapter_peers import PEERS, held_bytes, ours
from machine import cores, describe, machine, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A layer, alone in a Sequential, and an input for it."""

    family: str
    layer: Callable[[], nn.Module]
    positions: tuple[int, ...]
    """Tokens, or height and width."""

    def input(self) -> Tensor:
        layer: Any = self.layer()
        if isinstance(layer, nn.Conv2d):
            return torch.randn(1, layer.in_channels, *self.positions)
        return torch.randn(1, *self.positions, layer.in_features)


def _linear(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs)


def _conv(channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(channels, channels, 3, padding=1)


# The UNet's levels at 1024 x 1024 have 4096 tokens of 640 and 1024 of 1280; the text's keys and values come from 77
# tokens of 2048.
SHAPES = {
    "640": Shape("sdxl", _linear(640, 640), (4096,)),
    "1280": Shape("sdxl", _linear(1280, 1280), (1024,)),
    "1280->5120": Shape("sdxl", _linear(1280, 5120), (1024,)),
    "2048->1280": Shape("sdxl", _linear(2048, 1280), (77,)),
    "conv 320": Shape("sdxl", _conv(320), (64, 64)),
    "conv 640": Shape("sdxl", _conv(640), (32, 32)),
    "conv 1280": Shape("sdxl", _conv(1280), (16, 16)),
    "3072": Shape("llm", _linear(3072, 3072), (1024,)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    about = machine(arguments.device)
    print(describe(about))
    cases = [(shape, rank) for shape in arguments.shapes for rank in arguments.ranks]
    record: dict[str, Any] = {"machine": about, "arguments": vars(arguments), "cases": []}
    for shape, rank in cases:
        case = measure(arguments, shape, rank)
        record["cases"].append(case)
        print(f"{shape} r={rank}: {case['milliseconds']['ours'][0]:.1f} ms ...", file=sys.stderr)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    print_tables(arguments, record["cases"])


def measure(arguments: argparse.Namespace, name: str, rank: int) -> dict[str, Any]:
    """One shape at one rank: milliseconds a step of every competitor, and what autograd holds meanwhile."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    torch.manual_seed(0)
    base = nn.Sequential(SHAPES[name].layer()).requires_grad_(False).to(device, dtype)
    x = SHAPES[name].input().to(device, dtype).requires_grad_()
    models = {"base alone": base, "ours": ours(base, arguments.method, rank)}
    # LoRA of twice the rank has as many parameters as LoHa.
    models["our LoRA"] = ours(base, "lora", 2 * rank if arguments.method == "loha" else rank)
    skipped: dict[str, str] = {}
    for peer, build in PEERS.items():
        if arguments.only and peer not in arguments.only:
            continue
        try:
            models[peer] = build(base, arguments.method, rank, None)
        except (ImportError, NotImplementedError) as error:
            skipped[peer] = str(error)
    worst = {peer: disagreement(models["ours"], models[peer], x) for peer in models if peer in PEERS}
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for peer, error in worst.items():
        # LyCORIS's rebuilt weight is rounded to the base's dtype with W added and taken away again: off in bfloat16.
        rounded = peer == "LyCORIS rebuild" and dtype != torch.float32
        assert error < tolerance or rounded, f"{peer} computes something else: {error:.1e} off"
    held = {key: held_bytes(model, x) for key, model in models.items()}
    steps = {key: make_step(_compiled(model, arguments), x) for key, model in models.items()}
    milliseconds: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(arguments.warm_up + arguments.repeats):
        for key, step in steps.items():
            took = step()
            if turn >= arguments.warm_up:
                milliseconds[key].append(took)
    return {
        "shape": name,
        "family": SHAPES[name].family,
        "rank": rank,
        "milliseconds": milliseconds,
        "held_bytes": held,
        "floor": floor(base[0], rank) if arguments.method == "loha" and hasattr(base[0], "weight") else None,
        "disagreement": worst,
        "skipped": skipped,
    }


def floor(layer: Any, rank: int) -> float:
    """Operations of a step with LoHa of this rank by those with LoRA of twice the rank, the base's included."""
    outputs, *rest = layer.weight.shape
    inputs = math.prod(rest)
    base = 2 * outputs * inputs
    return (base + 3 * rank**2 * (inputs + outputs)) / (base + 6 * rank * (inputs + outputs))


def disagreement(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The relative distance of two models' outputs or input gradients, the larger of the two."""
    results = []
    for model in (one, other):
        out = model(x)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        results.append((out.detach().float(), gradient.float()))
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(*results, strict=True))


def make_step(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """Forward and backward; returns milliseconds."""
    cuda = x.device.type == "cuda"
    gradient = torch.ones_like(model(x).detach())

    def step() -> float:
        model.zero_grad()
        x.grad = None
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        model(x).backward(gradient)
        if cuda:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    return step


def print_tables(arguments: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 170)
    peers = [peer for peer in PEERS if any(peer in case["milliseconds"] for case in cases)]
    table = Table(
        title=f"{arguments.method}, {arguments.dtype} on {arguments.device}{', compiled' if arguments.compile else ''}",
        caption=f"forward + backward; {arguments.repeats} turns; ratios turn by turn: median (min to max)",
    )
    for title in ("layer", "r", "ours, ms", *(f"{peer} / ours" for peer in peers), "ours / our LoRA", "floor", "held"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    for case in cases:
        times, held = case["milliseconds"], case["held_bytes"]
        table.add_row(
            case["shape"],
            str(case["rank"]),
            spread(times["ours"], 1),
            *(spread(_ratios(times[peer], times["ours"])) if peer in times else "-" for peer in peers),
            spread(_ratios(times["ours"], times["our LoRA"])),
            f"{case['floor']:.2f}" if case["floor"] else "-",
            f"{held['ours'] / held['our LoRA']:.2f}",
        )
    console.print(table)
    print(
        "our LoRA: of twice the rank, with as many parameters.  "
        if arguments.method == "loha"
        else "our LoRA: of the same rank.  ",
        "floor: its arithmetic by our LoRA's.  held: bytes kept for backward by our LoRA's.",
        sep="",
    )
    for rank in arguments.ranks:
        chosen = [case for case in cases if case["rank"] == rank and case["family"] == "sdxl"]
        if chosen:
            means = [f"{peer} {_mean(chosen, peer):.2f}" for peer in peers if peer in chosen[0]["milliseconds"]]
            print(f"r = {rank}, geometric mean over SDXL's shapes, times ours: {', '.join(means)}")
    for peer, reason in {key: why for case in cases for key, why in case["skipped"].items()}.items():
        print(f"skipped {peer}: {reason}")


def _ratios(theirs: list[float], ours: list[float]) -> list[float]:
    return [their / our for their, our in zip(theirs, ours, strict=True)]


def _mean(cases: list[dict[str, Any]], peer: str) -> float:
    return geometric_mean(median(_ratios(case["milliseconds"][peer], case["milliseconds"]["ours"])) for case in cases)


def _compiled(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    return torch.compile(model) if arguments.compile else model  # pyright: ignore[reportReturnType]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["lora", "loha", "lokr", "adalora"], default="loha")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--only", nargs="+", choices=list(PEERS), metavar="PEER", help="these peers alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--compile", action="store_true", help="time the layers under torch.compile")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns; default: 7")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before them; default: 2")
    parser.add_argument("--json", metavar="FILE", help="write everything measured, case by case as it ends")
    return parser.parse_args()


if __name__ == "__main__":
    main()
