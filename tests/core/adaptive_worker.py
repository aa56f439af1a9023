"""What each of two processes runs in the test of data parallelism; a module of its own, so that both can import it."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from adaptive_models import batch, small_model, train, trained
from torch import nn

from lowrank_core.adaptive import AdaptiveRank, adapt_ranks
from lowrank_core.errors import LowrankError

STEPS = 20


def parallel_run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(3)
    model = small_model()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(trained(model), lr=0.05)
    with pytest.raises(LowrankError, match="shrink=True cannot be kept while a group of processes trains"):
        adapt_ranks(optimizer, parallel, STEPS, AdaptiveRank(target_rank=2, shrink=True))
    allocator = adapt_ranks(optimizer, parallel, STEPS, AdaptiveRank(target_rank=2, warmup=0.1, settle=0.3))
    patterns = []
    for step in range(STEPS):
        x, y = batch(2 * step + rank)
        optimizer.zero_grad()
        nn.functional.mse_loss(parallel(x), y).backward()
        optimizer.step()
        patterns.append(allocator.rank_pattern())
    whole = [p.detach().clone() for p in trained(model)]
    lost = allocator.shrink()
    parallel = nn.parallel.DistributedDataParallel(model)
    train(parallel, optimizer, range(3))
    torch.save((patterns, whole, lost, [p.detach() for p in trained(model)]), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
