"""How often a known LoHa is found again from its ΔW alone, by size and rank: our fit, and alternating least squares.

Found is a ΔW within 1e-3 relative (Frobenius). Factors are normal or, as PEFT starts them, uniform; one seed, one ΔW.
Alternating least squares starts from other random factors of the same kind and has as many sweeps as are given.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from machine import describe, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowrank_core.factorizations import Hadamard
from lowrank_core.fitting import fit_hadamard
from lowrank_fl.aggregation.refit import refit
from lowrank_fl.aggregation.weights import Weight

CASES = [
    (12, 10, 3),
    (16, 16, 2),
    (16, 24, 3),
    (48, 48, 2),
    (48, 48, 4),
    (64, 64, 3),
    (64, 64, 4),
    (128, 128, 4),
    (64, 576, 4),
    (320, 320, 4),
    (320, 2880, 4),
    (640, 640, 4),
    (1280, 1280, 4),
]
LARGE = [(640, 640, 8), (1280, 1280, 8), (640, 5760, 8)]
GOOD = 1e-3


def factors(rows: int, columns: int, rank: int, seed: int) -> list[Tensor]:
    """A1, B1, A2, B2, by turns of the seed normal and uniform."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, rank), (rank, columns)] * 2
    if seed % 2:
        return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [
        (2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1) / math.sqrt(shape[1]) for shape in shapes
    ]


def product(pair: list[Tensor]) -> Tensor:
    return (pair[0] @ pair[1]) * (pair[2] @ pair[3])


def by_us(target: Tensor, rank: int, seed: int, sweeps: int) -> Tensor:
    fit = fit_hadamard(target, rank, seed=seed)
    return product([fit.a1, fit.b1, fit.a2, fit.b2])


def by_alternating(target: Tensor, rank: int, seed: int, sweeps: int) -> Tensor:
    rows, columns = target.shape
    x1, y1, x2, y2 = factors(rows, columns, rank, seed + 2000)
    start = {"x1": x1, "y1": y1.T, "x2": x2, "y2": y2.T}
    weight = Weight("", Hadamard(), (rows, columns), ("x1", "y1", "x2", "y2"))
    return weight.compose(refit(weight, start, target, sweeps))


def measure(fit: Callable[..., Tensor], case: tuple[int, int, int], seeds: int, sweeps: int) -> dict[str, float]:
    found, seconds = 0, list[float]()
    for seed in range(seeds):
        target = product(factors(*case, seed))
        target /= target.square().mean().sqrt()
        before = time.perf_counter()
        near = fit(target, case[2], seed, sweeps)
        seconds.append(time.perf_counter() - before)
        found += bool((target - near).norm() < GOOD * target.norm())
    return {"found": found, "seconds": median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="of each size and rank")
    parser.add_argument("--sweeps", type=int, default=200, help="of alternating least squares")
    parser.add_argument("--large", action="store_true", help="sizes that take minutes each, with two seeds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there too")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for case in LARGE if arguments.large else CASES:
        seeds = 2 if arguments.large else arguments.seeds
        row: dict[str, object] = {"rows": case[0], "columns": case[1], "rank": case[2], "seeds": seeds}
        print(*case, file=sys.stderr)
        row["ours"] = measure(by_us, case, seeds, arguments.sweeps)
        if case[0] * case[1] <= 64 * 576:
            row["alternating"] = measure(by_alternating, case, seeds, arguments.sweeps)
        rows.append(row)
    about = machine()
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "good": GOOD, "rows": rows}, indent=2) + "\n")
    table = Table("shape", "rank", "found", "s", "alternating", "s", title=describe(about))
    for row in rows:
        cells = [f"{row['rows']} x {row['columns']}", str(row["rank"])]
        for name in ("ours", "alternating"):
            result = row.get(name)
            cells += [f"{result['found']} of {row['seeds']}", f"{result['seconds']:.2g}"] if result else ["", ""]
        table.add_row(*cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
