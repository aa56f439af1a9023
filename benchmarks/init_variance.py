"""How large the composed weight comes out under each initialisation, for VGG16's convolutions.

Prints the standard deviation of one draw over He's, `sqrt(2 / fan_in)`; 1 is right.
Run: python benchmarks/init_variance.py
"""

import math

import torch
from rich.console import Console
from rich.table import Table

from lowrank_core.factorizations import Hadamard
from lowrank_core.init import Init, he_variance, init_factors
from lowrank_core.ranks import Gamma

CHANNELS = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]
INITS: tuple[Init, ...] = ("calibrated", "paper", "flower")


def main() -> None:
    torch.manual_seed(0)
    for gamma in (0.1, 0.5):
        table = Table("layer", "rank", *INITS, title=f"std of W over He's, FedPara, gamma {gamma}")
        for channels in CHANNELS:
            shape = (*channels, 3, 3)
            rank = Gamma(gamma)(shape)
            cells: list[str] = []
            for init in INITS:
                factors = {name: torch.empty(size) for name, size in Hadamard().shapes(shape, rank).items()}
                init_factors(factors, Hadamard(), shape, init)
                std = Hadamard().compose(factors, shape).square().mean().sqrt().item()
                cells.append(f"{std / math.sqrt(he_variance(shape)):.3f}")
            table.add_row("x".join(map(str, shape)), str(rank), *cells)
        Console().print(table)


if __name__ == "__main__":
    main()
