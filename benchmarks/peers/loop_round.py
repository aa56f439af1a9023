"""`loop`: federated averaging as a careful PyTorch user writes it by hand, without any framework.

Every process keeps one network, trains its share of the cohort and adds the weights up in shared memory;
the parent adds the processes' sums. With one process everything runs in the parent, with `--threads` threads.
"""

import random
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp
from cells import Clock, Federation, competitor_arguments, read, report, train_client
from torch import Tensor, nn


class Share:
    """One resident network, and the sum of the weights it ended on, weighted by examples."""

    def __init__(self, federation: Federation, start: list[Tensor], total: list[Tensor]) -> None:
        self.federation, self.start, self.total = federation, start, total
        self.network: nn.Module = federation.network().train()
        self.parameters = [parameter.detach() for parameter in self.network.parameters()]

    def train(self, clients: Sequence[int]) -> None:
        federation = self.federation
        torch._foreach_zero_(self.total)
        for client in clients:
            rows = federation.parts[client]
            torch._foreach_copy_(self.parameters, self.start)
            images = federation.normalize(federation.images[rows])
            train_client(self.network, images, federation.labels[rows], federation.cell)
            torch._foreach_add_(self.total, self.parameters, alpha=len(rows))


def work(pipe: Connection, path: str, threads: int, seed: int, start: list[Tensor], total: list[Tensor]) -> None:
    """A worker process: train the clients that come through the pipe, until there are none."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    share = Share(read(path), start, total)
    while clients := pipe.recv():
        share.train(clients)
        pipe.send(None)


def main() -> None:
    arguments = competitor_arguments()
    count, threads = arguments.processes, arguments.threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    federation = read(arguments.federation)
    clock = Clock()
    network = federation.network()
    start = [parameter.detach().share_memory_() for parameter in network.parameters()]
    totals = [[torch.empty_like(tensor).share_memory_() for tensor in start] for _ in range(count)]
    if count == 1:
        share = Share(federation, start, totals[0])
    else:
        context = mp.get_context("spawn")
        pipes = []
        for seed, total in enumerate(totals, 1):
            pipe, end = context.Pipe()
            pipes.append(pipe)
            context.Process(
                target=work, args=(end, arguments.federation, threads, seed, start, total), daemon=True
            ).start()
    for _ in range(1 + arguments.rounds):
        cohort = random.sample(range(federation.cell.clients), federation.cell.cohort)
        if count == 1:
            share.train(cohort)
        else:
            for number, pipe in enumerate(pipes):
                pipe.send(cohort[number::count])
            for pipe in pipes:
                pipe.recv()
        torch._foreach_copy_(start, totals[0])
        for total in totals[1:]:
            torch._foreach_add_(start, total)
        torch._foreach_div_(start, len(cohort) * federation.cell.images)
        clock.mark()
    report(clock, network, federation, arguments.out)


if __name__ == "__main__":
    main()
