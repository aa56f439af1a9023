"""LoHa's ΔW composed by the Triton kernel, by the plain products and by torch.compile of these, at layers of SDXL and a
3B language model.

As layers do it: from factors in float32 (`--factors`) to ΔW in the base's dtype. Calls go round through so many sets of
factors and outputs that none is in a cache when its turn comes. Every rate is that of the bytes that cannot be saved,
the factors read and ΔW written once, beside the bandwidth of a large copy measured in the same run.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import cores, describe, machine, reason_of, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

# ΔW as a matrix: outputs, and inputs with a convolution's pixels.
SHAPES = {
    "640": (640, 640),
    "1280": (1280, 1280),
    "2048->1280": (1280, 2048),
    "1280->10240": (10240, 1280),
    "conv 320": (320, 2880),
    "conv 1280": (1280, 11520),
    "llm 3072": (3072, 3072),
    "llm 3072->8192": (8192, 3072),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCALE = 0.5
BEYOND_CACHES = 2**28
"""Bytes that go by before a buffer has its turn again; the largest caches hold half of it."""

Compose = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


def plain(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, dtype: torch.dtype) -> Tensor:
    """What layers do without the kernel."""
    return (SCALE * ((a1 @ b1) * (a2 @ b2))).to(dtype)


def kernel(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, dtype: torch.dtype) -> Tensor:
    from lowrank_core.adapters.ways.hadamard_kernel import compose_hadamard

    return compose_hadamard(a1, b1, a2, b2, SCALE, dtype)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    about = machine(arguments.device)
    print(describe(about))
    bandwidth = copy_bandwidth(arguments)
    record: dict[str, Any] = {
        "machine": about,
        "arguments": vars(arguments),
        "copy_bytes_per_second": bandwidth,
        "cases": [],
    }
    for dtype in arguments.dtypes:
        for shape in arguments.shapes:
            for rank in arguments.ranks:
                case = measure(arguments, shape, rank, dtype)
                record["cases"].append(case)
                print(f"{shape} r={rank} {dtype} is measured", file=sys.stderr)
                if arguments.json:
                    Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    print_table(arguments, record["cases"], median(bandwidth))


@torch.no_grad()
def measure(arguments: argparse.Namespace, name: str, rank: int, dtype: str) -> dict[str, Any]:
    """One layer at one rank: microseconds a call of every competitor, and what none of them can save in bytes."""
    (outputs, inputs), held, wanted = SHAPES[name], DTYPES[arguments.factors], DTYPES[dtype]
    size = 2 * rank * (outputs + inputs) * held.itemsize + outputs * inputs * wanted.itemsize
    count = 2 if arguments.quick else max(2, math.ceil(BEYOND_CACHES / size))
    torch.manual_seed(0)
    sides = [((outputs, rank), (rank, inputs)) * 2 for _ in range(count)]
    sets = [[torch.randn(side, device=arguments.device).to(held) for side in four] for four in sides]
    exact = plain(*(factor.double() for factor in sets[0]), torch.float64)
    # A shape is a graph of its own; without this the compiler would give up after a few, or guess at a common one.
    torch.compiler.reset()
    competitors: dict[str, Compose] = {"plain": plain, "compiled": torch.compile(plain, dynamic=False)}
    if arguments.device == "cuda":
        competitors = {"kernel": kernel, **competitors}
    launched: dict[str, list[float]] = {}
    replayed: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for key, compose in competitors.items():
        try:
            check(compose(*sets[0], wanted), exact)
            launched[key] = timed(lambda compose=compose: ring(compose, sets, wanted), count, arguments)
            if arguments.device == "cuda":
                replayed[key] = timed(captured(compose, sets, wanted), count, arguments)
        except Exception as error:  # One that fails, by a compiler or for want of memory, ends no table.
            skipped[key] = reason_of(error)
        gc.collect()
    return {
        "shape": name,
        "rank": rank,
        "dtype": dtype,
        "bytes": size,
        "buffers": count,
        "launched_microseconds": launched,
        "microseconds": replayed or launched,
        "skipped": skipped,
    }


def check(composed: Tensor, exact: Tensor) -> None:
    """Raises ArithmeticError: it is further from the exact product than its dtype's rounding explains."""
    distance = float((composed.double() - exact).norm() / exact.norm())
    if not distance <= 4 * torch.finfo(composed.dtype).eps + 1e-6:
        raise ArithmeticError(f"computes something else: {distance:.1e} off")


def ring(compose: Compose, sets: list[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Every set of factors once. Outputs are kept to the end, so that none is written where one has just been."""
    return [compose(*factors, dtype) for factors in sets]


def captured(compose: Compose, sets: list[list[Tensor]], dtype: torch.dtype) -> Callable[[], Any]:
    """The ring as one CUDA graph: what the GPU takes, without what Python and the launches take."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = ring(compose, sets, dtype)

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs  # held by this function, for as long as the graph writes there

    return replay


def timed(work: Callable[[], Any], calls: int, arguments: argparse.Namespace) -> list[float]:
    """Microseconds of one of the `calls` in each of the repeats: by CUDA's own clock, or by the wall's on a CPU."""
    found: list[float] = []
    for turn in range(arguments.warm_up + arguments.repeats):
        if arguments.device == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            began.record()
            work()
            ended.record()
            torch.cuda.synchronize()
            seconds = began.elapsed_time(ended) / 1e3
        else:
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        if turn >= arguments.warm_up:
            found.append(1e6 * seconds / calls)
    return found


def copy_bandwidth(arguments: argparse.Namespace) -> list[float]:
    """Bytes a second, read and written, of a copy far larger than any cache, in each of the repeats."""
    size = 2**24 if arguments.quick else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=arguments.device)
    target = torch.empty_like(source)
    return [2 * size / (1e-6 * took) for took in timed(lambda: target.copy_(source), 1, arguments)]


def print_table(arguments: argparse.Namespace, cases: list[dict[str, Any]], bandwidth: float) -> None:
    console = Console(width=None if sys.stdout.isatty() else 170)
    keys = [key for key in ("kernel", "plain", "compiled") if any(key in case["microseconds"] for case in cases)]
    how = "replayed as a CUDA graph (launched one by one)" if arguments.device == "cuda" else "wall time"
    table = Table(
        title=f"ΔW of LoHa, {arguments.factors} factors, {arguments.device}; a copy moves {bandwidth / 1e9:,.0f} GB/s",
        caption=f"µs a call, {how}, median of {arguments.repeats}; share: of the copy's bandwidth",
    )
    for title in ("ΔW", "layer", "r", "MB"):
        table.add_column(title, justify="left" if title in ("ΔW", "layer") else "right")
    for key in keys:
        for title in (f"{key}, µs", "GB/s", "share"):
            table.add_column(title, justify="right")
    for key in keys[1:]:
        table.add_column(f"{key} / {keys[0]}", justify="right")
    for case in cases:
        table.add_row(
            case["dtype"],
            case["shape"],
            str(case["rank"]),
            f"{case['bytes'] / 1e6:.1f}",
            *(text for key in keys for text in _cells(case, key, bandwidth)),
            *(_ratio(case["microseconds"], key, keys[0]) for key in keys[1:]),
        )
    console.print(table)
    for case in cases:
        for key, reason in case["skipped"].items():
            print(f"{case['shape']} r={case['rank']} {case['dtype']}: {key} is left out, {reason}")


def _cells(case: dict[str, Any], key: str, bandwidth: float) -> tuple[str, str, str]:
    if key not in case["microseconds"]:
        return "-", "-", "-"
    took, launched = (median(case[times][key]) for times in ("microseconds", "launched_microseconds"))
    rate = case["bytes"] / (1e-6 * took)
    more = "" if took == launched else f" ({launched:.1f})"
    return f"{took:.1f}{more}", f"{rate / 1e9:,.0f}", f"{rate / bandwidth:.0%}"


def _ratio(times: dict[str, list[float]], key: str, first: str) -> str:
    if key not in times or first not in times:
        return "-"
    return spread([took / median(times[first]) for took in times[key]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu, without the kernel")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE", help="default: all")
    parser.add_argument("--ranks", nargs="+", type=int, metavar="R", help="default: 4 8 16 32 64")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"], help="of ΔW")
    parser.add_argument("--factors", choices=list(DTYPES), default="float32", help="their dtype; default: float32")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--repeats", type=int, help="timed rounds through all buffers; default: 20")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before them; default: 3")
    parser.add_argument("--quick", action="store_true", help="two layers, two buffers, 3 rounds: a trial")
    parser.add_argument("--json", metavar="FILE", help="write everything measured, case by case as it ends")
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or (["640", "1280"] if arguments.quick else list(SHAPES))
    arguments.ranks = arguments.ranks or ([4, 16] if arguments.quick else [4, 8, 16, 32, 64])
    arguments.repeats = arguments.repeats or (3 if arguments.quick else 20)
    return arguments


if __name__ == "__main__":
    main()
