"""The cells `fl_round.py` times: networks, sizes, and the file that hands one federation to every competitor.

Imports torch and safetensors alone, because pfl-research reads it in an environment without lowrank.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn


class PflCNN(nn.Sequential):
    """The small CNN of pfl-research's CIFAR-10 benchmark, 1,626,442 parameters, drawn as there (Glorot, uniform)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * 14 * 14, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        )
        for module in self:
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)


class LeNet(nn.Sequential):
    """The LeNet of PyTorch's and Flower's CIFAR-10 tutorials: 62,006 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )


class MLP(nn.Sequential):
    """`pixels - width - 10`; with a `gamma` both layers are FedPara's, where that makes them smaller."""

    def __init__(self, pixels: int, width: int, gamma: float | None = None) -> None:
        super().__init__(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 10))
        if gamma is not None:
            from lowrank_core import factorize

            factorize(self, "fedpara", gamma=gamma)


@dataclass(frozen=True)
class Cell:
    """A federation to time. Every client trains one epoch; with batches of 10 that is 5 steps."""

    network: Callable[[], nn.Module]
    parameters: int
    clients: int
    cohort: int
    images: int = 50
    """Of each client."""
    batch: int = 10
    lr: float = 0.1
    shape: tuple[int, int, int] = (3, 32, 32)
    """Of an image: channels, height, width."""
    linear: bool = False
    """Every layer with weights is linear, so that clients can be trained together."""


CELLS = {
    "pfl": Cell(PflCNN, 1_626_442, clients=1000, cohort=50),
    "small": Cell(LeNet, 62_006, clients=10, cohort=10),
    # The paper's MLP with ten classes, and the same for 8 x 8 digits.
    "mlp": Cell(partial(MLP, 784, 256), 203_530, 100, 16, shape=(1, 28, 28), linear=True),
    "mlp-fedpara": Cell(partial(MLP, 784, 256, 0.5), 118_874, 100, 16, shape=(1, 28, 28), linear=True),
    "digits": Cell(partial(MLP, 64, 32), 2_410, 100, 16, shape=(1, 8, 8), linear=True),
    "digits-fedpara": Cell(partial(MLP, 64, 32, 0.5), 1_898, 100, 16, shape=(1, 8, 8), linear=True),
}


@dataclass(frozen=True)
class Federation:
    """What every competitor is given: the same images, the same shares of them, the same initial weights."""

    cell: Cell
    images: Tensor
    """uint8, `(n, *cell.shape)`."""
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    parts: Tensor
    """Row `c` holds the indices of client `c`'s images."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    initial: dict[str, Tensor]

    def network(self) -> nn.Module:
        """A network with the initial weights, channels last: the faster layout for these convolutions."""
        network = self.cell.network()
        network.load_state_dict(self.initial)
        return network.to(memory_format=torch.channels_last)

    def normalize(self, images: Tensor) -> Tensor:
        """What a network reads: zero mean and unit variance per channel, channels last."""
        mean, std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def test(self, network: nn.Module) -> tuple[float, float]:
        """The share of the test images that the network names rightly, and its mean loss on them."""
        network.eval()
        correct, loss = 0, 0.0
        for images, labels in zip(self.test_images.split(500), self.test_labels.split(500), strict=True):
            logits = network(self.normalize(images))
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        return correct / len(self.test_labels), loss / len(self.test_labels)


@functools.cache
def read(path: str) -> Federation:
    """The federation in a hand-over file. Its images are mapped, so processes on one machine share them."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        about = file.metadata()
    initial = {name.removeprefix("initial."): t for name, t in tensors.items() if name.startswith("initial.")}
    data = {name: t for name, t in tensors.items() if not name.startswith("initial.")}
    mean, std = (tuple(json.loads(about[key])) for key in ("mean", "std"))
    return Federation(CELLS[about["cell"]], **data, mean=mean, std=std, initial=initial)


@functools.cache
def resident_network(path: str) -> nn.Module:
    """The one network that a process keeps for all its clients."""
    return read(path).network()


def train_client(network: nn.Module, images: Tensor, labels: Tensor, cell: Cell) -> Tensor:
    """One epoch of plain SGD in place, as tight as a loop over autograd gets. Returns the mean loss."""
    parameters = list(network.parameters())
    total = torch.zeros(())
    for batch in torch.randperm(len(labels)).split(cell.batch):
        for parameter in parameters:
            parameter.grad = None
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        loss.backward()
        total += loss.detach() * len(batch)
        with torch.no_grad():
            torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-cell.lr)
    return total / len(labels)


class Clock:
    """Marks the ends of rounds; made when the data is loaded."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]
        self.own = [time.process_time()]

    def mark(self) -> None:
        self.marks.append(time.perf_counter())
        self.own.append(time.process_time())


def competitor_arguments() -> argparse.Namespace:
    """What `fl_round.py` tells every competitor."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--federation", required=True, help="the hand-over file")
    parser.add_argument("--rounds", type=int, required=True, help="timed rounds after the first")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--execution", default="sequential", help="lowrank: how a process trains its clients")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    return parser.parse_args()


@dataclass(frozen=True)
class Timing:
    """What a competitor reports."""

    first: float
    """Seconds from the data being loaded to the end of the first round."""
    rounds: list[float]
    """Seconds of each later round."""
    own: list[float]
    """Seconds of it in which this process computed, whatever else ran on the machine; other processes not counted."""
    accuracy: float
    """Of the final weights on the test images, as is the loss."""
    loss: float
    parameters: int
    torch: str


def report(clock: Clock, network: nn.Module, federation: Federation, out: str) -> None:
    """Write what the clock saw; all rounds must be over, testing comes last."""
    ends = clock.marks
    first, *rounds = (end - begin for begin, end in itertools.pairwise(ends))
    own = [end - begin for begin, end in itertools.pairwise(clock.own[1:])]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    timing = Timing(first, rounds, own, *federation.test(network), parameters, torch.__version__)
    Path(out).write_text(json.dumps(asdict(timing)))
