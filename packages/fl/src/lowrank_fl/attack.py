"""What poisoned clients train on, and what they send."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowrank_fl.config import AttackConfig
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.seeds import derive_seed


def poisoned_clients(attack: AttackConfig, clients: int, seed: int) -> frozenset[int]:
    """Who they are, the same ones for every kind of attack: `share` of the clients, rounded, drawn by the seed."""
    if attack.kind == "none":
        return frozenset()
    drawn = np.random.default_rng(derive_seed(seed, "attack")).permutation(clients)
    return frozenset(drawn[: round(attack.share * clients)].tolist())


def with_poisoned_labels(attack: AttackConfig, examples: Examples, parts: Parts, seed: int) -> Examples:
    """The examples as they are trained on; what clients hold out and what the server tests on stays what it is."""
    if attack.kind != "labels":
        return examples
    labels = examples.labels.clone()
    for client in poisoned_clients(attack, len(parts), seed):
        rows = torch.from_numpy(parts.train[client])
        labels[rows] = len(examples.classes) - 1 - labels[rows]
    return replace(examples, labels=labels)


def poisoned_update(
    attack: AttackConfig,
    received: Mapping[str, np.ndarray],
    trained: Mapping[str, Tensor],
    parameters: Collection[str],
    seed: int,
) -> dict[str, Tensor]:
    """What a poisoned client sends in place of `trained`. Arrays outside `parameters`, statistics, stay as they are.

    Noise has the root mean square of the change it takes the place of, array by array, times `scale`.
    """
    generator = torch.Generator().manual_seed(seed)
    sent = dict(trained)
    for name in parameters:
        if attack.kind == "labels" or name not in trained:
            continue
        before = torch.tensor(received[name])
        change = trained[name].detach().cpu() - before
        if attack.kind == "noise":
            length = change.square().mean().sqrt()
            sent[name] = before + attack.scale * length * torch.randn(change.shape, generator=generator)
        else:
            sent[name] = before - attack.scale * change
    return sent
