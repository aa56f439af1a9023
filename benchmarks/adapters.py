"""Forward and backward of an adapted layer: ours against PEFT's and LyCORIS's, at the shapes of SDXL and a 3B LLM.

The base layer is frozen and its input needs a gradient, as in the middle of a model. All competitors of a case hold the
same factors and take turns; their outputs and input gradients are compared before anything is timed.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from adapter_peers import PEERS, held_bytes, ours
from machine import cores, describe, machine, plain_float32, reason_of, spread
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
    plain_float32()
    cases = [(shape, rank) for shape in arguments.shapes for rank in arguments.ranks]
    record: dict[str, Any] = {"machine": about, "arguments": vars(arguments), "cases": []}
    for shape, rank in cases:
        try:
            case = measure(arguments, shape, rank)
        except Exception as error:  # ours or the layer alone: this line is lost, and no other
            print(f"{shape} r={rank} is left out: {reason_of(error)}", file=sys.stderr)
            continue
        record["cases"].append(case)
        print(f"{shape} r={rank}: {case['milliseconds']['ours'][0]:.3g} ms ...", file=sys.stderr)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    print_tables(arguments, record["cases"])


def measure(arguments: argparse.Namespace, name: str, rank: int) -> dict[str, Any]:
    """One shape at one rank: milliseconds a step of every competitor, and what autograd holds meanwhile."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    torch.manual_seed(0)
    # Every layer is a graph of its own: without this, the compiler would give up after eight of them.
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    base = nn.Sequential(SHAPES[name].layer()).requires_grad_(False).to(device, dtype)
    x = SHAPES[name].input().to(device, dtype).requires_grad_()
    models = {"base alone": base, "ours": ours(base, arguments.method, rank)}
    # LoRA of twice the rank has as many parameters as LoHa.
    models["our LoRA"] = ours(base, "lora", 2 * rank if arguments.method == "loha" else rank)
    in_dtype(models.values(), dtype)
    held = {key: held_bytes(model, x) for key, model in models.items()}
    make = captured_step if arguments.graphs else make_step
    steps = {key: make(_compiled(model, arguments), x) for key, model in models.items()}
    skipped: dict[str, str] = {}
    worst: dict[str, float] = {}
    for peer, build in PEERS.items():
        if arguments.only and peer not in arguments.only:
            continue
        try:
            model = build(base, arguments.method, rank, None)
            in_dtype([model], dtype)
            worst[peer] = check(peer, models["ours"], model, x)
            step = make(_compiled(model, arguments), x)
            step()  # which compiles backward too
            held[peer], steps[peer] = held_bytes(model, x), step
        except Exception as error:  # missing, or no match for this machine, or without such a layer
            skipped[peer] = reason_of(error)
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


def in_dtype(models: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """The factors in the base's dtype, whatever each competitor holds them in by itself."""
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


def check(peer: str, ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    """How far a peer is from ours; raises ArithmeticError if rounding does not explain it."""
    error = disagreement(ours, theirs, x)
    # LyCORIS's rebuilt weight is rounded to the base's dtype with W added and taken away again: off in bfloat16.
    rounded = peer == "LyCORIS rebuild" and x.dtype != torch.float32
    if not (error < (1e-4 if x.dtype == torch.float32 else 3e-2) or rounded):
        raise ArithmeticError(f"computes something else, {error:.1e} off")
    return error


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


def captured_step(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """The same as a CUDA graph: what the GPU takes, without what Python and the launches take."""
    plain, gradient = make_step(model, x), torch.ones_like(model(x).detach())
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # gradients that a graph writes must not have been made on another stream
        for _ in range(3):
            plain()
    torch.cuda.current_stream().wait_stream(beside)
    model.zero_grad()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).backward(gradient)
    # What the graph writes to must live as long as the step; the next competitor gets gradients of its own.
    kept = [x.grad, *(parameter.grad for parameter in model.parameters())]
    x.grad = None

    def step() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        assert kept
        return began.elapsed_time(ended)

    return step


def print_tables(arguments: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 170)
    peers = [peer for peer in PEERS if any(peer in case["milliseconds"] for case in cases)]
    how = (", compiled" if arguments.compile else "") + (", replayed as CUDA graphs" if arguments.graphs else "")
    table = Table(
        title=f"{arguments.method}, {arguments.dtype} on {arguments.device}{how}",
        caption=f"forward + backward; {arguments.repeats} turns; ratios turn by turn: median (min to max)",
    )
    for title in ("layer", "r", "ours, ms", *(f"{peer} / ours" for peer in peers), "ours / our LoRA", "floor", "held"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    for case in cases:
        times, held = case["milliseconds"], case["held_bytes"]
        table.add_row(
            case["shape"],
            str(case["rank"]),
            spread(times["ours"], 3 if arguments.device == "cuda" else 1),
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
            everywhere = [peer for peer in peers if all(peer in case["milliseconds"] for case in chosen)]
            means = [f"{peer} {_mean(chosen, peer):.2f}" for peer in everywhere]
            print(f"r = {rank}, geometric mean over SDXL's shapes, times ours: {', '.join(means)}")
    for peer, reason in {key: why for case in cases for key, why in case["skipped"].items()}.items():
        print(f"skipped {peer}: {reason}")


def _ratios(theirs: list[float], ours: list[float]) -> list[float]:
    return [their / our for their, our in zip(theirs, ours, strict=True)]


def _mean(cases: list[dict[str, Any]], peer: str) -> float:
    return geometric_mean(median(_ratios(case["milliseconds"][peer], case["milliseconds"]["ours"])) for case in cases)


def _compiled(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    return torch.compile(model, dynamic=False) if arguments.compile else model  # pyright: ignore[reportReturnType]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["lora", "loha", "lokr", "adalora"], default="loha")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--only", nargs="+", choices=list(PEERS), metavar="PEER", help="these peers alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--compile", action="store_true", help="time the layers under torch.compile")
    parser.add_argument("--graphs", action="store_true", help="CUDA: time steps as graphs, without their launches")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--repeats", type=int, help="timed turns; default: 7 on a CPU, 50 with CUDA")
    parser.add_argument("--warm-up", type=int, help="turns before them; default: 2 on a CPU, 10 with CUDA")
    parser.add_argument("--json", metavar="FILE", help="write everything measured, case by case as it ends")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if arguments.graphs and not cuda:
        parser.error("--graphs needs --device cuda")
    arguments.repeats = arguments.repeats or (50 if cuda else 7)
    arguments.warm_up = arguments.warm_up or (10 if cuda else 2)
    return arguments


if __name__ == "__main__":
    main()
