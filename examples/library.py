"""A network that knows the digits 0 to 4 learns 5 to 9 through a LoHa; PEFT then loads what was trained."""

import copy
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowrank_core


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    known = labels < 5
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    fit(network, list(network.parameters()), pixels[known], labels[known], steps=200)
    print(f"trained on 0 to 4: {accuracy(network, pixels[~known], labels[~known]):.1%} of 5 to 9")

    base = copy.deepcopy(network)
    lowrank_core.inject(network, lowrank_core.LoHa(rank=4, alpha=4, target_modules="all-linear"))
    factors = lowrank_core.trainable_parameters(network)
    share = sum(p.numel() for p in factors) / sum(p.numel() for p in base.parameters())
    fit(network, factors, pixels[~known][::2], labels[~known][::2], steps=300)
    print(f"LoHa of {share:.1%} of its parameters: {accuracy(network, pixels[~known][1::2], labels[~known][1::2]):.1%}")

    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "adapter"
        lowrank_core.save(network, saved)
        by_peft = PeftModel.from_pretrained(base, str(saved)).eval()
        with torch.no_grad():
            apart = (by_peft(pixels) - network(pixels)).abs().max().item()
    print(f"PEFT computes the same from the file, to {apart:.0e}")


def fit(network: nn.Module, parameters: list[nn.Parameter], pixels: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(pixels[rows]), labels[rows]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    return (network(pixels).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
