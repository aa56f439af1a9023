"""Small federations for the tests of the engine."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_fl.checkpoint import Checkpoint
from lowrank_fl.config import FederationConfig, RunConfig
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.training import LocalTraining

one_more_trial = pytest.mark.skipif(
    "LOWRANK_TRIALS" not in os.environ,
    reason="starting Ray or a SuperLink takes a minute, and other tests do; LOWRANK_TRIALS=1 runs this one too",
)


def kill_before_checkpoint(patch: pytest.MonkeyPatch, number: int) -> None:
    """Runs end as if killed when clients are through with that round and nothing of it has reached the checkpoint."""
    from lowrank_fl.one_run import save_checkpoint

    def save(folder: Path, config: RunConfig, checkpoint: Checkpoint) -> None:
        if checkpoint.round == number:
            raise SystemError("as if killed")
        save_checkpoint(folder, config, checkpoint)

    patch.setattr("lowrank_fl.one_run.save_checkpoint", save)


def small_examples(count: int = 60, *, is_text: bool = False) -> Examples:
    """Examples whose class can be seen: pictures brighter the higher the class, or text of its symbol."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    if is_text:
        inputs = labels[:, None].expand(-1, 80).to(torch.uint8).contiguous()
        return Examples("text", inputs, labels, inputs[:30], labels[:30], tuple("abc"))
    noise = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
    inputs = (noise + 90 * labels[:, None, None, None]).to(torch.uint8)
    return Examples("bright", inputs, labels, inputs[:30], labels[:30], tuple("abc"), (100.0,), (70.0,))


def equal_parts(examples: Examples, clients: int) -> Parts:
    return Parts([np.arange(client, len(examples.labels), clients) for client in range(clients)], [])


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def how(**federation: object) -> LocalTraining:
    defaults = {"clients": 4, "clients_per_round": 3, "epochs": 2, "batch_size": 4, "lr": 0.05}
    return LocalTraining(FederationConfig.model_validate({**defaults, **federation}), 0.0, 7, "cpu", 1)
