"""AdaLoRA against LoRA, and adaptive against fixed ranks for LoHa, at the same final budget, on a small real task.

A small vision transformer learns scikit-learn's digits 0 to 4 and is frozen; adapters on all its linear layers, and
nothing else but the head, then learn 5 to 9 from few images. Every method has the same steps, batches and scale, and
the learning rate, of four, at which it does best on held-out images in two runs of their own.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lowrank_core import AdaLoRA, AdaptiveRank, LoHa, LoRA, adapt_ranks, inject

RATES = (0.003, 0.01, 0.03, 0.1)
TUNING_SEEDS = (100, 101)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t at 97.5 %, by the number of seeds."""

SCALE = 2.0
"""Of every adapter: alpha is this times the rank it starts with."""


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class SmallTransformer(nn.Module):
    """Sixteen patches of 2x2 pixels, three blocks, the mean of what comes out."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.places = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)
        return self.head(self.norm(self.blocks(self.patches(patches) + self.places)).mean(1))


LAYERS = r"blocks\.\d+\.(q|k|v|o|up|down)"


@dataclass(frozen=True)
class Method:
    name: str
    config: Callable[[], Any]
    adaptive: AdaptiveRank | None = None


def methods(initial: int, target: int) -> list[Method]:
    """The two pairs to compare, and LoRA at the initial rank."""
    falls = AdaptiveRank(target_rank=target, warmup=0.1, settle=0.4, every=5, orthogonality=0.1)
    plain = AdaptiveRank(target_rank=target, warmup=0.1, settle=0.4, every=5, orthogonality=0)

    def options(rank: int) -> dict[str, Any]:
        return {"rank": rank, "alpha": SCALE * rank, "target_modules": LAYERS, "modules_to_save": ["head"]}

    return [
        Method(f"LoRA, rank {target}", lambda: LoRA(**options(target))),
        Method(f"AdaLoRA, {initial} to {target}", lambda: AdaLoRA(**options(initial), target_rank=target), falls),
        Method(f"LoRA, rank {initial}", lambda: LoRA(**options(initial))),
        Method(f"LoHa, rank {target}", lambda: LoHa(**options(target))),
        Method(f"LoHa, {initial} to {target}", lambda: LoHa(**options(initial)), plain),
    ]


@dataclass(frozen=True)
class Split:
    """Images and labels of some classes, labels from 0."""

    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(classes: Sequence[int], seed: int, train: int) -> Split:
    """`train` images to learn from, 150 to choose the learning rate by, the others to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    rows = torch.isin(labels, torch.tensor(classes)).nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    parts = rows[:train], rows[train : train + 150], rows[train + 150 :]
    return Split(*((images[part], labels[part] - classes[0]) for part in parts))


def fit(model: nn.Module, data: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    """Batches of 32, drawn with replacement; the rate falls to zero in a line."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        rows = torch.randint(len(labels), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


def pretrained(seed: int, steps: int) -> tuple[dict[str, Tensor], float]:
    """A transformer that knows 0 to 4, and how well."""
    torch.manual_seed(seed)
    model, data = SmallTransformer(), split(range(5), seed, 600)
    fit(model, data.train, torch.optim.AdamW(model.parameters(), lr=0.003), steps, seed)
    return model.state_dict(), accuracy(model, data.test)


def adapt(start: dict[str, Tensor], method: Method, data: Split, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """One run: accuracies, the adapter's parameters at the end, the final ranks, seconds."""
    torch.manual_seed(seed)
    model = SmallTransformer()
    model.load_state_dict(start)
    nn.init.zeros_(model.head.weight)
    inject(model, method.config())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    allocator = adapt_ranks(optimizer, model, steps, method.adaptive) if method.adaptive else None
    begun = time.perf_counter()
    fit(model, data.train, optimizer, steps, seed)
    seconds = time.perf_counter() - begun
    ranks = {name.partition(".adapters")[0]: rank for name, rank in allocator.ranks().items()} if allocator else {}
    head = sum(p.numel() for p in model.get_submodule("head").parameters() if p.requires_grad)
    return {
        "held": accuracy(model, data.held),
        "test": accuracy(model, data.test),
        "parameters": sum(p.numel() for p in trained) - head,
        "ranks": ranks,
        "seconds": seconds,
    }


def interval(values: Sequence[float]) -> str:
    """The mean and half of its 95 % interval (Student's t), in percent."""
    half = T_95[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{100 * mean(values):.2f} ± {100 * half:.2f}"


def plot(path: Path, ranks: dict[str, dict[str, float]]) -> None:
    """The mean final rank of every layer, a panel for each adaptive method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(ranks), figsize=(4.6 * len(ranks), 3.2), squeeze=False, layout="constrained"
    )
    for panel, (method, found) in zip(panels[0], ranks.items(), strict=True):
        kinds = ("q", "k", "v", "o", "up", "down")
        blocks = sorted({name.split(".")[1] for name in found})
        grid = [[found[f"blocks.{block}.{kind}"] for kind in kinds] for block in blocks]
        image = panel.imshow(grid, cmap="viridis", vmin=0)
        panel.set(title=method, xticks=range(len(kinds)), xticklabels=kinds, yticks=range(len(blocks)))
        panel.set_ylabel("block")
        for y, row in enumerate(grid):
            for x, rank in enumerate(row):
                panel.text(x, y, f"{rank:.1f}", ha="center", va="center", color="white" if rank < 6 else "black")
        figure.colorbar(image, ax=panel, label="mean final rank")
    figure.savefig(path, dpi=120)


def measure(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every run: learning rates first, from seeds that are not counted, then the seeds that are."""
    compared = methods(given.initial, given.target)
    tuning: dict[str, dict[float, list[float]]] = {m.name: {rate: [] for rate in RATES} for m in compared}
    for seed in TUNING_SEEDS:
        start, _ = pretrained(seed, 300)
        data = split(range(5, 10), seed, given.images)
        for method in compared:
            for rate in RATES:
                tuning[method.name][rate].append(adapt(start, method, data, rate, given.steps, seed)["held"])
        console.print(f"learning rates, seed {seed} done", style="dim")
    rates = {name: max(RATES, key=lambda rate: mean(found[rate])) for name, found in tuning.items()}
    runs: dict[str, list[dict[str, Any]]] = {method.name: [] for method in compared}
    known: list[float] = []
    for seed in range(given.seeds):
        start, score = pretrained(seed, 300)
        known.append(score)
        data = split(range(5, 10), seed, given.images)
        for method in compared:
            runs[method.name].append(adapt(start, method, data, rates[method.name], given.steps, seed))
        console.print(f"seed {seed} done", style="dim")
    return {
        "machine": machine(),
        "images": given.images,
        "tuning": tuning,
        "rates": rates,
        "known": known,
        "runs": runs,
    }


def report(told: dict[str, Any]) -> tuple[Table, dict[str, dict[str, float]]]:
    """The table, and the mean final rank of every layer for the adaptive methods."""
    runs, final = told["runs"], {}
    table = Table(
        *("method", "rate", "parameters", "test accuracy, %", "minus fixed rank", "s a run"),
        title=f"digits 5 to 9 from {told['images']} images, {len(told['known'])} seeds, mean ± 95 % interval; "
        f"0 to 4 were known at {interval(told['known'])} %",
    )
    fixed: dict[str, list[float]] = {}
    for name, found in runs.items():
        test, difference = [run["test"] for run in found], ""
        kind = name.partition(",")[0].replace("Ada", "")
        if found[0]["ranks"]:
            final[name] = {layer: mean(run["ranks"][layer] for run in found) for layer in found[0]["ranks"]}
            difference = interval([a - b for a, b in zip(test, fixed[kind], strict=True)])
        fixed.setdefault(kind, test)
        size, seconds = mean(run["parameters"] for run in found), mean(run["seconds"] for run in found)
        table.add_row(name, f"{told['rates'][name]:g}", f"{size:,.0f}", interval(test), difference, f"{seconds:.1f}")
    return table, final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of adapting")
    parser.add_argument("--images", type=int, default=300, help="to adapt to")
    parser.add_argument("--initial", type=int, default=12)
    parser.add_argument("--target", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--read", type=Path, help="measure nothing, print what an earlier run wrote")
    parser.add_argument("--plot", type=Path, help="draw the final ranks here, as PNG")
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    told = json.loads(given.read.read_text()) if given.read else measure(given, console)
    console.print(describe(told["machine"]))
    table, final = report(told)
    console.print(table)
    if given.json:
        given.json.write_text(json.dumps(told, indent=1))
    if given.plot:
        plot(given.plot, final)


if __name__ == "__main__":
    main()
